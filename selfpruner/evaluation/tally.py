"""What plans scored, sequence after sequence, and who is still in the race: the books of one evaluation, whoever does the passes.

The engine keeps them for its walks, the search for pieces that come back from several workers. Both enter sums over stretches of
single sequences and a race is decided after the same sequences, so the result does not depend on how the sequences were taken.
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from selfpruner.evaluation.race import SEGMENT, Race

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Score:
    """Means per token in nats: ``kl`` over all positions, ``nll`` over the positions that have a next token.

    A ``rejected`` plan left a race after ``tokens`` tokens; its figures are what they would have come to, estimated.
    """

    kl: float
    nll: float
    tokens: int
    rejected: bool = False

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))


class Tally:
    """Books of ``plans`` (levels) on ``sequences`` sequences of ``length`` tokens. Equal plans are one.

    ``asked`` has the place in ``plans`` of every plan as it was asked for, ``running`` the places of those still to be scored;
    ``done`` sequences are entered. ``kl`` (plans, sequences, stretches) and ``nll`` (plans, sequences) are sums in nats.
    """

    def __init__(self, plans: Sequence[tuple[int, ...]], sequences: int, length: int, race: Race | None = None) -> None:
        self.plans = list(dict.fromkeys(plans))
        self.asked = [self.plans.index(plan) for plan in plans]
        self.sequences, self.length, self._race = sequences, length, race
        self._widths = np.array([min(SEGMENT, length - start) for start in range(0, length, SEGMENT)], np.float64)
        self.kl = np.zeros((len(self.plans), sequences, len(self._widths)))
        self.nll = np.zeros((len(self.plans), sequences))
        self.running = list(range(len(self.plans)))
        self.done = 0
        self._ran = [sequences] * len(self.plans)
        self._contenders: set[int] = set()
        self._decisions: list[int] = []
        if race is not None:
            protected = {plan for index, plan in enumerate(plans) if index not in race.contenders}
            self._contenders = {index for index, plan in enumerate(self.plans) if plan not in protected}
            if len(self._contenders) > race.keep:
                self._decisions = race.decisions(sequences, length)

    @property
    def due(self) -> int:
        """How many sequences are wanted before somebody may be dropped; 0 at the end."""
        ahead = next((at for at in self._decisions if at > self.done), self.sequences)
        return ahead - self.done if self.plans else 0

    def add(self, kl: Floats, nll: Floats) -> None:
        """Enter the next sequences: ``kl`` (running, n, stretches) and ``nll`` (running, n). Those of them that a plan was dropped
        before do not count."""
        start, self.done = self.done, self.done + kl.shape[1]
        self.kl[self.running, start : self.done] = kl
        self.nll[self.running, start : self.done] = nll
        for at in self._decisions:
            if start < at <= self.done:
                self._decide(at)

    def _decide(self, at: int) -> None:
        assert self._race is not None
        racing = [index for index in self.running if index in self._contenders]
        samples = (self.kl[racing, :at] / self._widths).reshape(len(racing), -1)
        lost = {racing[row] for row in self._race.losers(samples, len(self._widths) * self.sequences)}
        for index in lost:
            self._ran[index] = at
        self.running = [index for index in self.running if index not in lost]

    def scores(self) -> list[Score]:
        """One per plan asked for, in that order, once nothing is due."""
        found = [self._score(index, ran) for index, ran in enumerate(self._ran)]
        if self._race is not None:
            finished = sorted(
                (index for index in self._contenders if self._ran[index] == self.sequences),
                key=lambda index: (math.isnan(found[index].kl), found[index].kl),
            )
            for index in self._contenders.difference(finished):
                last = finished[min(self._race.keep, len(finished)) - 1]
                found[index] = _estimate(found[index], found[last], self._score(last, self._ran[index]))
        return [found[index] for index in self.asked]

    def _score(self, index: int, sequences: int) -> Score:
        """On the first ``sequences``."""
        kl, nll = float(self.kl[index, :sequences].sum()), float(self.nll[index, :sequences].sum())
        return Score(kl / (sequences * self.length), nll / (sequences * (self.length - 1)), sequences * self.length)


def _estimate(partial: Score, last: Score, last_partial: Score) -> Score:
    """What a dropped plan would have scored: as much above ``last``, who finished, as it was when it was dropped."""
    ratio = partial.kl / last_partial.kl if last_partial.kl > 0 else 1.0
    return replace(partial, kl=last.kl * ratio, nll=last.nll + partial.nll - last_partial.nll, rejected=True)
