"""What changing one block of a pruned model would do to its KL, for all blocks and many levels from one backward pass.

Let y_b be the output of block b in the pruned model, g_b the gradient of the KL with respect to it, and D the change of y_b when
the block goes to another level, all on the same tokens. Then

    KL(changed) - KL  =  <g_b, D>  +  1/2 <D, H D>  + ...

The first term holds every interaction with the other blocks as they are pruned now, which is what probes of single blocks cannot
see without one evaluation each. The second is the block's own doing: what it costs alone grows with |D|^2, and one probe of the
dense model says how fast, so this module gives |D|^2 as a share of the dense block's output energy.

The stream before every block is kept and each block is run again on the way back, so memory grows with the sequences taken at
once and not with activations, and only one layer's weights are needed at a time.
"""

from __future__ import annotations

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
    per_sequence = tokens.shape[1] * arch.hidden * 4 * (len(engine.blocks) + 2)
    batch = max(1, min(engine.stream_bytes // per_sequence, tokens.shape[0]))
    kl = 0.0
    first, change = torch.zeros(2, len(moves), dtype=torch.float64)
    energy = torch.zeros(len(engine.blocks), dtype=torch.float64)
    by_block: list[list[int]] = [[] for _ in engine.blocks]
    for index, (block, _) in enumerate(moves):
        by_block[block].append(index)
    for part in tokens.split(batch):
        ids = part.to(arch.device)
        rope = arch.rope(ids.shape[1])
        with torch.no_grad():
            dense = arch.embed(ids)
            for block in range(len(engine.blocks)):
                _stop(cancelled)
                update = _update(engine, block, 0, dense, rope)
                energy[block] += update.double().pow(2).sum().cpu()
                dense = dense + update
            streams = [arch.embed(ids)]
            for block, level in enumerate(plan.levels):
                _stop(cancelled)
                streams.append(streams[-1] + _update(engine, block, level, streams[-1], rope))
        value, gradient = _head(engine, dense, streams.pop())
        kl += value
        for block in reversed(range(len(engine.blocks))):
            _stop(cancelled)
            x = streams.pop()
            with torch.no_grad():
                here = _update(engine, block, plan.levels[block], x, rope)
                for index in by_block[block]:
                    moved = (_update(engine, block, moves[index][1], x, rope) - here).float()
                    first[index] += (gradient * moved).double().sum().cpu()
                    change[index] += moved.double().pow(2).sum().cpu()
            with torch.enable_grad():
                x = x.requires_grad_()
                update = _update(engine, block, plan.levels[block], x, rope)
                if update.requires_grad:
                    gradient = gradient + torch.autograd.grad(update, x, gradient.to(update.dtype))[0]
    count = tokens.numel()
    whole = energy.clamp_min(1e-30)
    sizes = [float(change[index] / whole[block]) for index, (block, _) in enumerate(moves)]
    return Slopes(kl / count, (first / count).tolist(), sizes, count)


def _update(engine: Engine, block: int, level: int, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """What a block at a level adds to the stream x (B, S, d)."""
    weights: Weights = engine.weights(block, level)
    if weights is None:
        return torch.zeros_like(x)
    if isinstance(weights, FfnWeights):
        return engine.arch.ffn_update(block // 2, x, weights)
    return engine.arch.attention_update(block // 2, x, weights, rope)


def _head(engine: Engine, dense: Tensor, final: Tensor, chunk: int = 256) -> tuple[float, Tensor]:
    """Sum of the KL over positions, and its gradient (B, S, d) with respect to the final stream: before the norm's vjp it is
    (q - p) W for the pruned and dense distributions q and p."""
    arch = engine.arch
    head = arch.head_weight
    with torch.enable_grad():
        stream = final.requires_grad_()
        state = arch.final_norm(stream)
    reference = arch.final_norm(dense).flatten(0, 1)
    flat = state.detach().flatten(0, 1)
    gradient, total = torch.zeros_like(flat), 0.0
    for start in range(0, len(flat), chunk):
        rows = slice(start, start + chunk)
        z = torch.nn.functional.linear(reference[rows].to(head.dtype), head).float()
        delta = torch.nn.functional.linear((flat[rows] - reference[rows]).to(head.dtype), head).float()
        p = z.softmax(-1)
        base = z.logsumexp(-1)
        expected = torch.linalg.vecdot(p, delta)
        q = z.add_(delta)
        lse = q.logsumexp(-1)
        total += float((lse - base - expected).double().sum())
        gradient[rows] = ((q - lse[:, None]).exp_() - p).to(head.dtype) @ head
    return total, torch.autograd.grad(state, stream, gradient.view_as(state).to(state.dtype))[0].float()


def _stop(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise CancelledTaskError("Cancelled during a survey.")
