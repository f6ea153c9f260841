"""Criteria. To add one: its own file, a line here and in ``names.CRITERIA``, a subclass of its conformance test; or, from a
package of one's own, an entry point of the group ``selfpruner.criteria``."""

from __future__ import annotations

from selfpruner import names
from selfpruner.criteria.base import Criterion, Evidence, Heads, Matrix, UnitBlock, UnitCriterion, WeightCriterion
from selfpruner.criteria.eggs import Eggs
from selfpruner.criteria.flap import Flap, FlapNorm, FlapVariance
from selfpruner.criteria.gblm import Gblm, GblmL2
from selfpruner.criteria.magnitude import Magnitude
from selfpruner.criteria.obs import Obs
from selfpruner.criteria.ria import Ria, RiaPermuted
from selfpruner.criteria.sparsegpt import SparseGpt
from selfpruner.criteria.taylor import Taylor, TaylorMixed, TaylorSecond, TaylorVector
from selfpruner.criteria.wanda import Wanda, WandaSp
from selfpruner.criteria.zpruner import ZPruner, ZPrunerRows

CRITERIA: dict[str, type[Criterion]] = {
    cls.name: cls
    for cls in (
        *(Magnitude, Wanda, WandaSp, Flap, FlapNorm, FlapVariance, Obs),
        *(Taylor, TaylorVector, TaylorSecond, TaylorMixed, Gblm, GblmL2),
        *(Ria, RiaPermuted, ZPruner, ZPrunerRows, SparseGpt, Eggs),
    )
}


def create(name: str, pattern: str | None = None) -> Criterion:
    """The criterion of that name, registered here or by an entry point. Raises UnknownNameError, and ConfigError for a ``pattern``
    that it does not know."""
    found = CRITERIA.get(name) or names.plugin(names.CRITERION_PLUGINS, name)
    if found is None:
        names.check_criterion(name)
    criterion: Criterion = found()
    if pattern is not None:
        names.check_pattern(name, pattern, criterion.patterns)
    return criterion


__all__ = ["CRITERIA", "Criterion", "Evidence", "Heads", "Matrix", "UnitBlock", "UnitCriterion", "WeightCriterion", "create"]
