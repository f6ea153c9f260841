"""How changing one block of a pruned model would change its KL, for all blocks and many levels from one backward pass.

Let y_b be the output of block b in the pruned model, g_b the gradient of the KL with respect to it, and D the change of y_b when
the block goes to another level, all on the same tokens. Then

    KL(changed) - KL  =  <g_b, D>  +  1/2 <D, H D>  + ...

The first term holds every interaction with the other blocks as they are pruned now. Probes of single blocks cannot see that without
one evaluation each. The second term is the block's own: its cost alone grows with |D|^2, and one probe of the dense model says how
fast, so this module gives |D|^2 as a share of the dense block's output energy.

On the way forward the stream is kept only before every few blocks; on the way back the blocks between two kept streams run again.
Memory grows with the sequences taken at once and not with activations, and only one layer's weights are needed at a time. Levels
of whole units keep some of the dense block's channels or heads as they are, so one pass through all of them serves the plan's own
level and every move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from selfpruner.architectures import AttentionWeights, FfnWeights
from selfpruner.architectures.kernels import soft_cap, soft_cap_change
from selfpruner.errors import CancelledTaskError, ConfigError
from selfpruner.evaluation.engine import Engine, Weights
from selfpruner.planning.space import Plan

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Slopes:
    """Means over ``tokens``: the plan's ``kl`` in nats; per asked (block, level) the ``first`` term in nats and the ``size`` |D|^2
    over the dense block's output ``energy``."""

    kl: float
    first: list[float]
    size: list[float]
    energy: list[float]
    tokens: int


def slopes(
    engine: Engine,
    plan: Plan,
    moves: Sequence[tuple[int, int]],
    tokens: Tensor,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Slopes:
    """The terms of every move (block, level) away from ``plan`` on ``tokens`` (sequences, length).

    Raises ConfigError for a streamed model, whose weights are gone when they are needed again; CancelledTaskError between blocks.
    """
    arch = engine.arch
    if arch.head_pieces() is not None:
        raise ConfigError("slopes need the model in memory; this one is streamed from its files", param="memory")
    walk = _Walk(engine, plan, moves, cancelled)
    # No logits are there while streams are; the head later takes what they leave.
    per_sequence = tokens.shape[1] * arch.hidden * 4 * (2 * walk.stride + 3)
    batch = max(1, min(engine.survey_bytes // per_sequence, tokens.shape[0]))
    kl = sum(walk.forth_and_back(part.to(arch.device)) for part in tokens.split(batch))
    count = tokens.numel()
    energy = walk.energy[[block for block, _ in moves]]
    size = walk.size / energy.clamp_min(1e-30)
    return Slopes(kl / count, (walk.first / count).tolist(), size.tolist(), (energy / count).tolist(), count)


class _Walk:
    """Sums over the tokens seen so far: ``first`` and ``size`` per move, ``energy`` of the dense block's output per block.

    The sequences are shared out among the engine's lanes, which go from block to block together; a lane's stream, gradient and
    terms are at its place in a list.
    """

    def __init__(self, engine: Engine, plan: Plan, moves: Sequence[tuple[int, int]], cancelled: Callable[[], bool]) -> None:
        self.engine, self.plan, self.cancelled = engine, plan, cancelled
        self.stride = math.isqrt(len(engine.blocks) - 1) + 1  # the fewest streams at a time: about 2 sqrt(blocks)
        self.first, self.size = torch.zeros(2, len(moves), dtype=torch.float64)
        self.energy = torch.zeros(len(engine.blocks), dtype=torch.float64)
        self._moves: list[list[tuple[int, int]]] = [[] for _ in engine.blocks]  # (level, index)
        for index, (block, level) in enumerate(moves):
            self._moves[block].append((level, index))

    def forth_and_back(self, ids: Tensor) -> float:
        """The sum of the plan's KL over ``ids`` (B, S)."""
        arch, blocks = self.engine.arch, len(self.engine.blocks)
        self._rope = arch.rope(ids.shape[1])
        shares = ids.tensor_split(min(self.engine.lanes.count, len(ids)))
        dense = [arch.embed(share) for share in shares]
        for block in range(blocks):
            self.energy[block] += math.fsum(self._lanes(partial(self._dense, block, self._weights(block, 0)), dense))
        streams, kept = [arch.embed(share) for share in shares], []
        for block in range(blocks):
            if block % self.stride == 0:
                kept.append([stream.clone() for stream in streams])
            self._advance(block, streams)
        kl, gradient = _head(self.engine, torch.cat(dense), torch.cat(streams))
        del dense, streams
        gradients = list(gradient.split([len(share) for share in shares]))
        for start in reversed(range(0, blocks, self.stride)):
            inputs = [kept.pop()]
            for block in range(start, min(start + self.stride, blocks) - 1):
                inputs.append([stream.clone() for stream in inputs[-1]])
                self._advance(block, inputs[-1])
            for block in reversed(range(start, start + len(inputs))):
                self._back(block, inputs.pop(), gradients)
        return kl

    def _weights(self, block: int, level: int) -> Weights:
        if self.cancelled():
            raise CancelledTaskError("Cancelled during a survey.")
        return self.engine.weights(block, level)

    def _lanes(self, work: Callable[..., T], *lists: Sequence[object]) -> list[T]:
        """``work`` of every lane with its own of each list."""
        results: dict[int, T] = {}

        def task(lane: int) -> None:
            with torch.no_grad():
                results[lane] = work(*(each[lane] for each in lists))

        lanes = range(len(lists[0]))
        self.engine.lanes.run([partial(task, lane) for lane in lanes])
        return [results[lane] for lane in lanes]

    def _dense(self, block: int, weights: Weights, stream: Tensor) -> float:
        """Add to the stream (B, S, d) what the block adds; the energy of that."""
        update = self._update(block, weights, stream)
        stream += update
        return float(update.double().pow_(2).sum())

    def _advance(self, block: int, streams: list[Tensor]) -> None:
        weights = self._weights(block, self.plan.levels[block])
        self._lanes(lambda stream: stream.add_(self._update(block, weights, stream)), streams)

    def _back(self, block: int, xs: list[Tensor], gradients: list[Tensor]) -> None:
        """Note the block's moves; gradients with respect to its inputs xs (B, S, d) take the place of those of its outputs."""
        own, wide = self._weights(block, self.plan.levels[block]), self._wide(block)
        graphs = self._lanes(partial(self._graph, block, own, wide), xs)
        updates = [update for update, _ in graphs]
        for level, index in self._moves[block]:
            there = partial(self._there, block, level, self._weights(block, level))
            terms = self._lanes(partial(_terms, there), xs, graphs, gradients)
            self.first[index] += math.fsum(first for first, _ in terms)
            self.size[index] += math.fsum(size for _, size in terms)
        self._lanes(_pull, updates, xs, gradients)

    def _wide(self, block: int) -> Weights:
        """The dense block with what the plan's level of it and its moves see of it; None where levels compute something else."""
        prunable = self.engine.blocks[block]
        if not self._moves[block] or prunable.columns(0) is None:
            return None
        weights = self._weights(block, 0)
        if not isinstance(weights, FfnWeights):
            return weights
        levels = (self.plan.levels[block], *(level for level, _ in self._moves[block]))
        seen = [columns for level in levels if isinstance(columns := prunable.columns(level), slice)]
        return weights.first_channels(max(columns.stop for columns in seen))

    def _graph(self, block: int, own: Weights, wide: Weights, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the block at the plan's level adds to x (B, S, d), with its graph, and what its output matrix could see."""
        with torch.enable_grad():
            x.requires_grad_()
            if wide is None:
                return self._update(block, own, x), None
            seen = self._inputs(block, wide, x)
            return self._output(block, self.plan.levels[block], own, x, seen), seen.detach()

    def _there(self, block: int, level: int, weights: Weights, x: Tensor, seen: Tensor | None) -> Tensor:
        """What the block would add at another level."""
        return self._update(block, weights, x) if seen is None else self._output(block, level, weights, x, seen)

    def _inputs(self, block: int, weights: AttentionWeights | FfnWeights, x: Tensor) -> Tensor:
        if isinstance(weights, FfnWeights):
            return self.engine.arch.ffn_inputs(block // 2, x, weights)
        return self.engine.arch.attention_inputs(block // 2, x, weights, self._rope)

    def _output(self, block: int, level: int, weights: Weights, x: Tensor, seen: Tensor) -> Tensor:
        """What a block at ``level`` adds, of which the dense block's output matrix sees ``seen`` (B, S, n)."""
        if weights is None:
            return torch.zeros_like(x)
        columns = self.engine.blocks[block].columns(level)
        assert columns is not None
        if isinstance(weights, FfnWeights):
            return self.engine.arch.ffn_output(block // 2, seen[..., columns], weights)
        return self.engine.arch.attention_output(block // 2, seen[..., columns], weights)

    def _update(self, block: int, weights: Weights, x: Tensor) -> Tensor:
        """What a block with these weights adds to the stream x (B, S, d)."""
        if weights is None:
            return torch.zeros_like(x)
        if isinstance(weights, FfnWeights):
            return self.engine.arch.ffn_update(block // 2, x, weights)
        return self.engine.arch.attention_update(block // 2, x, weights, self._rope)


def _terms(
    there: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, graph: tuple[Tensor, Tensor | None], gradient: Tensor
) -> tuple[float, float]:
    """<g, D> and |D|^2 of going from what the block adds here to what it would add ``there``."""
    here, seen = graph
    moved = there(x, seen).float().sub_(here)
    first = float(torch.dot(gradient.flatten(), moved.flatten()))
    return first, float(moved.square_().sum(dtype=torch.float64))


def _pull(update: Tensor, x: Tensor, gradient: Tensor) -> None:
    """Add to the gradient what comes through the block."""
    if update.requires_grad:
        gradient += torch.autograd.grad(update, x, gradient.to(update.dtype))[0]


def _head(engine: Engine, dense: Tensor, final: Tensor) -> tuple[float, Tensor]:
    """Sum of the KL over positions, and its gradient (B, S, d) with respect to the final stream: before the norm's vjp it is
    (q - p) W for the pruned and dense distributions q and p, times what a cap lets through."""
    arch = engine.arch
    head = arch.head_weight
    chunk = max(16, engine.survey_bytes * 5 // 7 // (16 * head.shape[0]))
    with torch.enable_grad():
        state = arch.final_norm(final.requires_grad_())
    reference = arch.final_norm(dense).flatten(0, 1)
    flat = state.detach().flatten(0, 1)
    gradient, total = torch.empty_like(flat), 0.0
    for start in range(0, len(flat), chunk):
        rows = slice(start, start + chunk)
        z = soft_cap(torch.nn.functional.linear(reference[rows].to(head.dtype), head).float(), arch.cap)
        delta = torch.nn.functional.linear((flat[rows] - reference[rows]).to(head.dtype), head).float()
        delta = soft_cap_change(delta, z, arch.cap)
        base = z.logsumexp(-1, keepdim=True)
        p = (z - base).exp_()
        expected = torch.linalg.vecdot(p, delta)
        z += delta
        grown = z.logsumexp(-1, keepdim=True)
        total += float((grown - base - expected[:, None]).double().sum())
        through = 1.0 if arch.cap is None else 1 - (z / arch.cap).square_()
        gradient[rows] = z.sub_(grown).exp_().sub_(p).mul_(through).to(head.dtype) @ head
    return total, torch.autograd.grad(state, final, gradient.view_as(state).to(state.dtype))[0].float()
