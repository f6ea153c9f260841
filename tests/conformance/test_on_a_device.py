"""The suites on another device than the CPU: where a test's tensors are, and what forgets a device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfpruner.calibration.statistics import Accumulator
from selfpruner.testing import device
from selfpruner.testing.device import tensors_of_tests

SUITES = ("architectures", "compensations", "criteria", "patterns", "weight_criteria")


def test_what_tests_make_is_on_the_device_and_what_the_code_makes_is_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DEVICE", torch.device("meta"))
    generator = torch.Generator().manual_seed(0)
    with tensors_of_tests():
        made = [torch.arange(3), torch.tensor([1.0]), torch.randn(2, generator=generator), torch.zeros(2, dtype=torch.int64)]
        named = torch.ones(2, device="cpu")
        theirs = Accumulator(4, torch.device("cpu")).moments().mean
    assert {tensor.device.type for tensor in made} == {"meta"}
    assert named.device.type == theirs.device.type == torch.arange(3).device.type == "cpu"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("suite", SUITES)
def test_suites_hold_on_a_device_that_is_not_the_cpu(suite: str) -> None:
    tests = Path(__file__).parent / f"test_{suite}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.pretended_gpu", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tests.parents[2])
    assert done.returncode == 0, done.stdout[-3000:]
