"""Criteria. To add one: its own file, a line in ``catalogue.CRITERIA``, a subclass of its conformance test; or, from a package of
one's own, an entry point of the group ``selfpruner.criteria``."""

from __future__ import annotations

from selfpruner import catalogue
from selfpruner.criteria.base import Criterion, Evidence, Heads, Matrix, UnitBlock, UnitCriterion, WeightCriterion

CRITERIA: dict[str, type[Criterion]] = {name: entry.load() for name, entry in catalogue.CRITERIA.items()}


def create(name: str, pattern: str | None = None) -> Criterion:
    """The criterion of that name, registered here or by an entry point. Raises UnknownNameError, and ConfigError for a ``pattern``
    that it does not know."""
    found = CRITERIA.get(name) or catalogue.plugin(catalogue.CRITERION_PLUGINS, name)
    if found is None:
        catalogue.check_criterion(name)
    criterion: Criterion = found()
    if pattern is not None:
        catalogue.check_pattern(name, pattern, criterion.patterns)
    return criterion


__all__ = ["CRITERIA", "Criterion", "Evidence", "Heads", "Matrix", "UnitBlock", "UnitCriterion", "WeightCriterion", "create"]
