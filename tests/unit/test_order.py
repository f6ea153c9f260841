"""The model's own channels in keep-first order: always the same function, whoever used the model before; factors live on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from selfpruner import compensation, criteria, models
from selfpruner.api import config_of
from selfpruner.architectures import describe
from selfpruner.architectures.order import channel_order, checkpoint_ffn, reorder_channels, restore_channels
from selfpruner.calibration.statistics import layer_statistics
from selfpruner.calibration.texts import TokenBatches
from selfpruner.config import SearchConfig
from selfpruner.errors import DiskFullError
from selfpruner.evaluation.engine import Engine
from selfpruner.export.build import build
from selfpruner.models import LoadedModel
from selfpruner.models.family_layouts import layout_of
from selfpruner.planning.space import Plan
from selfpruner.pruning.blocks import prepare_blocks
from selfpruner.pruning.patterns import PrunableFfn, measure_attention, measure_ffn, stored
from selfpruner.testing.prepared_models import ready
from selfpruner.testing.tiny_models import FAMILIES, load_tiny, rows_of, tokens_of
from tests.helpers.pruned import random_plans

FORMS: dict[str, dict[str, Any]] = {"llama": {"mlp_bias": True}, "qwen2": {"tied": False}}


def orders_of(layers: int, channels: int, seed: int) -> list[torch.Tensor]:
    return [torch.randperm(channels, generator=torch.Generator().manual_seed(seed + layer)) for layer in range(layers)]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_order_is_the_same_function(family: str) -> None:
    model = load_tiny(family, **FORMS.get(family, {}))
    arch, tokens = describe(model), tokens_of(2, 24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(tokens, use_cache=False).logits
    for seed in (1, 2):
        for layer, order in enumerate(orders_of(arch.layers, arch.channels, seed)):
            reorder_channels(arch, layer, order)
            place, rows = rows_of(model, "up")
            up = before[f"{layout_of(model.config).layer(layer)}.{place}.weight"][rows]
            assert arch.ffn(layer).up.equal(up[order])
            assert checkpoint_ffn(arch, layer).up.equal(up)
        found = model(tokens, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == before.keys(), "the order is no part of a checkpoint"
    restore_channels(describe(model))
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert channel_order(describe(model), 0) is None


def test_statistics_do_not_depend_on_the_order() -> None:
    model = load_tiny("llama")
    arch, tokens = describe(model), tokens_of(6, 16)
    first = list(layer_statistics(arch, tokens))
    for layer, order in enumerate(orders_of(arch.layers, arch.channels, 5)):
        reorder_channels(arch, layer, order)
    for one, other in zip(first, layer_statistics(arch, tokens), strict=True):
        for a, b in zip(one.values(), other.values(), strict=True):
            assert all(getattr(a, part).equal(getattr(b, part)) for part in ("mean", "variance", "energy", "gram"))


def test_two_criteria_share_one_model() -> None:
    """Whichever looks at the model next finds its own order, and the scores are those on a model of its own."""
    tokens = tokens_of(3, 16, seed=4)
    shared = load_tiny("qwen2")
    cases = {name: ready(shared, criterion=name) for name in ("obs", "flap")}
    alone = {name: ready(load_tiny("qwen2"), criterion=name) for name in cases}
    for name in ("obs", "flap", "obs"):
        plans = random_plans(alone[name].space, 4)
        scores, expected = cases[name].engine.evaluate(plans, tokens), alone[name].engine.evaluate(plans, tokens)
        assert [score.kl for score in scores] == [score.kl for score in expected]
    a, b = cases["obs"].blocks[1], cases["flap"].blocks[1]
    assert isinstance(a, PrunableFfn)
    assert isinstance(b, PrunableFfn)
    assert not a.order.equal(b.order)


# -- factors on disk -----------------------------------------------------------------------------------------------------
def loaded_from(folder: Path) -> LoadedModel:
    return models.load(models.resolve(str(folder), folder / "cache"), "cpu", "float32")


def config(**changes: Any) -> SearchConfig:
    return config_of({"rate": 0.2, "ffn_step": 8, **changes})


def prepared_blocks(loaded: LoadedModel, cache: Path, said: list[str], **changes: Any) -> list[Any]:
    text = TokenBatches(tokens_of(8, 16), (), "some tokens")
    arch = describe(loaded.model)
    return prepare_blocks(config(**changes), arch, loaded, text, cache, said.append, lambda: False)[0]


@pytest.mark.parametrize("method", compensation.COMPENSATIONS)
@pytest.mark.parametrize("criterion", ["obs", "flap"])
def test_factors_are_made_once(tiny_llama: Path, tmp_path: Path, criterion: str, method: str) -> None:
    loaded, said = loaded_from(tiny_llama), list[str]()
    how = {"criterion": criterion, "compensation": method}
    first = prepared_blocks(loaded, tmp_path, said, **how)
    assert any(text.startswith("statistics of") for text in said)
    shutil.rmtree(tmp_path / "statistics")
    said.clear()
    second = prepared_blocks(loaded_from(tiny_llama), tmp_path, said, **how)
    assert not (tmp_path / "statistics").exists()
    assert all(text.startswith("reading factors") for text in said)
    model = loaded_from(tiny_llama).model
    held = ready(model, criterion=criterion, method=method, calibration=tokens_of(8, 16), judged=True).blocks
    for one, other, memory in zip(first, second, held, strict=True):
        assert one.options == other.options
        assert [o.parameters for o in one.options] == [o.parameters for o in memory.options]
        for level in range(len(one.options)):
            a, b, c = (vars_of(block.weights(level)) for block in (one, other, memory))
            assert all(x.equal(y) for x, y in zip(a, b, strict=True))
            for x, y in zip(a, c, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def vars_of(weights: Any) -> list[torch.Tensor]:
    values = (getattr(weights, name) for name in weights.__dataclass_fields__)
    return [value for value in values if isinstance(value, torch.Tensor)]


def test_options_may_change_without_new_factors(tiny_llama: Path, tmp_path: Path) -> None:
    loaded, said = loaded_from(tiny_llama), list[str]()
    prepared_blocks(loaded, tmp_path, said)
    said.clear()
    for changes in ({"ffn_step": 16}, {"attention": "kv_group"}, {"attention": "none"}, {"drop_blocks": True}):
        prepared_blocks(loaded, tmp_path, said, **changes)
    assert all(text.startswith("reading factors") for text in said)
    prepared_blocks(loaded, tmp_path, said, criterion="magnitude")
    assert not all(text.startswith("reading factors") for text in said)


def test_the_models_files_stay_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    """Weights that are loaded may be mapped: putting them in order must not reach the file."""
    before = (tiny_llama / "model.safetensors").read_bytes()
    loaded = loaded_from(tiny_llama)
    blocks = prepared_blocks(loaded, tmp_path, [])
    arch = describe(loaded.model)
    assert channel_order(arch, 0) is not None
    Engine(arch, blocks).evaluate([Plan((0, 1) * 3)], tokens_of(1, 16))
    assert (tiny_llama / "model.safetensors").read_bytes() == before


def test_a_full_disk_leaves_no_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_tiny("llama")
    arch = describe(model)
    attention, ffn = next(iter(layer_statistics(arch, tokens_of(4, 16)))).values()
    how = criteria.create("obs"), compensation.create("least_squares")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "write_tensors", full)
    with pytest.raises(DiskFullError, match="Free some space"):
        stored.write_factors(
            tmp_path / "x" / "layer.safetensors", measure_attention(arch, 0, attention, *how), measure_ffn(arch, 0, ffn, *how), {}
        )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_build_shares_the_reordered_weights() -> None:
    """What is built on a reordered model computes what the model computes."""
    case = ready(load_tiny("llama"))
    tokens = tokens_of(2, 16)
    shapes = build_shapes(case)
    built = build(case.model, shapes, {})
    torch.testing.assert_close(built(tokens).logits, case.model(tokens).logits, rtol=1e-4, atol=1e-4)


def build_shapes(case: Any) -> list[Any]:
    from selfpruner.pruning.layer_shapes import LayerShape

    return [LayerShape(case.arch.kv_groups, case.arch.heads_per_group, case.arch.channels)] * case.arch.layers
