"""What `make test-gpu` runs: every section once on the CPU with tiny shapes, and a table whatever becomes of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("key", gpu.SECTIONS)
def test_every_section_runs_on_a_cpu(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--only", key, "--output", str(output)]) == 0, capsys.readouterr().out
    found = json.loads(output.read_text())["sections"][key]
    assert found["status"] == ("left out" if gpu.SECTIONS[key].cuda_only else "ok")
    if key == "conformance":
        assert found["figures"]["failed"] == 0 < found["figures"]["passed"]
    if key == "out_of_memory":
        assert found["figures"]["refused"] > 0
        assert found["figures"]["largest_relative_difference"] < 1e-6


def test_a_section_that_fails_or_takes_too_long_ends_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SECONDS", 1)  # ten on a CPU: too little for the second
    monkeypatch.setitem(gpu.SECTIONS, "engine", replace(gpu.SECTIONS["engine"], limit=0.51))
    output = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--only", "engine", "gradients", "two_four", "--output", str(output)]) == 1
    sections = json.loads(output.read_text())["sections"]
    assert [sections[key]["status"] for key in ("engine", "gradients", "two_four")] == ["failed", "left out", "left out"]
    assert "took more than 5 s" in capsys.readouterr().out


def test_without_a_gpu_one_line_says_what_can_be_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "No CUDA device is here. `--device cpu` runs what can run on tiny shapes.\n"
