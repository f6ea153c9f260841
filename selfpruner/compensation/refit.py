"""Least squares once more, for one plan: every matrix fitted to what it really sees in the pruned model.

While a plan is searched for, a block is repaired for the dense model's inputs, so that a level is a level whatever the others are.
When the plan is known, its inputs are: with x the residual stream of the dense model and x~ that of the pruned one before a
block, z~ what its output matrix sees, and y what the dense block adds to x, the weights and bias that are nearest to

    t = y + a (x - x~)

make up for a share ``a`` of what the blocks before left undone. All of it at once (a = 1) asks one block to learn the errors of
all others by heart; none (a = 0) leaves them. Matrices before (q, k, v, gate, up) can be fitted to what they would compute in the
dense model, from the normalised x~. Fits are drawn to the weights at hand, W_0, by a ridge,

    W = W_0 + argmin_D  sum |z~ (W_0 + D)^T + b - t|^2 + r D diag(C) D^T,        C the scatter of z~,

r chosen per matrix by the error on sequences that the fit did not see. Blocks are visited in order, both streams walking along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights
from selfpruner.errors import CancelledTaskError

Weights = AttentionWeights | FfnWeights | None
# Ridges to choose from, as shares of every input's own scatter; and every how manieth sequence judges them.
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
JUDGES = 4
SEQUENCES_AT_ONCE = 4


@dataclass
class Moments:
    """Sums over tokens of (z, t), centred in the end: second moments of inputs z (n,) and with targets t (d,)."""

    inputs: int
    outputs: int
    device: torch.device

    def __post_init__(self) -> None:
        kind: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        self.count = 0.0
        self.z, self.t = torch.zeros(self.inputs, **kind), torch.zeros(self.outputs, **kind)
        self.zz = torch.zeros(self.inputs, self.inputs, **kind)
        self.zt = torch.zeros(self.inputs, self.outputs, **kind)
        self.tt = 0.0

    def add(self, z: Tensor, t: Tensor, weights: Tensor) -> None:
        """Inputs (tokens, n) and targets (tokens, d), and how much each token counts (tokens,)."""
        root = weights.float().sqrt()[:, None]
        z, t = z.float() * root, t.float() * root
        self.count += float(weights.sum(dtype=torch.float64))
        self.z += (z * root).sum(0, dtype=torch.float64)
        self.t += (t * root).sum(0, dtype=torch.float64)
        self.zz += z.T @ z
        self.zt += z.T @ t
        self.tt += float(t.square().sum(dtype=torch.float64))

    def __add__(self, other: Moments) -> Moments:
        both = Moments(self.inputs, self.outputs, self.device)
        both.count = self.count + other.count
        for name in ("z", "t", "zz", "zt", "tt"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def centred(self) -> tuple[Tensor, Tensor]:
        """The scatter of z (n, n), and that of z with t (n, d), about their means."""
        mean = self.z / self.count
        return self.zz - torch.outer(self.z, mean), self.zt - torch.outer(mean, self.t)

    def bias(self, W: Tensor) -> Tensor:
        """The best bias (d,) beside W (d, n)."""
        return (self.t - W @ self.z) / self.count

    def error(self, W: Tensor, bias: Tensor) -> float:
        """Sum of |z W^T + b - t|^2 over the tokens."""
        quadratic = ((W @ self.zz) * W).sum() - 2 * (W * self.zt.T).sum() + 2 * bias @ (W @ self.z - self.t)
        return float(quadratic + self.count * bias @ bias) + self.tt


def fit(train: Moments, judge: Moments, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, float]:
    """W (d, n) and bias fitted to both halves, by the ridge that did best on ``judge`` when fitted to ``train`` alone.

    Without a ``bias`` none is added. The third is the error on ``judge`` over that of what was given; 1 where nothing did better,
    and then that comes back.
    """
    start = W.double()
    given = bias.double() if bias is not None else start.new_zeros(len(start))
    before = judge.error(start, given)
    ridge, after = None, before
    for candidate, found, own in _ridge_path(train, start, RIDGES, biased=bias is not None):
        error = judge.error(found, own)
        if error < after:
            ridge, after = candidate, error
    if ridge is None:
        return W, bias, 1.0
    _, found, own = next(_ridge_path(train + judge, start, (ridge,), biased=bias is not None))
    return found.to(W.dtype), None if bias is None else own.to(bias.dtype), after / max(before, 1e-30)


def _ridge_path(moments: Moments, W: Tensor, ridges: Sequence[float], *, biased: bool) -> Iterator[tuple[float, Tensor, Tensor]]:
    """(ridge, weights, bias) for each ridge."""
    C, B = moments.centred() if biased else (moments.zz, moments.zt)
    level = float(C.diagonal().mean().clamp_min(1e-30))
    scale = C.diagonal().clamp_min(1e-9 * level).rsqrt()
    scaled = scale[:, None] * C * scale
    residual = scale[:, None] * (B - C @ W.T)  # of the given weights, (n, d)
    for ridge in ridges:
        damped = scaled.clone()
        damped.diagonal().add_(ridge)
        found = W + (scale[:, None] * torch.cholesky_solve(residual, torch.linalg.cholesky(damped))).T
        yield ridge, found, moments.bias(found) if biased else W.new_zeros(len(W))


class Refit:
    """Goes through a plan's blocks in order; see the module's text. ``share`` is a, ``inputs`` whether q, k, v, gate and up are
    fitted as well."""

    def __init__(self, arch: Architecture, tokens: Tensor, *, share: float = 0.5, inputs: bool = False, power: float = 0.0) -> None:
        self.arch, self.share, self.inputs, self.power = arch, share, inputs, power
        self.rope = arch.rope(tokens.shape[1])
        with torch.no_grad():
            self.dense = [arch.embed(part.to(arch.device)) for part in tokens.split(SEQUENCES_AT_ONCE)]
        self.pruned = [part.clone() for part in self.dense]
        self.errors: dict[str, float] = {}

    @torch.no_grad()
    def block(self, index: int, dense: AttentionWeights | FfnWeights, pruned: Weights) -> Weights:
        """The fitted weights of block ``index`` (attention and FFN of layer 0, of layer 1, ...), and both streams behind it."""
        if pruned is not None:
            if self.inputs:
                pruned = self._inputs(index, pruned)
            pruned = self._output(index, dense, pruned)
        for x, y in zip(self.dense, self.pruned, strict=True):
            x += self._update(index, x, dense)
            if pruned is not None:
                y += self._update(index, y, pruned)
        return pruned

    def _output(self, index: int, dense: AttentionWeights | FfnWeights, pruned: AttentionWeights | FfnWeights) -> Any:
        name = "o" if isinstance(pruned, AttentionWeights) else "down"
        W, bias = getattr(pruned, name), getattr(pruned, f"{name}_bias")

        def pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self._seen(index, y, pruned), self._update(index, x, dense).float() + self.share * (x - y)

        found, own = self._fitted(f"{index}.{name}", W, bias, pair)
        changed: dict[str, Any] = {name: found, f"{name}_bias": own}
        return replace(pruned, **changed)

    def _inputs(self, index: int, pruned: AttentionWeights | FfnWeights) -> Any:
        names = ("q", "k", "v") if isinstance(pruned, AttentionWeights) else ("gate", "up")
        norm = self.arch.attention_norm if isinstance(pruned, AttentionWeights) else self.arch.ffn_norm
        W = torch.cat([getattr(pruned, name) for name in names])

        def pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return norm(index // 2, y, W.dtype), torch.nn.functional.linear(norm(index // 2, x, W.dtype), W)

        found, _ = self._fitted(f"{index}.{names[0]}", W, None, pair)  # what biases these have is right as it is
        parts = found.split([len(getattr(pruned, name)) for name in names])
        changed: dict[str, Any] = dict(zip(names, parts, strict=True))
        return replace(pruned, **changed)

    def _fitted(
        self, name: str, W: Tensor, bias: Tensor | None, pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor | None]:
        halves = [Moments(W.shape[1], W.shape[0], W.device) for _ in range(2)]
        number = 0
        for x, y in zip(self.dense, self.pruned, strict=True):
            z, t = pair(x, y)
            weights = self._weights(x)
            for row in range(len(x)):
                halves[number % JUDGES == 0].add(z[row], t[row], weights[row])
                number += 1
        found, own, self.errors[name] = fit(halves[0], halves[1], W, bias)
        return found, own

    def _weights(self, x: Tensor) -> Tensor:
        """(B, S): a few tokens have streams a thousand times larger than the others', and what is next only sees directions."""
        return x.square().mean(-1).clamp_min(1e-12).pow(-self.power / 2)

    def _seen(self, index: int, x: Tensor, weights: AttentionWeights | FfnWeights) -> Tensor:
        if isinstance(weights, FfnWeights):
            return self.arch.ffn_inputs(index // 2, x, weights)
        return self.arch.attention_inputs(index // 2, x, weights, self.rope)

    def _update(self, index: int, x: Tensor, weights: AttentionWeights | FfnWeights) -> Tensor:
        if isinstance(weights, FfnWeights):
            return self.arch.ffn_update(index // 2, x, weights)
        return self.arch.attention_update(index // 2, x, weights, self.rope)


def refitted(
    arch: Architecture,
    tokens: Tensor,
    dense: Callable[[int], AttentionWeights | FfnWeights],
    pruned: Callable[[int], Weights],
    *,
    share: float = 0.5,
    inputs: bool = False,
    power: float = 0.0,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Weights]:
    """The fitted weights of every block of a plan, for calibration ``tokens`` (sequences, length).

    Raises CancelledTaskError between blocks.
    """
    walk = Refit(arch, tokens, share=share, inputs=inputs, power=power)
    found = []
    for index in range(2 * arch.layers):
        if cancelled():
            raise CancelledTaskError("Cancelled while refitting a plan.")
        found.append(walk.block(index, dense(index), pruned(index)))
    return found
