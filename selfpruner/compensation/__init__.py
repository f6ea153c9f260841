"""Compensations. To add one: its own file, a line here and in ``names.COMPENSATIONS``, a subclass of the conformance test."""

from __future__ import annotations

from selfpruner import names
from selfpruner.compensation.base import Compensation, NestedRepair, SubsetRepair
from selfpruner.compensation.bias import Bias
from selfpruner.compensation.least_squares import LeastSquares, LeastSquaresWeights
from selfpruner.compensation.none import Nothing

COMPENSATIONS: dict[str, type[Compensation]] = {cls.name: cls for cls in (Nothing, Bias, LeastSquares, LeastSquaresWeights)}


def create(name: str) -> Compensation:
    names.check("compensation", name, names.COMPENSATIONS)
    return COMPENSATIONS[name]()


__all__ = ["COMPENSATIONS", "Compensation", "NestedRepair", "SubsetRepair", "create"]
