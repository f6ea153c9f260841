"""Compensations. To add one: its own file, a line in ``catalogue.COMPENSATIONS``, a subclass of the conformance test."""

from __future__ import annotations

from selfpruner import catalogue
from selfpruner.compensation.base import Compensation, NestedRepair, SubsetRepair

COMPENSATIONS: dict[str, type[Compensation]] = {name: entry.load() for name, entry in catalogue.COMPENSATIONS.items()}


def create(name: str) -> Compensation:
    catalogue.check("compensation", name, catalogue.COMPENSATIONS)
    return COMPENSATIONS[name]()


__all__ = ["COMPENSATIONS", "Compensation", "NestedRepair", "SubsetRepair", "create"]
