"""A criterion from somebody else's package: the worked example of CONTRIBUTING, as it stands there, found by its entry point."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfpruner import catalogue, criteria
from selfpruner.criteria import UnitCriterion, WeightCriterion
from selfpruner.criteria.masks import Sparsity
from selfpruner.errors import ConfigError
from selfpruner.testing.blocks import matrix
from selfpruner.testing.tiny_models import sample_text, tiny_model
from tests.helpers import ROOT

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like an installed package ``my_package`` to importlib.metadata."""
    text = CONTRIBUTING.read_text("utf-8")
    (example,) = re.findall(r"<!-- example: criterion -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) < 60
    folder = tmp_path / "site"
    info = folder / "my_package-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "my_package.py").write_text(example)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (tests,) = re.findall(r"<!-- example: its tests -->\n```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "test_root_wanda.py").write_text(tests)
    (section,) = re.findall(r'\[project.entry-points."selfpruner.criteria"\]\n(\w+) = "([\w:]+)"', text)
    (info / "entry_points.txt").write_text(f"[selfpruner.criteria]\n{section[0]} = {section[1]}\n")
    monkeypatch.syspath_prepend(str(folder))
    catalogue.plugins.cache_clear()
    yield folder  # type: ignore[misc]
    catalogue.plugins.cache_clear()


def environment(package: Path) -> dict[str, str]:
    """Of a process that has the package and this product."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])}


@pytest.mark.usefixtures("package")
def test_it_is_found_and_does_what_it_says() -> None:
    criterion = criteria.create("root_wanda")
    assert isinstance(criterion, UnitCriterion)
    assert isinstance(criterion, WeightCriterion)
    m = matrix()
    (mask,) = criterion.masks(m, [Sparsity.n_m(2, 4)])
    scores = (m.W.abs() * m.norm**0.75).view(24, -1, 4)
    assert torch.equal(mask.view(24, -1, 4).sum(-1), torch.full((24, 8), 2))
    assert float(scores[mask.view(24, -1, 4)].sum()) == pytest.approx(float(scores.topk(2, -1).values.sum()), rel=1e-5)
    catalogue.check_criterion("root_wanda", "n_m")
    with pytest.raises(ConfigError, match="not checkered"):
        criteria.create("root_wanda", "checkered")


def test_without_the_package_nobody_knows_it() -> None:
    catalogue.plugins.cache_clear()
    with pytest.raises(ConfigError, match="root_wanda"):
        catalogue.check_criterion("root_wanda")


WRONG = """
from test_root_wanda import TestWeights as Suite

class TestWrong(Suite):
    formula = staticmethod(lambda W, norm, gradients: W.abs() * norm)
"""


def test_it_passes_the_suites(package: Path, tmp_path: Path) -> None:
    """In a pytest of its own, outside of this repository; what does not pass is shown with the values that were compared."""
    (tmp_path / "test_wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", ".", "-k", "not TestWrong or formula"]
    done = subprocess.run(command, env=environment(package), cwd=tmp_path, capture_output=True, text=True, check=False)
    (failed, passed) = re.findall(r"(\d+) failed, (\d+) passed", done.stdout)[0]
    assert (int(failed), int(passed) > 40) == (1, True), done.stdout
    assert "test_wrong.py::TestWrong::test_the_formula - AssertionError: Sparsity(" in done.stdout


def test_it_prunes_a_model_from_the_command_line(package: Path, tmp_path: Path) -> None:
    """In processes of their own, as a user's are."""
    text = tmp_path / "text.txt"
    text.write_text(sample_text(20_000))
    model = tiny_model(tmp_path / "model", "llama")
    small = ["-s", "calibration.sequences=8", "-s", "calibration.length=64", "--device", "cpu", "--cache", str(tmp_path / "cache")]
    how = ["--pattern", "n_m", "--criterion", "root_wanda", "--compensation", "none", "--rate", "0.5"]
    command = [sys.executable, "-m", "selfpruner", "prune", "-o", str(tmp_path / "out"), "--model", str(model)]
    done = subprocess.run(
        [*command, "--calibration", str(text), *how, *small], env=environment(package), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (plan["criterion"], plan["pattern"]) == ("root_wanda", "n_m")
