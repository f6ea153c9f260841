"""Which tokens plans are scored on: fresh ones every generation, the same ones for all plans that are compared.

The fitness text is cut into sequences. Some are set aside for the final stage and never seen before it; the first ones belong to
the probes. Generations take the rest in a seeded random order, and start over in a new order when it is used up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from selfpruner.config import SearchConfig
from selfpruner.errors import ConfigError
from selfpruner.records import Window

# Tokens of a piece of text that is there for its first tokens. What goes wrong there ruins a whole sequence, now and then: many
# short pieces show how often where a few long sequences do not (benchmarks/README.md).
PIECE = 32


class Windows:
    """Token windows over ``sequences`` sequences of ``length`` tokens.

    Raises ConfigError when the text is too short for one generation.
    """

    def __init__(
        self, sequences: int, length: int, *, seed: int, probe: int, final: int, stages: Sequence[int], survey: int = 0
    ) -> None:
        self.length = length
        self._seed = seed
        self._steps = [self.count(after - before) for before, after in zip((0, *stages), stages, strict=False)]
        if any(after <= before for before, after in zip((0, *stages), stages, strict=False)):
            raise ConfigError("stages must have rising token counts", param="stages")
        self._survey = self.count(survey)
        finals = min(self.count(final), sequences // 3)
        self._probe = tuple(range(min(self.count(probe), sequences // 3)))
        self._final = tuple(range(sequences - finals, sequences))
        self._free = range(len(self._probe), sequences - finals)
        need = sum(self._steps)
        if not finals or need > len(self._free):
            raise ConfigError(
                f"The fitness text has {sequences} sequences of {length} tokens; a generation needs {need} of them beside "
                f"those for probes and the final. Raise fitness_text.sequences to at least {3 * need} or lower the stages.",
                param="fitness_text",
            )

    @classmethod
    def of(cls, config: SearchConfig) -> Windows:
        """The windows of a config's fitness text."""
        return cls(
            config.fitness_text.sequences,
            config.fitness_text.length,
            seed=config.seed,
            probe=config.probe_tokens,
            final=config.final_tokens,
            stages=[stage.tokens for stage in config.stages],
            survey=config.survey_tokens,
        )

    def count(self, tokens: int) -> int:
        """Sequences that hold ``tokens`` tokens."""
        return -(-tokens // self.length)

    @property
    def probe(self) -> Window:
        return Window("probe", "fitness", self._probe)

    @property
    def starts(self) -> Window:
        """Half of the probes' text in short pieces."""
        return Window(f"starts.{PIECE}", "fitness", self._probe[: -(-len(self._probe) // 2)], PIECE)

    @property
    def final(self) -> Window:
        return Window("final", "fitness", self._final)

    @property
    def survey_tokens(self) -> int:
        return self._survey * self.length

    def survey(self, number: int, share: float = 1.0) -> Window:
        """The tokens of survey ``number``, or a ``share`` of them; those of others as long as there are any left."""
        whole = min(self._survey, len(self._free))
        count = min(max(1, round(share * self._survey)), whole)
        epoch, index = divmod(number, len(self._free) // whole)
        order = list(self._free)
        random.Random(f"survey:{self._seed}:{epoch}").shuffle(order)
        chosen = order[index * whole : index * whole + count]
        return Window(f"survey.{number}" if share == 1.0 else f"survey.{number}.{count}", "fitness", tuple(sorted(chosen)))

    def generation(self, number: int) -> list[Window]:
        """One window per stage, disjoint: a stage adds its window to those before it."""
        per_epoch = len(self._free) // sum(self._steps)
        epoch, index = divmod(number, per_epoch)
        order = list(self._free)
        random.Random(f"windows:{self._seed}:{epoch}").shuffle(order)
        start = index * sum(self._steps)
        windows = []
        for stage, count in enumerate(self._steps):
            windows.append(Window(f"g{number}.{stage}", "fitness", tuple(sorted(order[start : start + count]))))
            start += count
        return windows


def report_windows(sequences: int, size: int = 8) -> list[Window]:
    """The report text in pieces small enough to be cancelled and resumed between."""
    return [
        Window(f"report.{number}", "report", tuple(range(start, min(start + size, sequences))))
        for number, start in enumerate(range(0, sequences, size))
    ]
