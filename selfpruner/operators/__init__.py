"""Operators. To add one: its own file, a line in a table here and in ``names``, a subclass of the conformance test."""

from __future__ import annotations

from collections.abc import Callable

from selfpruner.operators.allocation import FlapGlobal, Owl
from selfpruner.operators.base import Context, Hint, Offspring, Operator, ParentSelection, Reflections, Rejected
from selfpruner.operators.closed_form import Ramp, Random, Sensitivity, Uniform
from selfpruner.operators.evolution import LevelSwitch, Recombine
from selfpruner.operators.reallocate import Reallocate

CLASSICAL: dict[str, Callable[[], Operator]] = {
    "uniform": Uniform,
    "ramp": Ramp,
    "sensitivity": Sensitivity,
    "random": Random,
    "owl": Owl,
    "flap_global": FlapGlobal,
    "level_switch": LevelSwitch,
    "recombine": Recombine,
    "reallocate": Reallocate,
}

# Which share of a generation's offspring an operator competes for; the rest of the population's plans are initial ones.
CROSSOVERS = ("crossover", "recombine")
MUTATIONS = ("mutate", "level_switch", "random")

__all__ = [
    "CLASSICAL",
    "CROSSOVERS",
    "MUTATIONS",
    "Context",
    "Hint",
    "Offspring",
    "Operator",
    "ParentSelection",
    "Reflections",
    "Rejected",
]
