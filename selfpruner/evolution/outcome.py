"""What a search has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from selfpruner.records import Candidate


@dataclass(frozen=True)
class Outcome:
    """What a search found. ``best`` won the final; ``finalists`` are sorted by their fitness there, best first. ``stopped`` says
    why the generations ended, ``tokens_saved`` what those that were not made would have cost at most; ``rank_correlation`` is the
    mean over generations of Spearman's, predicted against measured; ``repetition`` holds the rates of the generation probe, by plan
    hash and ``dense``: empty without one, ``not_written`` says why where it failed."""

    best: Candidate
    uniform: Candidate
    ramp: Candidate | None
    finalists: Sequence[Candidate]
    generations: int
    made: Mapping[str, int]
    improved: Mapping[str, int]
    stopped: str = ""
    tokens: int = 0
    rank_correlation: float | None = None
    tokens_saved: int = 0
    repetition: Mapping[str, float] = field(default_factory=dict)
    not_written: str | None = None
