"""2:4 weights: what is one is found out by looking, and what cannot use them is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import selfpruner.testing.tiny_models as tiny
from selfpruner import api, load
from selfpruner.errors import FormatError
from selfpruner.export import proof, semi_structured
from selfpruner.export.semi_structured import convert, is_two_of_four

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= semi_structured.CAPABILITY


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns // 4, 4, generator=generator)
    gone = torch.rand(W.shape, generator=generator).argsort(-1)[..., :2]
    return W.scatter(-1, gone, 0.0).reshape(rows, columns).to(dtype)


def test_the_pattern_is_looked_at() -> None:
    W = two_of_four(8, 32)
    assert is_two_of_four(W)
    assert is_two_of_four(torch.zeros(4, 8))
    assert not is_two_of_four(W.T.contiguous()), "of four consecutive outputs is something else"
    assert not is_two_of_four(W.roll(1, 1)), "groups begin at multiples of four"
    assert not is_two_of_four(torch.zeros(4, 6))
    full = W.clone()
    group = full[5].view(-1, 4)[3]
    group[group == 0] = 1e-30
    assert not is_two_of_four(full)


def test_a_job_of_two_of_four_makes_such_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pattern n_m at half is what the helper looks for, from a real checkpoint; a search may leave blocks denser."""
    monkeypatch.setattr(proof, "prove", lambda *_: {"problems": []})
    tiny.tiny_model(tmp_path / "base", "llama", ffn=96)
    text = tmp_path / "text.txt"
    text.write_text(tiny.sample_text(3000))
    calibration = {"sources": [{"source": str(text)}], "sequences": 8, "length": 64}
    fields = {"model": str(tmp_path / "base"), "calibration": calibration, "device": "cpu", "dtype": "float32"}
    options = {"pattern": "n_m", "criterion": "wanda", "compensation": "none", "cache": tmp_path / "cache"}
    # By block, in thirds: one keeps three of four.
    api.prune(tmp_path / "checkpoint", levels=[2, 2, 2, 1, 2, 2], **options, **fields)
    model = load(tmp_path / "checkpoint")
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_two_of_four(module.weight)}
    every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name}
    assert every - found == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    with pytest.raises(FormatError, match="need an NVIDIA GPU, and the model is on cpu"):
        convert(model)


@pytest.mark.skipif(GPU, reason="for machines without such a GPU")
def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    layer.weight.data = two_of_four(32, 64, torch.bfloat16)
    before = layer.weight
    with pytest.raises(FormatError, match="on cpu"):
        convert(nn.Sequential(layer))
    assert layer.weight is before
    # No older GPU is here either: what the driver would say of one stands in.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(FormatError, match=r"capability 8\.0 or later, and cuda:0 has 7\.5"):
        semi_structured._check(torch.device("cuda:0"))


def test_other_dtypes_and_patterns_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "_check", lambda _: None)
    with pytest.raises(FormatError, match="the model's are float32"):
        convert(nn.Sequential(nn.Linear(64, 32)))
    odd = nn.Linear(60, 30, bias=False, dtype=torch.bfloat16)
    odd.weight.data = two_of_four(30, 60, torch.bfloat16)
    with pytest.raises(FormatError, match="at most two of every four"):
        convert(nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16), odd))


@pytest.mark.skipif(not GPU, reason="needs a GPU of compute capability 8.0 or later")
def test_products_are_the_dense_ones() -> None:
    for dtype in semi_structured.DTYPES:
        layer = nn.Linear(256, 128, dtype=dtype, device="cuda")
        layer.weight.data = two_of_four(128, 256, dtype).cuda()
        dense = nn.Linear(64, 64, dtype=dtype, device="cuda")
        model = nn.ModuleDict({"sparse": layer, "dense": dense})
        x = torch.randn(128, 256, dtype=dtype, device="cuda")
        with torch.inference_mode():
            expected = layer(x)
            assert convert(model) == ["sparse"]
            assert (layer(x) - expected).abs().max() <= 2e-2 * expected.abs().max()
