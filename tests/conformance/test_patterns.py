"""What every pattern must do: levels known before anything is measured, and blocks that hold what they say they hold."""

from __future__ import annotations

from selfpruner.architectures import describe
from selfpruner.pruning.patterns import PATTERNS
from selfpruner.pruning.patterns.n_m import NM
from selfpruner.pruning.patterns.structured import Structured
from selfpruner.pruning.patterns.unstructured import Unstructured
from selfpruner.testing import PatternSuite
from selfpruner.testing.pattern_suite import config_of
from selfpruner.testing.tiny_models import load_tiny


class TestStructured(PatternSuite):
    pattern = Structured


class TestNM(PatternSuite):
    pattern = NM

    def test_levels_are_the_ns_of_an_m(self) -> None:
        arch = describe(load_tiny("llama"))
        assert [level.kept for level in NM(config_of("n_m", group=4), arch).levels()] == [4, 3, 2, 1]
        assert NM(config_of("n_m", group=2, drop_blocks=True), arch).levels()[-1].pruned(64) == 64


class TestUnstructured(PatternSuite):
    pattern = Unstructured

    def test_levels_are_shares_a_step_apart(self) -> None:
        arch = describe(load_tiny("llama"))
        shares = [s.share for s in Unstructured(config_of("unstructured", sparsity_step=0.25, drop_blocks=True), arch).levels()]
        assert shares == [0, 0.25, 0.5, 0.75, 1]
        assert len(Unstructured(config_of("unstructured"), arch).levels()) == 20


def test_every_pattern_has_its_suite() -> None:
    assert {suite.pattern for suite in PatternSuite.__subclasses__()} == set(PATTERNS.values())
