"""A model of the fitness landscape: how a change of levels is expected to change the KL, learnt from everything that was scored.

The KL of a plan is modelled as a sum of one unknown loss per block and level. Before anything is measured the loss is w_b
e_b(level): the block's relative output error (free: tail energies of its least squares) times the weight that its probe of the
dense model gave it. Losses are normal around that: one factor common to all blocks, one per kind and one per block, and a
deviation per level, smooth over an FFN's many widths and independent over an attention block's few shapes, whose heads need not
nest. Differences of plans on the same tokens (surveys around the leader, every child against the leader) update the losses in
closed form: a Gaussian process whose kernel is a sum over blocks.

Two things make a difference noisy. A window is a sample of tokens, on which each block, and each kind of block, matters a little
more or less than in general. All differences from one window share that, so many children on few tokens are no substitute for
tokens. And old differences were taken around another leader, where blocks may have mattered differently.

Sums over blocks make the best plan of any budget a dynamic programme (:func:`selfpruner.planning.allocation.cheapest`), and turn a
draw from the posterior into a plan that is good where the data agree and bold where they are silent (Thompson sampling).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from selfpruner.planning.allocation import FORBIDDEN
from selfpruner.planning.space import Plan, SearchSpace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

# Spreads of the prior, as shares of the expected loss: of all blocks together, of the blocks of a kind, of a block, of an FFN's
# level beside its neighbours, of one attention shape. From surveys of SmolLM2-135M (benchmarks/README.md): around a closed-form
# plan FFN losses came out 0.77 of the expected ones, with no scatter beyond noise; attention shapes scatter by a third.
COMMON, KIND = 0.4, 0.25
FFN_BLOCK, FFN_LEVEL = 0.1, 0.05
ATTENTION_BLOCK, ATTENTION_LEVEL = 0.15, 0.35
# How much more or less a block, and all blocks of a kind together, matter on a window of so many tokens than in general (standard
# deviations; same surveys).
BLOCK_NOISE, KIND_NOISE, WINDOW_TOKENS = 0.23, 0.07, 4096
# What sums cannot say, as a share of a difference's terms, and the smallest standard deviation in nats.
MISFIT, FLOOR = 0.1, 2e-4
# Growth of a difference's variance with every generation that has passed.
AGEING = 1.15
# Most differences kept; the oldest go first.
MOST = 800


@dataclass(frozen=True, slots=True)
class Difference:
    """Two plans on the same ``tokens`` of ``window``: ``change`` = KL(plan) - KL(reference) in nats per token, and ``base`` =
    KL(reference)."""

    levels: tuple[int, ...]
    reference: tuple[int, ...]
    change: float
    base: float
    window: str
    tokens: int
    generation: int
    misfit: float = MISFIT


@dataclass(frozen=True, slots=True)
class Reference:
    """The plan that others are compared with: its ``kl`` on ``tokens`` of ``window``, in ``generation``. ``misfit``: what a sum of
    losses, or an estimate, cannot say of the differences, as a share of the terms."""

    plan: Plan
    kl: float
    window: str
    tokens: int
    generation: int
    misfit: float = MISFIT


class Landscape:
    """The model of one job. ``sensitivities`` and ``probe_levels`` are those of the dense model's probes (one per block)."""

    def __init__(self, space: SearchSpace, sensitivities: Sequence[float], probe_levels: Sequence[int]) -> None:
        import numpy as np

        self.space = space
        self.differences: list[Difference] = []
        self._known: set[tuple[int, int]] = set()  # (block, level) that a difference has spoken of
        self._fitted = 0
        self._weights: list[float] = []
        starts = np.cumsum([0, *(len(block.options) for block in space.blocks)])
        self._start = [int(start) for start in starts[:-1]]
        self._size = int(starts[-1])
        least = max((kl for kl in sensitivities if kl > 0), default=1.0) * 1e-4
        self._prior: Vector = np.zeros(self._size)
        self._covariance: Vector = np.zeros((self._size, self._size))
        for index, (block, kl, level) in enumerate(zip(space.blocks, sensitivities, probe_levels, strict=True)):
            error = np.maximum.accumulate([option.error for option in block.options])
            weight = max(kl, least) / max(float(error[level]), 1e-9) if level else 0.0
            self._weights.append(weight)
            curve = weight * error
            part = self._part(index)
            self._prior[part] = curve
            spread = FFN_BLOCK if block.kind == "ffn" else ATTENTION_BLOCK
            own = spread**2 * np.outer(curve, curve)
            if block.kind == "ffn":
                own += FFN_LEVEL**2 * np.minimum.outer(curve, curve) * curve[-1]
            else:
                own += ATTENTION_LEVEL**2 * np.diag(curve**2)
            self._covariance[part, part] = own
        self._kinds = [self._of_kind(kind) for kind in ("attention", "ffn")]
        for spread, losses in ((COMMON, self._prior), *((KIND, kind) for kind in self._kinds)):
            self._covariance += spread**2 * np.outer(losses, losses)
        self._mean: Vector = self._prior
        self._gain: Vector | None = None  # covariance X^T G^-1
        self._X: Vector = np.zeros((0, self._size))
        self._noise: Vector = np.zeros((0, 0))

    def _of_kind(self, kind: str) -> Vector:
        """The expected losses of blocks of one kind, 0 elsewhere."""
        means: Vector = self._prior.copy()
        for index, block in enumerate(self.space.blocks):
            if block.kind != kind:
                means[self._part(index)] = 0.0
        return means

    def _part(self, block: int) -> slice:
        return slice(self._start[block], self._start[block] + len(self.space.blocks[block].options))

    # -- learning ------------------------------------------------------------------------------------------------------
    def observe(self, plan: Plan, change: float, reference: Reference) -> None:
        """Take note of ``change``, KL(plan) - KL(reference) on the same tokens. Equal plans say nothing."""
        levels = reference.plan.levels
        if plan.levels != levels and reference.kl > 0:
            of = reference
            self.differences.append(Difference(plan.levels, levels, change, of.kl, of.window, of.tokens, of.generation, of.misfit))
            for block, (there, here) in enumerate(zip(plan.levels, levels, strict=True)):
                if there != here:
                    self._known |= {(block, there), (block, here)}

    def _row(self, levels: Sequence[int], reference: Sequence[int]) -> Vector:
        import numpy as np

        row = np.zeros(self._size)
        for start, a, b in zip(self._start, levels, reference, strict=True):
            if a != b:
                row[start + a] += 1.0
                row[start + b] -= 1.0
        return row

    def fit(self, generation: int) -> None:
        """Update the losses with all differences seen so far, as they look from ``generation``."""
        import numpy as np

        if self._fitted == len(self.differences):
            return
        self._fitted = len(self.differences)
        seen = self.differences[-MOST:]
        X = np.array([self._row(d.levels, d.reference) for d in seen])
        # Where text is hard for the reference every change is larger: what counts is the change relative to that.
        bases = np.array([d.base for d in seen])
        y = np.array([d.change for d in seen]) / bases * float(np.average(bases, weights=[d.tokens for d in seen]))
        # What each block contributes to each difference, by the losses believed in so far.
        terms = np.stack([X[:, self._part(b)] @ self._mean[self._part(b)] for b in range(len(self.space.blocks))], axis=1)
        names = np.array([d.window for d in seen])
        scale = np.sqrt(WINDOW_TOKENS / np.array([d.tokens for d in seen]))[:, None]
        kinds = np.stack([terms[:, [b.kind == kind for b in self.space.blocks]].sum(1) for kind in ("attention", "ffn")], axis=1)
        weighed = np.concatenate((BLOCK_NOISE * terms, KIND_NOISE * kinds), axis=1) * scale
        noise = np.where(names[:, None] == names[None, :], weighed @ weighed.T, 0.0)
        misfit = np.array([d.misfit for d in seen])
        noise += np.diag(np.square(misfit * np.abs(terms).sum(1)) + FLOOR**2)
        ageing = np.sqrt(AGEING ** np.array([float(generation - d.generation) for d in seen]))
        noise *= np.outer(ageing, ageing)
        G = X @ self._covariance @ X.T + noise
        self._gain = np.linalg.solve(G, X @ self._covariance).T
        self._X, self._noise = X, noise
        self._mean = self._prior + self._gain @ (y - X @ self._prior)
        self._y = y

    @property
    def weights(self) -> list[float]:
        """Per block the nats its probe of the dense model says it costs when all energy of its output is lost."""
        return self._weights

    # -- asking --------------------------------------------------------------------------------------------------------
    def losses(
        self, rng: random.Random | None = None, *, around: Plan | None = None, radius: float = 1.0, known: bool = False
    ) -> list[list[float]]:
        """Expected loss per block and level in nats, or with ``rng`` a draw from what is still possible.

        With ``around``, a level whose rate is further than ``radius`` from that plan's may not be taken, unless it is the next one,
        or with ``known`` one that a difference has spoken of.
        """
        values = self._mean if rng is None else self._draw(rng)
        curves = []
        for index, block in enumerate(self.space.blocks):
            curve = values[self._part(index)].tolist()
            if around is not None:
                here = around.levels[index]
                for level in range(len(curve)):
                    near = abs(level - here) <= 1 or abs(block.rate(level) - block.rate(here)) <= radius + 1e-9
                    if not near and not (known and (index, level) in self._known):
                        curve[level] = FORBIDDEN
            curves.append(curve)
        return curves

    def _draw(self, rng: random.Random) -> Vector:
        """Matheron's rule: a draw from the prior, moved by what the differences say about it."""
        import numpy as np

        normal = np.random.default_rng(rng.getrandbits(63)).standard_normal
        drawn = self._prior * (1 + COMMON * float(normal()))
        for losses in self._kinds:
            drawn = drawn + KIND * float(normal()) * losses
        for index, block in enumerate(self.space.blocks):
            part = self._part(index)
            curve = self._prior[part]
            if block.kind == "ffn":
                steps = np.sqrt(np.diff(curve, prepend=0.0).clip(0) * curve[-1]) * normal(len(curve))
                drawn[part] += FFN_BLOCK * float(normal()) * curve + FFN_LEVEL * np.cumsum(steps)
            else:
                drawn[part] += ATTENTION_BLOCK * float(normal()) * curve + ATTENTION_LEVEL * curve * normal(len(curve))
        if self._gain is not None:
            root = np.linalg.cholesky(self._noise + 1e-12 * np.eye(len(self._noise)))
            drawn = drawn + self._gain @ (self._y - self._X @ drawn - root @ normal(len(self._noise)))
        return drawn

    def change(self, plan: Plan, reference: Plan) -> float:
        """Expected KL(plan) - KL(reference), nats per token."""
        return float(self._row(plan.levels, reference.levels) @ self._mean)

    def exchanges(self, plan: Plan) -> list[tuple[int, float]]:
        """(block, expected change of the KL) when that block keeps one step more and the same size goes elsewhere at the going
        price: the median price of a parameter among blocks that could still lose a step. Blocks at full size are left out."""
        import numpy as np

        prices, dearer = [], []
        for index, (block, here) in enumerate(zip(self.space.blocks, plan.levels, strict=True)):
            loss = self._mean[self._part(index)]
            for level, after in pairwise(range(max(here - 1, 0), min(here + 2, len(block.options)))):
                size = block.removed(after) - block.removed(level)
                if after > here:
                    prices.append(float(loss[after] - loss[level]) / size)
                else:
                    dearer.append((index, float(loss[after] - loss[level]), size))
        if not prices:
            return []
        going = max(float(np.median(prices)), 0.0)
        return [(index, going * size - saved) for index, saved, size in dearer]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation in [-1, 1], equal values sharing the mean of their ranks; None where it is not defined: for
    fewer than two, where all of one side are equal, and for what is not a number.

    Not scipy.stats: importing it takes the server two seconds and 70 MiB for this one function.
    """
    import numpy as np

    def centred(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        _, where, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[where] - (len(values) + 1) / 2

    if len(first) < 2 or not np.isfinite([*first, *second]).all():
        return None
    one, other = centred(first), centred(second)
    spread = float(np.sqrt((one @ one) * (other @ other)))
    return max(-1.0, min(1.0, float(one @ other) / spread)) if spread > 0 else None
