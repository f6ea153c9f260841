"""The evaluation engine: all plans of a generation in one walk over the layers.

A population is a set of level vectors. At each block the engine holds one residual stream per *distinct prefix* of levels, and
every distinct prefix passes the block once. Plans that agree on their first blocks share that work, with each other and with the
dense model, which walks along as the reference. A stream is copied only where plans part; blocks add to it in place. On a CPU the
streams pass a block side by side, one per core. :mod:`selfpruner.evaluation.divergence` compares the final streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights
from selfpruner.architectures.cost import model_parameters
from selfpruner.calibration.soundness import finite, not_numbers
from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.divergence import Divergences, divergences
from selfpruner.evaluation.known import KnownFinals
from selfpruner.evaluation.parallel import Lanes
from selfpruner.evaluation.pieces import divergences_in_pieces
from selfpruner.evaluation.race import SEGMENT, Race
from selfpruner.evaluation.tally import Floats, Score, Tally
from selfpruner.planning.space import Plan
from selfpruner.pruning.patterns import Prunable

Weights = AttentionWeights | FfnWeights | None

# What a survey may take of the memory where nothing bounds it: it makes its levels anew for every batch of sequences, which with a
# quarter of SmolLM2-135M took a fifth of its time.
SURVEY_BYTES = 96 << 20


@dataclass(frozen=True, slots=True)
class PassCount:
    """What a walk cost: block passes really made, and how many there would be without sharing."""

    passes: int
    passes_without_sharing: int


class LevelCache:
    """Materialised weights of levels, as many as fit; only what is not a view of the model counts.

    A walk asks for every level once and in order, so what was used last is what is needed last: a level that finds no room
    replaces levels that the last walk did not use, and is not kept where there are none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._walk = 0
        self._entries: dict[tuple[int, int], tuple[Weights, int, int]] = {}  # weights, bytes, walk that used them last

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def next_walk(self) -> None:
        self._walk += 1

    def get(self, block: int, level: int, prunable: Prunable) -> Weights:
        key = (block, level)
        if key in self._entries:
            weights, size, _ = self._entries[key]
        else:
            weights = prunable.weights(level)
            size = 0 if level == 0 else prunable.own_bytes(weights)
            if not self._make_room(size):
                return weights
            self.bytes += size
        self._entries[key] = (weights, size, self._walk)
        return weights

    def _make_room(self, size: int) -> bool:
        if self.bytes + size > self.max_bytes:
            for key in [key for key, (_, own, walk) in self._entries.items() if own and walk < self._walk]:
                if self.bytes + size <= self.max_bytes:
                    break
                self.bytes -= self._entries.pop(key)[1]
        return self.bytes + size <= self.max_bytes


class Engine:
    """Scores plans of one model on token batches.

    ``blocks`` are in plan order: attention and FFN of layer 0, of layer 1, and so on. ``memory_bytes`` is what the engine may add
    to the weights: half for the residual streams (``stream_bytes``), three eighths for what is computed from them at a time (tokens
    that pass a block together, ``max_tokens``, then logits, ``logit_bytes``), an eighth for materialised levels
    (``cache_bytes``); each can be set by itself. By default it is a quarter of the model, on a GPU a quarter of its free memory.
    A survey may take ``survey_bytes``: as much for streams and what is computed from them, or SURVEY_BYTES where nothing is said.

    ``known``, where it is set, keeps the dense model's final streams of what is scored exactly and scored again: the report text.
    """

    def __init__(
        self,
        arch: Architecture,
        blocks: Sequence[Prunable],
        *,
        memory_bytes: int | None = None,
        max_tokens: int | None = None,
        stream_bytes: int | None = None,
        cache_bytes: int | None = None,
        logit_bytes: int | None = None,
    ) -> None:
        # A fifth stays free, for the levels in use and for what the allocator keeps.
        memory = (_default_memory(arch) if memory_bytes is None else memory_bytes) * 4 // 5
        self.arch = arch
        self.blocks = list(blocks)
        self.lanes = Lanes(arch.device)
        # A token's widest moment: its normalised state, gate and up (an attention block needs less), and a change of the stream.
        per_token = arch.dtype.itemsize * (3 * arch.channels + 2 * arch.hidden) + 12 * arch.hidden
        self.max_tokens = max(64, memory * 3 // 8 // per_token) if max_tokens is None else max_tokens
        self.stream_bytes = memory // 2 if stream_bytes is None else stream_bytes
        self.logit_bytes = memory * 3 // 8 if logit_bytes is None else logit_bytes
        self.survey_bytes = max(self.stream_bytes + self.logit_bytes, SURVEY_BYTES if memory_bytes is None else 0)
        self.held_bytes = memory // 10
        self.cache = LevelCache(memory // 8 if cache_bytes is None else cache_bytes)
        self.known: KnownFinals | None = None
        self.work = PassCount(0, 0)

    def weights(self, block: int, level: int) -> Weights:
        prunable = self.blocks[block]
        return prunable.renewed(level, self.cache.get(block, level, prunable))

    def evaluate(
        self,
        plans: Sequence[Plan],
        tokens: Tensor,
        *,
        exact: bool = True,
        race: Race | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[Score]:
        """The scores of :meth:`tally`, one per plan in the given order."""
        return self.tally(plans, tokens, exact=exact, race=race, cancelled=cancelled).scores()

    def tally(
        self,
        plans: Sequence[Plan],
        tokens: Tensor,
        *,
        exact: bool = True,
        race: Race | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Tally:
        """Score every plan on ``tokens`` (sequences, length). Equal plans are computed once.

        ``exact=False`` takes the expectations over the vocabulary on chosen tokens (see :mod:`selfpruner.evaluation.divergence`).
        With a ``race``, contenders that cannot be among those kept are dropped on the way; a contender equal to a plan that
        is none is scored on everything. Sequences are taken in batches whose residual streams fit ``stream_bytes``. Raises
        CancelledTaskError between blocks, and ModelError where the dense model computes NaN or infinity.
        """
        sequences, length = tokens.shape
        tally = Tally([plan.levels for plan in plans], sequences, length, race)
        most = max(1, self.stream_bytes // (length * self.arch.hidden * 4 * (len(tally.plans) + 1)))
        self.cache.next_walk()
        with torch.no_grad():
            while tally.due:
                part = tokens[tally.done : tally.done + min(tally.due, most)].to(self.arch.device)
                dense, finals = self._walk([tally.plans[index] for index in tally.running], part, cancelled)
                if not finite(dense):
                    raise not_numbers(self.arch.model)
                if exact and self.known is not None:
                    self.known.keep(part, dense)
                tally.add(*_sums(self._compare(dense, finals, part, exact, cancelled)))
                del dense, finals  # before the next streams are there
        return tally

    # -- walking -----------------------------------------------------------------------------------------------------
    def _walk(self, plans: Sequence[tuple[int, ...]], tokens: Tensor, cancelled: Callable[[], bool]) -> tuple[Tensor, list[Tensor]]:
        """Final residual streams (B, S, d): the dense model's, and one per plan."""
        rope = self.arch.rope(tokens.shape[1])
        known = None if self.known is None else self.known.find(tokens)
        rows = list(plans) if known is not None else [(0,) * len(self.blocks), *plans]
        node = [0] * len(rows)  # which stream each row follows
        streams = [self.arch.embed(tokens)]
        passes = 0
        for block in range(len(self.blocks)):
            if cancelled():
                raise CancelledTaskError("Cancelled during an evaluation.")
            pairs = list(dict.fromkeys((node[row], levels[block]) for row, levels in enumerate(rows)))
            index_of = {pair: index for index, pair in enumerate(pairs)}
            # The first plan to follow a stream takes it over, the others take copies, all before anything is added.
            taken: set[int] = set()
            after = []
            for parent, _ in pairs:
                after.append(streams[parent].clone() if parent in taken else streams[parent])
                taken.add(parent)
            self._pass(block, [(level, after[index_of[prefix, level]]) for prefix, level in pairs], rope)
            passes += len(pairs)
            node = [index_of[node[row], levels[block]] for row, levels in enumerate(rows)]
            streams = after
        self.work = PassCount(self.work.passes + passes, self.work.passes_without_sharing + len(rows) * len(self.blocks))
        finals = [streams[index] for index in node]
        return (finals[0], finals[1:]) if known is None else (known, finals)

    def _pass(self, block: int, streams: Sequence[tuple[int, Tensor]], rope: tuple[Tensor, Tensor]) -> None:
        """Add the block to every stream (B, S, d) at its level, as many sequences at once as ``max_tokens`` allows."""
        tasks: list[Callable[[], None]] = []
        held = 0
        for level in sorted({level for level, _ in streams}):
            weights = self.weights(block, level)
            if weights is None:
                continue
            held += 0 if level == 0 else self.blocks[block].own_bytes(weights)
            if held > self.held_bytes and tasks:
                self.lanes.run(tasks)
                tasks, held = [], 0
            tasks += [
                partial(self._add, block, weights, group, rope) for group in self._groups([s for at, s in streams if at == level])
            ]
        self.lanes.run(tasks)

    def _groups(self, streams: Sequence[Tensor]) -> list[list[Tensor]]:
        """Sequences of ``streams`` to pass together: every lane has some, none more than its share of ``max_tokens``."""
        sequences, length, _ = streams[0].shape
        even = -(-sequences * len(streams) // self.lanes.count)
        wide = max(1, min(self.max_tokens // self.lanes.count // length, even))
        parts = [part for stream in streams for part in stream.split(wide)]
        together = max(1, wide // sequences)
        return [parts[start : start + together] for start in range(0, len(parts), together)]

    def _add(
        self, block: int, weights: AttentionWeights | FfnWeights, group: Sequence[Tensor], rope: tuple[Tensor, Tensor]
    ) -> None:
        x = group[0] if len(group) == 1 else torch.cat(list(group))
        if isinstance(weights, FfnWeights):
            update = self.arch.ffn_update(block // 2, x, weights)
        else:
            update = self.arch.attention_update(block // 2, x, weights, rope)
        for part, change in zip(group, update.split([len(part) for part in group]), strict=True):
            part += change

    # -- comparing ---------------------------------------------------------------------------------------------------
    def _compare(
        self, dense: Tensor, finals: Sequence[Tensor], tokens: Tensor, exact: bool, cancelled: Callable[[], bool]
    ) -> Divergences:
        arch = self.arch
        pieces = arch.head_pieces()
        if pieces is not None:
            rows = max(16, self.logit_bytes // (16 * arch.piece_width))
            return divergences_in_pieces(
                pieces, arch.final_norm, dense, finals, tokens, rows=rows, cap=arch.cap, cancelled=cancelled
            )
        return divergences(
            arch.head_weight,
            arch.final_norm,
            dense,
            finals,
            tokens,
            exact=exact,
            cap=arch.cap,
            memory_bytes=self.logit_bytes,
            cancelled=cancelled,
        )


def _sums(found: Divergences) -> tuple[Floats, Floats]:
    """KL (models, sequences, stretches) and NLL (models, sequences), summed in float64."""
    stretches = [part.double().sum(-1) for part in found.kl.split(SEGMENT, -1)]
    return torch.stack(stretches, -1).numpy(), found.nll.double().sum(-1).numpy()


def _default_memory(arch: Architecture) -> int:
    if arch.device.type == "cuda":
        return max(64 << 20, torch.cuda.mem_get_info(arch.device)[0] // 4)
    return max(64 << 20, model_parameters(arch) * arch.dtype.itemsize // 4)
