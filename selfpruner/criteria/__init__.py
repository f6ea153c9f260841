"""Criteria. To add one: its own file, a line here and in ``names.CRITERIA``, a subclass of the conformance test."""

from __future__ import annotations

from selfpruner import names
from selfpruner.criteria.base import Criterion, Heads
from selfpruner.criteria.flap import Flap
from selfpruner.criteria.magnitude import Magnitude
from selfpruner.criteria.obs import Obs
from selfpruner.criteria.wanda_sp import WandaSp

CRITERIA: dict[str, type[Criterion]] = {cls.name: cls for cls in (Magnitude, WandaSp, Flap, Obs)}


def create(name: str) -> Criterion:
    names.check("criterion", name, names.CRITERIA)
    return CRITERIA[name]()


__all__ = ["CRITERIA", "Criterion", "Heads", "create"]
