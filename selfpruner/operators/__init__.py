"""Operators. To add one: its own file, a line in a table here and in ``names``, a subclass of the conformance test."""

from __future__ import annotations

from collections.abc import Callable

from selfpruner.operators.allocation import Alpha, FlapGlobal, Owl
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
    "alpha": Alpha,
    "flap_global": FlapGlobal,
    "level_switch": LevelSwitch,
    "recombine": Recombine,
    "reallocate": Reallocate,
}

# What makes one plan of two.
CROSSOVERS = ("crossover", "recombine")

__all__ = [
    "CLASSICAL",
    "CROSSOVERS",
    "Context",
    "Hint",
    "Offspring",
    "Operator",
    "ParentSelection",
    "Reflections",
    "Rejected",
]
