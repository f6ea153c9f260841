"""A checkpoint has the type that its model's files have, and what was not pruned has their very numbers, whatever computed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from selfpruner import api, models
from selfpruner.errors import ExportError
from selfpruner.export import formats
from selfpruner.export.build import build, shapes_of
from selfpruner.files import manifest
from selfpruner.judging import loading as judging
from selfpruner.models import checks, loading
from selfpruner.testing.tiny_models import sample_text, tiny_model
from tests.helpers.gguf_files import write_gguf

LARGE = {"layers": 24, "hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 512}  # streamed in 30 MiB


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(sample_text(3000))
    return {"sources": [{"source": str(file)}], "sequences": 4, "length": 32}


def model(folder: Path, stored: str, **options: Any) -> Path:
    """``mixed``: all but the matrices of the layers in float32, which is most of this model, as is what its config says."""
    tiny_model(folder, "llama", dtype="float16" if stored == "mixed" else stored, **options)
    if stored == "mixed":
        tensors = load_file(folder / "model.safetensors")
        tensors = {name: tensor if "proj" in name else tensor.float() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        body = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(body | {"dtype": "float32"}))
    return folder


def check(dense: Path, made: api.Pruned, kind: str) -> None:
    """Every tensor of ``kind``; those of the first layer, which is dense, and beyond the layers are the model's own."""
    dtype = getattr(torch, kind)
    old, new = load_file(dense / "model.safetensors"), load_file(made.path / "model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {dtype}
    assert json.loads((made.path / "config.json").read_text())["dtype"] == kind
    assert manifest.read(made.path)["plan"]["dtype"] == kind
    assert made.verification["dtype"] == ("float32" if made.verification.get("streamed") else kind)  # a stream computes in float32
    untouched = [name for name in old if "layers." not in name or ".layers.0." in name]
    assert len(untouched) > 5
    for name in untouched:
        assert torch.equal(new[name], old[name].to(dtype)), name
    # Kept rows of a pruned block, in whatever order they are.
    up = "model.layers.1.mlp.up_proj.weight"
    assert 0 < len(new[up]) < len(old[up])
    assert {tuple(row) for row in new[up].tolist()} <= {tuple(row) for row in old[up].tolist()}
    assert checks.stored_dtype(made.path) == kind


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "mixed"])
def test_a_checkpoint_has_its_models_type(
    stored: str, fast: bool, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``fast``: where bfloat16 is, it is what is computed in."""
    monkeypatch.setattr(loading, "_bfloat16_is_fast", lambda: fast)
    folder = model(tmp_path / "model", stored, vocab=400)
    computed = torch.bfloat16 if fast else torch.float32
    assert models.load(models.resolve(str(folder), tmp_path), "cpu").dtype == computed
    rates = [0.0, 0.3, 0.3]
    options: dict[str, Any] = {
        "model": str(folder),
        "calibration": text,
        "device": "cpu",
        "cache": tmp_path / "cache",
        "ffn_step": 8,
    }
    made = api.prune(tmp_path / "out", rates=rates, **options)
    kind = "float16" if stored == "mixed" else stored
    check(folder, made, kind)
    judged = judging.load(str(made.path), tmp_path / "cache", torch.device("cpu"), "auto", None)
    assert judged.dtype == computed, "a checkpoint is compared with its model in one type"
    size = sum(file.stat().st_size for file in made.path.glob("*.safetensors"))
    assert size < (folder / "model.safetensors").stat().st_size
    if stored == "float16" and fast:
        masked = formats.convert(made.path, tmp_path / "masked", "masked").path
        assert {tensor.dtype for tensor in load_file(masked / "model.safetensors").values()} == {torch.float16}
        (file,) = formats.convert(made.path, tmp_path / "gguf", "gguf").path.glob("*F16.gguf")
        assert {tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1} == {"F16"}
        asked = api.prune(tmp_path / "asked", rates=rates, **options, dtype="float32")
        assert {tensor.dtype for tensor in load_file(asked.path / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("family", ["gemma3_text", "opt", "phi3", "qwen3"])
def test_families_that_are_computed_in_less_than_they_have(
    family: str, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_bfloat16_is_fast", lambda: True)
    folder = tiny_model(tmp_path / "model", family)
    options: dict[str, Any] = {"calibration": text, "device": "cpu", "cache": tmp_path / "cache", "ffn_step": 8}
    made = api.prune(tmp_path / "out", rate=0.3, model=str(folder), **options)
    old, new = load_file(folder / "model.safetensors"), load_file(made.path / "model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    (name,) = (name for name in old if name.endswith("embed_tokens.weight"))
    assert torch.equal(new[name], old[name])


def test_numbers_that_float16_does_not_hold(tiny_llama: Path, tmp_path: Path) -> None:
    """A repair's may be larger than those they replace."""
    loaded = models.load(models.resolve(str(tiny_llama), tmp_path), "cpu", "float32")
    repaired = {"model.layers.0.mlp.down_proj.weight": torch.full((32, 64), 70_000.0)}
    shapes = shapes_of(loaded.model.config)
    wide = build(loaded.model, shapes, repaired, dtype=torch.bfloat16).state_dict()
    assert float(wide["model.layers.0.mlp.down_proj.weight"][0, 0]) == 70_144
    with pytest.raises(ExportError, match=r"down_proj\.weight has numbers that float16 cannot hold\. Ask for dtype bfloat16"):
        build(loaded.model, shapes, repaired, dtype=torch.float16)


@pytest.mark.parametrize(("compensation", "memory"), [("none", None), ("least_squares", None), ("none", "30MiB")])
def test_zeros_in_place(
    compensation: str, memory: str | None, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_bfloat16_is_fast", lambda: True)
    folder = model(tmp_path / "model", "float32", **(LARGE if memory else {}))
    options: dict[str, Any] = {"model": str(folder), "calibration": text, "device": "cpu", "cache": tmp_path / "cache"}
    options["memory"] = memory
    made = api.prune(tmp_path / "out", rate=0.5, pattern="n_m", criterion="wanda", compensation=compensation, **options)
    old, new = load_file(folder / "model.safetensors"), load_file(made.path / "model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    assert torch.equal(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"])
    W = new["model.layers.1.mlp.up_proj.weight"]
    assert int((W == 0).sum()) == W.numel() // 2
    if compensation == "none":
        assert torch.equal(W[W != 0], old["model.layers.1.mlp.up_proj.weight"][W != 0])


@pytest.mark.parametrize(("stored", "fast"), [("float32", True), ("float16", False)])
def test_a_streamed_model(stored: str, fast: bool, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_bfloat16_is_fast", lambda: fast)
    folder = model(tmp_path / "model", stored, tied=False, **LARGE)
    options: dict[str, Any] = {"model": str(folder), "calibration": text, "device": "cpu", "cache": tmp_path / "cache"}
    made = api.prune(tmp_path / "out", rates=[0.0] + [0.3] * 23, memory="30MiB", **options)
    assert made.verification["streamed"]
    check(folder, made, stored)


@pytest.mark.parametrize(("kind", "stored"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")])
def test_a_gguf_file_has_a_type_too(kind: str, stored: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    write_gguf(tmp_path / "tiny.gguf", folder, kind=kind)
    source = models.resolve(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert source.config["dtype"] == checks.stored_dtype(source.folder) == stored
    assert models.load(source, "cpu").written == getattr(torch, stored)
    name = "model.layers.0.mlp.up_proj.weight"
    made, dense = load_file(source.folder / "model.safetensors")[name], load_file(folder / "model.safetensors")[name]
    if kind != "Q8_0":
        assert torch.equal(made, dense.to(made.dtype))
    else:
        assert 0 < float((made.float() - dense).abs().max()) < 0.02


@pytest.mark.parametrize("said", ["torch.bfloat16", "float99", "auto", {"": "float16"}, 3, None])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_what_a_config_says_of_the_type_is_a_note(key: str, said: Any, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama", dtype="bfloat16")
    body = json.loads((folder / "config.json").read_text())
    del body["dtype"]
    (folder / "config.json").write_text(json.dumps(body | {key: said}))
    loaded = models.load(models.resolve(str(folder), tmp_path), "cpu")
    assert loaded.written == torch.bfloat16
    assert models.read_config(loaded.source).dtype == torch.bfloat16
    assert loaded.tokenizer("the")["input_ids"]
