"""Conformance suites and tiny models, for authors of plug-ins and for our own tests.

    from selfpruner.testing import CriterionSuite

    class TestMine(CriterionSuite):
        criterion = Mine

Suites need pytest. Names are imported when they are first used, so this package itself loads neither torch nor pytest.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfpruner.testing.architecture_suite import ArchitectureSuite
    from selfpruner.testing.compensation_suite import CompensationSuite
    from selfpruner.testing.criterion_suites import CriterionSuite, WeightCriterionSuite
    from selfpruner.testing.exported_model_suite import ExportedModelSuite
    from selfpruner.testing.format_suite import FormatSuite
    from selfpruner.testing.operator_suite import OperatorSuite
    from selfpruner.testing.pattern_suite import PatternSuite
    from selfpruner.testing.tiny_models import sample_text, tiny_model, tiny_tokenizer

__all__ = [
    "ArchitectureSuite",
    "CompensationSuite",
    "CriterionSuite",
    "ExportedModelSuite",
    "FormatSuite",
    "OperatorSuite",
    "PatternSuite",
    "WeightCriterionSuite",
    "sample_text",
    "tiny_model",
    "tiny_tokenizer",
]

_SUITES = {
    "ArchitectureSuite": "architecture_suite",
    "CompensationSuite": "compensation_suite",
    "CriterionSuite": "criterion_suites",
    "ExportedModelSuite": "exported_model_suite",
    "FormatSuite": "format_suite",
    "OperatorSuite": "operator_suite",
    "PatternSuite": "pattern_suite",
    "WeightCriterionSuite": "criterion_suites",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.{_SUITES.get(name, 'tiny_models')}"
    if name in _SUITES and module not in sys.modules:
        import pytest

        pytest.register_assert_rewrite(module)  # a failure in a suite shows its values, as one in a test file does
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
