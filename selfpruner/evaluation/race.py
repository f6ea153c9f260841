"""Early rejection: which of the compared plans can be dropped before all tokens are spent on them.

Plans are scored on the same text, so what separates them is the difference on the same stretch of it, which is far quieter than
either value. A contender is dropped when the lower confidence bound of its mean difference from the last contender to be kept so
far is above zero (a racing algorithm: Maron & Moore 1994; Birattari et al. 2002 with paired differences). The question is who
leads at the end of this text, not on all texts, so the bound shrinks to nothing as the text runs out (Cochran's finite population
correction). Knows no torch: where an evaluation is split over workers, the search decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from selfpruner.errors import ConfigError

# Tokens whose mean is one sample, samples before the first decision, and tokens between decisions.
SEGMENT, LEAST_SAMPLES, STEP = 64, 16, 512


@dataclass(frozen=True, slots=True)
class Race:
    """``keep`` of the plans at the indices ``contenders`` will survive; all other plans are scored on everything.

    ``confidence`` is that of one decision about one contender. Raises ConfigError on values that make no race.
    """

    keep: int
    contenders: tuple[int, ...]
    confidence: float = 0.99

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"a race keeps at least one plan, got {self.keep}", param="race")
        if not 0.5 < self.confidence < 1:
            raise ConfigError(f"the confidence of a race is between 0.5 and 1, got {self.confidence}", param="race")

    def decisions(self, sequences: int, length: int) -> list[int]:
        """After how many of the sequences somebody may be dropped, ascending."""
        step = max(1, STEP // length)
        first = max(step, -(-LEAST_SAMPLES * SEGMENT // length))
        return list(range(first, sequences, step))

    def losers(self, samples: NDArray[np.float64], total: int) -> list[int]:
        """Rows of ``samples`` (contenders, n), a divergence per stretch of the first n of ``total``, that can be dropped now."""
        count, n = samples.shape
        samples = np.where(np.isnan(samples), np.inf, samples)
        if count <= self.keep or n < LEAST_SAMPLES:
            return []
        order = samples.mean(1).argsort(kind="stable").tolist()
        last = samples[order[self.keep - 1]]
        bound = quantile(self.confidence, n - 1) * math.sqrt((1 - n / total) / n)
        losers = []
        with np.errstate(invalid="ignore"):  # infinity less infinity: both broke down
            for row in order[self.keep :]:
                difference = samples[row] - last
                mean = float(difference.mean())
                # Infinite: a plan that broke down, whatever the bound.
                if mean == math.inf or mean - bound * float(difference.std(ddof=1)) > 0:
                    losers.append(row)
        return losers


def quantile(confidence: float, freedom: int) -> float:
    """Student's t quantile by the expansion of Cornish and Fisher (Abramowitz & Stegun 26.7.5), exact to 1e-2 from 7 degrees."""
    z, n = NormalDist().inv_cdf(confidence), float(freedom)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
