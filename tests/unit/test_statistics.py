"""Statistics streamed layer by layer are those of all inputs at once, and survive the disk unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfpruner import compensation, criteria
from selfpruner.architectures import describe
from selfpruner.architectures.order import restore_channels
from selfpruner.calibration import cache, statistics
from selfpruner.calibration.cache import cached_statistics
from selfpruner.calibration.statistics import SITES, Accumulator, BlockStatistics, Site, layer_statistics
from selfpruner.errors import CancelledTaskError, DiskFullError
from selfpruner.planning.space import ffn_widths
from selfpruner.testing.prepared_models import prepare_ffn
from selfpruner.testing.tiny_models import FAMILIES, load_tiny, tokens_of
from tests.helpers.pruned import inputs_of


def assert_describes(found: BlockStatistics, X: Tensor, tolerance: float = 1e-5) -> None:
    """``found`` are the statistics of X (sequences, length, n), float64."""
    rows = X.flatten(0, 1)
    assert (found.tokens, found.sequences) == (rows.shape[0], X.shape[0])
    near: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found.mean, rows.mean(0), **near)
    torch.testing.assert_close(found.variance, rows.var(0), **near)
    torch.testing.assert_close(found.energy, rows.pow(2).sum(0), **near)
    torch.testing.assert_close(found.gram, rows.T @ rows, rtol=tolerance, atol=tolerance * float(rows.pow(2).sum(0).max()))
    torch.testing.assert_close(found.norm, rows.norm(dim=0) / X.shape[0] ** 0.5, **near)


@pytest.mark.parametrize("tokens_per_step", [4096, 70, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_sees_what_the_model_sees(monkeypatch: pytest.MonkeyPatch, family: str, tokens_per_step: int) -> None:
    monkeypatch.setattr(statistics, "TOKENS_PER_STEP", tokens_per_step)
    model = load_tiny(family)
    tokens = tokens_of(7, 24)
    streamed = list(layer_statistics(describe(model), tokens))
    for stats, inputs in zip(streamed, inputs_of(model, tokens), strict=True):
        for found, X in zip(stats.values(), inputs, strict=True):
            assert_describes(found, X, 1e-4)


@pytest.mark.parametrize("split", [1, 3, 16])
def test_batches_add_up(split: int) -> None:
    X = torch.randn(16, 10, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    accumulator = Accumulator(5, torch.device("cpu"))
    for part in X.split(split):
        accumulator.add(part)
    assert_describes(accumulator.finish(), X.double())


@pytest.mark.parametrize("tokens_per_step", [4096, 70, 1])
def test_every_fourth_sequence_judges(monkeypatch: pytest.MonkeyPatch, tokens_per_step: int) -> None:
    monkeypatch.setattr(statistics, "TOKENS_PER_STEP", tokens_per_step)
    model = load_tiny("llama")
    tokens = tokens_of(9, 24)
    judging = [3, 7]
    streamed = list(layer_statistics(describe(model), tokens))
    for stats, inputs in zip(streamed, inputs_of(model, tokens), strict=True):
        for found, X in zip(stats.values(), inputs, strict=True):
            assert found.judge is not None
            others = [sequence for sequence in range(9) if sequence not in judging]
            for moments, sequences in ((found.judge, judging), (found.without_judge(), others)):
                rows = X[sequences].flatten(0, 1)
                centred = rows - rows.mean(0)
                assert moments.tokens == len(rows)
                torch.testing.assert_close(moments.mean.double(), rows.mean(0), rtol=1e-4, atol=1e-4)
                scale = float(centred.pow(2).sum(0).max())
                torch.testing.assert_close(moments.scatter.double(), centred.T @ centred, rtol=1e-3, atol=1e-4 * scale)
    few = next(iter(layer_statistics(describe(model), tokens[:3])))
    assert all(found.judge is None for found in few.values())


def test_a_large_mean_costs_the_variance_no_digits() -> None:
    """The textbook formula E[x^2] - E[x]^2 in float32 has no correct digit here."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(64, 100, 6, generator=g) * torch.tensor([1e-2, 0.1, 1, 1, 1, 10.0]) + torch.tensor(
        [1e3, 1e4, 1e4, 0, -5e3, 1e5]
    )
    accumulator = Accumulator(6, torch.device("cpu"))
    for part in X.split(8):
        accumulator.add(part)
    found = accumulator.finish()
    rows = X.double().flatten(0, 1)
    torch.testing.assert_close(found.variance, rows.var(0), rtol=1e-4, atol=0)
    scatter = found.gram - found.tokens * torch.outer(found.mean, found.mean)
    centred = rows - rows.mean(0)
    scale = torch.outer(rows.std(0), rows.std(0)) * found.tokens
    assert float(((scatter - centred.T @ centred) / scale).abs().max()) <= 1e-3


def test_products_of_bfloat16_keep_what_a_huge_first_token_would_drown() -> None:
    g = torch.Generator().manual_seed(0)
    usual = torch.randn(32, 128, 24, generator=g) @ torch.randn(24, 48, generator=g) + 5 * torch.randn(48, generator=g)
    X = usual.clone()
    X[:, 0] *= 300
    X = X.bfloat16()
    accumulator = Accumulator(48, torch.device("cpu"))
    for part in X.split(8):
        accumulator.add(part)
    found, rows = accumulator.finish(), X.double().flatten(0, 1)
    centred = rows - rows.mean(0)
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.variance, rows.var(0), rtol=1e-4, atol=0)
    spread = usual[:, 1:].flatten(0, 1).double().std(0)
    off = (found.scatter - centred.T @ centred) / torch.outer(spread, spread) / found.tokens
    off.diagonal().zero_()
    assert float(off.abs().max()) <= 0.01
    assert float(off.square().mean().sqrt()) <= 2e-3


def test_one_token_has_no_variance() -> None:
    accumulator = Accumulator(2, torch.device("cpu"))
    accumulator.add(torch.tensor([[[3.0, -1.0]]]))
    assert accumulator.finish().variance.tolist() == [0, 0]


def test_cancelling_stops_between_layers() -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == 2

    pairs = layer_statistics(describe(load_tiny("llama")), tokens_of(2, 16), cancelled=cancelled)
    next(pairs)
    with pytest.raises(CancelledTaskError):
        next(pairs)


# -- the cache ---------------------------------------------------------------------------------------------------------
def equal(a: list[dict[Site, BlockStatistics]], b: list[dict[Site, BlockStatistics]]) -> bool:
    assert [list(stats) for stats in a] == [list(stats) for stats in b]
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p.values(), q.values(), strict=True)]
    same = [getattr(x, name).equal(getattr(y, name)) for x, y in pairs for name in ("mean", "variance", "energy", "gram")]
    judges = [(x.judge, y.judge) for x, y in pairs]
    assert all((x is None) == (y is None) for x, y in judges)
    same += [x.mean.equal(y.mean) and x.scatter.equal(y.scatter) for x, y in judges if x is not None and y is not None]
    return all(same) and all((x.tokens, x.sequences) == (y.tokens, y.sequences) for x, y in pairs)


def orders(layers: list[dict[Site, BlockStatistics]], model: Any) -> list[Any]:
    """Everything plans are made of: channel orders and option errors."""
    arch = describe(model)
    found: list[Any] = []
    for layer, stats in enumerate(layers):
        how = criteria.create("obs"), compensation.create("least_squares")
        block = prepare_ffn(arch, layer, stats["ffn"], *how, ffn_widths(arch.channels, 8))
        found.append((block.order.tolist(), [option.error for option in block.options]))
    restore_channels(arch)
    return found


def test_what_is_read_back_is_what_was_computed(tmp_path: Path) -> None:
    model = load_tiny("llama")
    arch, tokens = describe(model), tokens_of(8, 32)
    said: list[str] = []
    first = list(cached_statistics(arch, tokens, tmp_path, "key", progress=said.append))
    assert said[0].startswith("statistics of layer")
    said.clear()
    second = list(cached_statistics(arch, tokens, tmp_path, "key", progress=said.append))
    assert said == [f"reading statistics of layer {n}/3" for n in (1, 2, 3)]
    assert equal(first, second)
    assert orders(first, model) == orders(second, model)
    for stats, inputs in zip(first, inputs_of(model, tokens), strict=True):
        for found, X in zip(stats.values(), inputs, strict=True):
            assert_describes(found, X, 1e-4)


def test_inputs_of_all_matrices_and_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    model = load_tiny("qwen3")
    arch, tokens = describe(model), tokens_of(6, 32)
    outputs = list(cached_statistics(arch, tokens, tmp_path, "key"))
    (place,) = tmp_path.iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in place.iterdir()}
    every = list(cached_statistics(arch, tokens, tmp_path, "key", SITES))
    assert {name: (place / name).stat().st_mtime_ns for name in before} == before
    assert all(set(stats) == set(SITES) for stats in every)
    assert equal(outputs, [{site: stats[site] for site in outputs[0]} for stats in every])
    said: list[str] = []
    again = list(cached_statistics(arch, tokens, tmp_path, "key", SITES, progress=said.append))
    assert all(text.startswith("reading") for text in said)
    assert equal(every, again)
    seen: dict[str, list[Tensor]] = {"q_proj": [], "gate_proj": []}

    def hook(name: str) -> Any:
        return lambda _, inputs: seen[name].append(inputs[0].detach().double())

    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(hook("q_proj"))
        layer.mlp.gate_proj.register_forward_pre_hook(hook("gate_proj"))
    with torch.no_grad():
        model(tokens)
    for layer, stats in enumerate(every):
        assert_describes(stats["qkv"], seen["q_proj"][layer], 1e-4)
        assert_describes(stats["gate_up"], seen["gate_proj"][layer], 1e-4)


def test_other_texts_models_and_dtypes_are_kept_apart(tmp_path: Path) -> None:
    tokens = tokens_of(4, 32)
    model = load_tiny("llama")
    first = list(cached_statistics(describe(model), tokens, tmp_path, "a"))
    assert not equal(first, list(cached_statistics(describe(model), tokens_of(4, 32, seed=5), tmp_path, "b")))
    list(cached_statistics(describe(load_tiny("llama", dtype="bfloat16")), tokens, tmp_path, "a"))
    assert len(list(tmp_path.iterdir())) == 3


def test_an_interrupted_run_starts_over(tmp_path: Path) -> None:
    arch, tokens = describe(load_tiny("llama")), tokens_of(4, 32)
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(CancelledTaskError):
        list(cached_statistics(arch, tokens, tmp_path, "key", cancelled=cancelled))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    said: list[str] = []
    again = list(cached_statistics(arch, tokens, tmp_path, "key", progress=said.append))
    assert not any(text.startswith("reading") for text in said)
    assert equal(again, list(cached_statistics(arch, tokens, tmp_path, "key")))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write: Callable[..., None] = cache.save_file

    def full(tensors: Any, path: Path, **rest: Any) -> None:
        write(tensors, path, **rest)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(DiskFullError, match="Free some space"):
        list(cached_statistics(describe(load_tiny("llama")), tokens_of(2, 16), tmp_path, "key"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
