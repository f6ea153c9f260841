"""Gradients streamed layer by layer are those of the whole model's backward pass, sequence by sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfpruner.architectures import describe
from selfpruner.architectures.order import reorder_channels
from selfpruner.calibration import gradients
from selfpruner.calibration.cache import cached_gradients
from selfpruner.calibration.gradients import Gradients, layer_gradients
from selfpruner.errors import CancelledTaskError, ConfigError
from selfpruner.models.family_layouts import layout_of
from selfpruner.testing.tiny_models import FAMILIES, layers_of, load_tiny, rows_of, tokens_of


def by_autograd(model: Any, tokens: Tensor) -> list[dict[str, list[Tensor]]]:
    """Per layer and matrix the gradient of every sequence's mean loss, by transformers' own forward pass."""
    model.requires_grad_(True)
    layout = layout_of(model.config)
    places = {part: rows_of(model, part) for part in (*layout.attention, *layout.ffn)}
    found: list[dict[str, list[Tensor]]] = [{name: [] for name in places} for _ in layers_of(model)]
    for row in tokens:
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for layer, module in enumerate(layers_of(model)):
            for name, (place, rows) in places.items():
                found[layer][name].append(module.get_submodule(place).weight.grad[rows].clone())
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(gradients, "LOGIT_BYTES", 1)  # several pieces of the vocabulary's logits
    model, tokens = load_tiny(family), tokens_of(3, 24)
    found = dict(layer_gradients(describe(model), tokens))
    assert list(found) == list(reversed(range(model.config.num_hidden_layers)))
    for layer, expected in enumerate(by_autograd(model, tokens)):
        assert set(found[layer]) == set(expected)
        for name, sums in found[layer].items():
            g = torch.stack(expected[name])
            scale = float(g.abs().max())
            torch.testing.assert_close(sums.total, g.sum(0), rtol=1e-3, atol=1e-4 * scale)
            torch.testing.assert_close(sums.absolute, g.abs().sum(0), rtol=1e-3, atol=1e-4 * scale)
            torch.testing.assert_close(sums.squared, g.pow(2).sum(0), rtol=1e-3, atol=1e-4 * scale**2)
            torch.testing.assert_close(sums.mean * 3, sums.total)
            torch.testing.assert_close(sums.fisher * 3, sums.squared)


def test_streams_in_files_and_channels_in_another_order_change_nothing(tmp_path: Path) -> None:
    arch, tokens = describe(load_tiny("llama")), tokens_of(4, 16)
    plain = dict(layer_gradients(arch, tokens))
    for layer in range(arch.layers):
        reorder_channels(arch, layer, torch.arange(arch.channels).flip(0))
    filed = dict(layer_gradients(arch, tokens, memory=1024, scratch=tmp_path))
    assert not list(tmp_path.iterdir()), "the files are gone"
    for layer, found in plain.items():
        for name, sums in found.items():
            torch.testing.assert_close(sums.squared, filed[layer][name].squared, rtol=1e-3, atol=1e-6)


def test_half_precision_loses_no_small_gradient() -> None:
    """In float16 these underflow; they are taken in float32."""
    model, tokens = load_tiny("llama", dtype="float16"), tokens_of(2, 16)
    model.lm_head.weight.data *= 1e-3
    for _, found in layer_gradients(describe(model), tokens):
        assert all(float((sums.absolute == 0).float().mean()) < 0.01 for sums in found.values())


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    arch, tokens = describe(load_tiny("llama")), tokens_of(4, 16)
    said: list[str] = []
    first = cached_gradients(arch, tokens, tmp_path, "key", progress=said.append)
    assert said
    said.clear()
    again = cached_gradients(arch, tokens, tmp_path, "key", progress=said.append)
    assert not said
    exact = dict(layer_gradients(arch, tokens))
    for layer in range(arch.layers):
        for name, sums in first(layer).items():
            other: Gradients = again(layer)[name]
            assert (sums.sequences, other.sequences) == (4, 4)
            assert all(torch.equal(getattr(sums, part), getattr(other, part)) for part in ("total", "absolute", "squared"))
            torch.testing.assert_close(sums.absolute.float(), exact[layer][name].absolute, rtol=1e-2, atol=1e-6)


def test_cancelling_stops_between_layers() -> None:
    with pytest.raises(CancelledTaskError):
        list(layer_gradients(describe(load_tiny("llama")), tokens_of(2, 8), cancelled=lambda: True))


def test_weights_and_texts_without_gradients_are_refused() -> None:
    arch = describe(load_tiny("llama"))
    with pytest.raises(ConfigError, match="two tokens"):
        list(layer_gradients(arch, tokens_of(2, 1)))
    arch.dtype = torch.int8
    with pytest.raises(ConfigError, match="have no gradients"):
        list(layer_gradients(arch, tokens_of(2, 8)))


def test_a_frozen_model_has_gradients_and_stays_frozen() -> None:
    model = load_tiny("llama").requires_grad_(False)
    found = dict(layer_gradients(describe(model), tokens_of(2, 8)))
    assert all(float(sums.absolute.sum()) > 0 for layer in found.values() for sums in layer.values())
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
