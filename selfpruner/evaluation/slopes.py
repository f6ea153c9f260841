"""What changing one block of a pruned model would do to its KL, for all blocks and many levels from one backward pass.

Let y_b be the output of block b in the pruned model, g_b the gradient of the KL with respect to it, and D the change of y_b when
the block goes to another level, all on the same tokens. Then

    KL(changed) - KL  =  <g_b, D>  +  1/2 <D, H D>  + ...

The first term holds every interaction with the other blocks as they are pruned now, which is what probes of single blocks cannot
see without one evaluation each. The second is the block's own doing: what it costs alone grows with |D|^2, and one probe of the
dense model says how fast, so this module gives |D|^2 as a share of the dense block's output energy.

On the way forth the stream is kept before every few blocks only; on the way back the blocks between two of these are run again.
Memory grows with the sequences taken at once and not with activations, and only one layer's weights are needed at a time. An
FFN's levels are prefixes of its channels, so one pass through gate and up serves all its moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfpruner.architectures import FfnWeights
from selfpruner.errors import CancelledTaskError, ConfigError
from selfpruner.evaluation.engine import Engine, Weights
from selfpruner.space import Plan


@dataclass(frozen=True, slots=True)
class Slopes:
    """Means over ``tokens``: the plan's ``kl`` in nats; per asked (block, level) the ``first`` term in nats and the ``size`` |D|^2
    over the dense block's output energy."""

    kl: float
    first: list[float]
    size: list[float]
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
    batch = max(1, min((engine.stream_bytes + engine.logit_bytes) // per_sequence, tokens.shape[0]))
    kl = sum(walk.forth_and_back(part.to(arch.device)) for part in tokens.split(batch))
    count = tokens.numel()
    whole = walk.energy.clamp_min(1e-30)
    sizes = [float(walk.size[index] / whole[block]) for index, (block, _) in enumerate(moves)]
    return Slopes(kl / count, (walk.first / count).tolist(), sizes, count)


class _Walk:
    """Sums over the tokens seen so far: ``first`` and ``size`` per move, ``energy`` of the dense block's output per block."""

    def __init__(self, engine: Engine, plan: Plan, moves: Sequence[tuple[int, int]], cancelled: Callable[[], bool]) -> None:
        self.engine, self.plan, self.cancelled = engine, plan, cancelled
        self.stride = math.isqrt(len(engine.blocks) - 1) + 1  # the fewest streams at a time: about 2 sqrt(blocks)
        self.first, self.size = torch.zeros(2, len(moves), dtype=torch.float64)
        self.energy = torch.zeros(len(engine.blocks), dtype=torch.float64)
        self._moves: list[list[tuple[int, int]]] = [[] for _ in engine.blocks]  # (level, index), the widest first
        for index, (block, level) in enumerate(moves):
            self._moves[block].append((level, index))
            self._moves[block].sort()

    def forth_and_back(self, ids: Tensor) -> float:
        """The sum of the plan's KL over ``ids`` (B, S)."""
        arch, blocks = self.engine.arch, len(self.engine.blocks)
        rope = arch.rope(ids.shape[1])
        with torch.no_grad():
            dense = arch.embed(ids)
            for block in range(blocks):
                update = self._update(block, 0, dense, rope)
                self.energy[block] += update.double().pow(2).sum().cpu()
                dense += update
            stream, kept = arch.embed(ids), []
            for block, level in enumerate(self.plan.levels):
                if block % self.stride == 0:
                    kept.append(stream.clone())
                stream += self._update(block, level, stream, rope)
        kl, gradient = _head(self.engine, dense, stream)
        del dense, stream
        for start in reversed(range(0, blocks, self.stride)):
            streams = [kept.pop()]
            with torch.no_grad():
                for block in range(start, min(start + self.stride, blocks) - 1):
                    streams.append(streams[-1] + self._update(block, self.plan.levels[block], streams[-1], rope))
            for block in reversed(range(start, start + len(streams))):
                gradient = self._back(block, streams.pop(), gradient, rope)
        return kl

    def _back(self, block: int, x: Tensor, gradient: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Note the block's moves; the gradient with respect to its input x (B, S, d)."""
        with torch.enable_grad():
            update = self._update(block, self.plan.levels[block], x.requires_grad_(), rope)
        here = update.detach()
        wide: Tensor | None = None
        for level, index in self._moves[block]:
            with torch.no_grad():
                weights = self.engine.weights(block, level)
                if isinstance(weights, FfnWeights):
                    if wide is None:
                        wide = self.engine.arch.ffn_inputs(block // 2, x, weights)
                    there = torch.nn.functional.linear(wide[..., : weights.down.shape[1]], weights.down, weights.down_bias)
                else:
                    there = self._update(block, level, x, rope)
                moved = there.float().sub_(here)
                self.first[index] += torch.dot(gradient.flatten(), moved.flatten()).double().cpu()
                self.size[index] += moved.square_().sum(dtype=torch.float64).cpu()
        if not update.requires_grad:
            return gradient
        (added,) = torch.autograd.grad(update, x, gradient.to(update.dtype))
        return gradient.add_(added)

    def _update(self, block: int, level: int, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What a block at a level adds to the stream x (B, S, d)."""
        if self.cancelled():
            raise CancelledTaskError("Cancelled during a survey.")
        weights: Weights = self.engine.weights(block, level)
        if weights is None:
            return torch.zeros_like(x)
        if isinstance(weights, FfnWeights):
            return self.engine.arch.ffn_update(block // 2, x, weights)
        return self.engine.arch.attention_update(block // 2, x, weights, rope)


def _head(engine: Engine, dense: Tensor, final: Tensor) -> tuple[float, Tensor]:
    """Sum of the KL over positions, and its gradient (B, S, d) with respect to the final stream: before the norm's vjp it is
    (q - p) W for the pruned and dense distributions q and p."""
    arch = engine.arch
    head = arch.head_weight
    chunk = max(16, (engine.stream_bytes // 2 + engine.logit_bytes) // (16 * head.shape[0]))
    with torch.enable_grad():
        state = arch.final_norm(final.requires_grad_())
    reference = arch.final_norm(dense).flatten(0, 1)
    flat = state.detach().flatten(0, 1)
    gradient, total = torch.empty_like(flat), 0.0
    for start in range(0, len(flat), chunk):
        rows = slice(start, start + chunk)
        z = torch.nn.functional.linear(reference[rows].to(head.dtype), head).float()
        delta = torch.nn.functional.linear((flat[rows] - reference[rows]).to(head.dtype), head).float()
        base = z.logsumexp(-1, keepdim=True)
        p = (z - base).exp_()
        expected = torch.linalg.vecdot(p, delta)
        z += delta
        grown = z.logsumexp(-1, keepdim=True)
        total += float((grown - base - expected[:, None]).double().sum())
        gradient[rows] = z.sub_(grown).exp_().sub_(p).to(head.dtype) @ head
    return total, torch.autograd.grad(state, final, gradient.view_as(state).to(state.dtype))[0].float()
