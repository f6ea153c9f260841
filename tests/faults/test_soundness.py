"""NaN and infinity, wherever they are in a model, end in an error that says what to do, whatever the search was to do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfpruner import api, catalogue, criteria
from selfpruner.config import SearchConfig
from selfpruner.errors import CalibrationError, ModelError
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import session_of
from selfpruner.testing.tiny_models import sample_text, tiny_model
from selfpruner.workers.tasks import PrepareRequest, PrepareResult


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(sample_text(3000))
    return file


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], None], **options: Any) -> Path:
    tiny_model(folder, "llama", **options)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_up(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan


def prepare(folder: Path, text: Path | str, cache: Path, **fields: Any) -> PrepareResult:
    source = {"sources": [{"source": str(text)}], "sequences": 4, "length": 32}
    body = {"model": str(folder), "rate": 0.2, "calibration": source, "dtype": "float32", "sparsity_step": 0.5, **fields}
    session = session_of(SearchConfig.model_validate(body), cache)
    return SessionHandler("cpu").handle(session, PrepareRequest(texts=("calibration",)), lambda _: None, lambda: False)


@pytest.mark.parametrize("pattern", catalogue.PATTERNS)
def test_every_criterion_and_compensation(pattern: str, text: Path, tmp_path: Path) -> None:
    folder = damaged(tmp_path / "model", in_up)
    known = [name for name in catalogue.CRITERIA if pattern in criteria.CRITERIA[name].patterns]
    assert len(known) > 3
    for criterion in known:
        with pytest.raises(CalibrationError, match="not finite on the calibration text"):
            prepare(folder, text, tmp_path / "cache", pattern=pattern, criterion=criterion)
    for compensation in catalogue.compensations_of(pattern):
        with pytest.raises(CalibrationError, match="not finite on the calibration text"):
            prepare(folder, text, tmp_path / "cache", pattern=pattern, criterion="magnitude", compensation=compensation)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            CalibrationError,
            r"inputs of down are not finite on the calibration text \(layer 1\)",
        ),
        ("model.layers.0.self_attn.o_proj.weight", CalibrationError, r"inputs of down .*\(layer 0\)"),
        ("model.layers.2.mlp.down_proj.weight", CalibrationError, r"outputs of down .*\(layer 2\)"),
        ("model.layers.1.input_layernorm.weight", CalibrationError, r"inputs of o .*\(layer 1\)"),
        ("model.embed_tokens.weight", CalibrationError, r"inputs of o .*\(layer 0\)"),
        ("model.norm.weight", ModelError, "not numbers"),
        ("lm_head.weight", ModelError, "not numbers"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_every_place(name: str, error: type[Exception], words: str, value: float, text: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[::3] = value

    folder = damaged(tmp_path / "model", change, tied=False)
    with pytest.raises(error, match=words) as caught:
        prepare(folder, text, tmp_path / "cache")
    assert f"{name} holds NaN or infinity" in str(caught.value)
    with pytest.raises(error, match="NaN or infinity"):
        prepare(folder, text, tmp_path / "cache", criterion="magnitude", compensation="none")


def test_a_model_whose_activations_overflow(text: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for layer in (0, 1):
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"] *= 2e4  # finite in float16, what they make is not

    folder = damaged(tmp_path / "model", change, dtype="float16")
    for fields in ({}, {"criterion": "wanda_sp", "compensation": "bias"}, {"pattern": "n_m", "criterion": "sparsegpt"}):
        with pytest.raises(CalibrationError, match=r"not finite .* Load the model in float32 or bfloat16"):
            prepare(folder, text, tmp_path / "cache", dtype="float16", **fields)
    assert prepare(folder, text, tmp_path / "cache").dtype == "float32"


def test_a_text_that_the_model_was_to_write(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"logits of the text .* not finite .*up_proj"):
        prepare(damaged(tmp_path / "model", in_up), "self", tmp_path / "cache")


def test_what_is_judged(text: Path, tmp_path: Path) -> None:
    folder = damaged(tmp_path / "model", in_up)
    with pytest.raises(ModelError, match=r"not numbers.*up_proj"):
        api.evaluate(folder, text=[str(text)], sequences=2, length=32, device="cpu", cache=tmp_path)


def test_what_cannot_be_factored(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else a factorisation stumbles over."""

    def fail(*_: Any, **__: Any) -> None:
        torch.linalg.cholesky(-torch.eye(2))

    monkeypatch.setattr("selfpruner.criteria.obs.eliminate_channels", fail)
    folder = tiny_model(tmp_path / "model", "llama")
    with pytest.raises(CalibrationError, match="cannot be factored"):
        prepare(folder, text, tmp_path / "cache")
