"""A checkpoint has the type that its model has, whatever the model is computed in, unless another is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import selfpruner
from selfpruner import model_checks, models
from selfpruner.errors import ExportError
from selfpruner.workers.runtime import narrowed
from tests.tiny_models import sample_text, tiny_model

TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text(6000))
    return path


def prune(model: Path, text: Path, out: Path, **fields: Any) -> selfpruner.api.Pruned:
    asked = {"sources": [{"source": str(text)}], "sequences": 4, "length": 48}
    return selfpruner.prune(out, rate=0.3, model=str(model), calibration=asked, device="cpu", cache=out.parent / "cache", **fields)


def types_of(folder: Path) -> set[str]:
    return {dtype for file in model_checks.weight_files(folder) for dtype, _ in model_checks.read_header(file).values()}


@pytest.mark.parametrize("fast", [True, False], ids=["fast-bfloat16", "slow-bfloat16"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_models_own_type(
    family: str, dtype: str, fast: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_bfloat16_is_fast", lambda: fast)
    model = tiny_model(tmp_path / "model", family, dtype=dtype)
    made = prune(model, text, tmp_path / "out")
    assert types_of(made.path) == {TYPES[dtype]}
    assert json.loads((made.path / "config.json").read_text())["dtype"] == dtype
    assert json.loads((made.path / "plan.json").read_text())["dtype"] == dtype
    assert made.verification["problems"] == []
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (made.path, model)]
    assert sizes[0] < sizes[1]
    # Nothing was rounded on the way: what no repair touched is what it was.
    before, after = (load_file(folder / "model.safetensors") for folder in (model, made.path))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("format", ["masked", "gguf"])
def test_other_formats(format: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_bfloat16_is_fast", lambda: False)
    made = prune(tiny_model(tmp_path / "model", "llama", dtype="float16"), text, tmp_path / "out", compensation="none")
    written = selfpruner.export(made.path, tmp_path / format, format=format)
    assert written.verification["problems"] == []
    if format == "masked":
        assert types_of(written.path) == {"F16"}
    else:
        assert written.verification["types"]["F16"] > 0


def test_streamed(text: Path, tmp_path: Path) -> None:
    """From files of two types, most of whose numbers are bfloat16."""
    model = tiny_model(tmp_path / "model", "llama", layers=24, hidden=128, heads=8, head_dim=16, ffn=1024, dtype="bfloat16")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-4
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    made = {memory: prune(model, text, tmp_path / f"out-{memory}", memory=memory, attention="none") for memory in (None, "20MiB")}
    for memory, one in made.items():
        assert types_of(one.path) == {"BF16"}, memory
        assert one.verification["problems"] == []
    one, other = (load_file(made[memory].path / "model.safetensors") for memory in made)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_is_asked_for(text: Path, tmp_path: Path) -> None:
    made = prune(tiny_model(tmp_path / "model", "llama", dtype="float16"), text, tmp_path / "out", dtype="bfloat16")
    assert types_of(made.path) == {"BF16"}


def test_numbers_that_float16_does_not_hold(tiny_llama: Path, tmp_path: Path) -> None:
    """Repairs may be larger than what they repair."""
    loaded = models.load(models.resolve(str(tiny_llama), tmp_path), "cpu", "float32")
    repaired = {"model.norm.weight": torch.tensor([1.0, 70_000.0])}
    with pytest.raises(ExportError, match=r"model\.norm\.weight has numbers that float16 cannot hold\. Ask for dtype bfloat16"):
        narrowed(repaired, replace(loaded, narrow=torch.float16))
    assert torch.equal(
        narrowed(repaired, replace(loaded, narrow=torch.bfloat16))["model.norm.weight"], torch.tensor([1.0, 70_144.0])
    )
    assert narrowed(repaired, loaded) is repaired
