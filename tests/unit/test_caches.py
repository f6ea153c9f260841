"""Every cache of transformers with a model whose first attention was dropped: lengths, shapes, beams, and who may fill one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, QuantizedLayer, StaticCache

from selfpruner.export.build import shapes_of
from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.testing.cut_models import Case, folder, prune
from selfpruner.testing.tiny_models import tokens_of
from tests.helpers.exports import greedy

FAMILIES = ("llama", *(family for family, form in MODELING_FILES.items() if form is not MODELING_FILES["llama"]))
LENGTH = 10


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return prune(folder(tmp_path_factory.mktemp(request.param), request.param)[1], drop=True, biased=True)


class Grouped(QuantizedLayer):
    """A quantized layer as quanto's and HQQ's: it takes whole groups only, and soon moves what it has into its own form."""

    def __init__(self) -> None:
        super().__init__(q_group_size=4, residual_length=3)

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:  # noqa: ARG002
        assert tensor.numel() % self.q_group_size == 0
        return tensor.clone()

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


def caches(model: Any) -> dict[str, Any]:
    return {
        "dynamic": DynamicCache(config=model.config),
        "without a config": DynamicCache(),
        "static": StaticCache(config=model.config, max_cache_len=64),
        "quantized": Cache(layers=[Grouped() for _ in model.get_decoder().layers]),
    }


@pytest.mark.parametrize("kind", ["dynamic", "without a config", "static", "quantized"])
@torch.inference_mode()
def test_a_cache_has_the_length_and_the_heads_of_every_layer(case: Case, kind: str) -> None:
    cache, tokens = caches(case.pruned)[kind], tokens_of(2, LENGTH + 4)
    expected = case.pruned(tokens, use_cache=False).logits
    found = [case.pruned(tokens[:, :LENGTH], past_key_values=cache).logits]
    assert [cache.get_seq_length(layer) for layer in range(3)] == [LENGTH] * 3
    for position in range(LENGTH, LENGTH + 4):
        found.append(case.pruned(tokens[:, position : position + 1], past_key_values=cache).logits)
    assert (torch.cat(found, 1) - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert [cache.get_seq_length(layer) for layer in range(3)] == [LENGTH + 4] * 3
    if kind != "quantized":
        # A dropped attention keeps one number per token, so that the length can be read from any layer.
        shapes = [(shape.kv_groups, 8) if shape.kv_groups else (1, 1) for shape in shapes_of(case.pruned.config)]
        assert [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers] == shapes


@torch.inference_mode()
def test_a_static_cache_that_was_sized_in_advance(case: Case) -> None:
    cache, tokens = caches(case.pruned)["static"], tokens_of(2, LENGTH)
    shapes = shapes_of(case.pruned.config)
    cache.early_initialization(2, [shape.kv_groups for shape in shapes], 8, torch.float32, torch.device("cpu"))
    expected = case.pruned(tokens, use_cache=False).logits
    assert (case.pruned(tokens, past_key_values=cache).logits - expected).abs().max() <= 1e-4 * float(expected.abs().max())
    assert cache.get_seq_length() == LENGTH


@torch.inference_mode()
def test_a_cache_is_cropped_reordered_and_repeated(case: Case) -> None:
    tokens = tokens_of(2, LENGTH)
    expected = case.pruned(tokens.flip(0).repeat_interleave(2, 0), use_cache=False).logits[:, -2:]
    cache = caches(case.pruned)["dynamic"]
    case.pruned(tokens, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.crop(-2)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [LENGTH - 2] * 3
    cache.batch_select_indices(torch.arange(4))
    found = case.pruned(tokens.flip(0).repeat_interleave(2, 0)[:, -2:], past_key_values=cache).logits
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    cache.reset()
    assert cache.get_seq_length() == 0


@torch.inference_mode()
def test_beams_are_the_same_in_every_cache(case: Case) -> None:
    tokens, beams = tokens_of(2, LENGTH), {"num_beams": 3, "early_stopping": False}
    expected = greedy(case.pruned, tokens, use_cache=False, **beams)
    for how in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert greedy(case.pruned, tokens, **beams, **how) == expected
    expected = greedy(case.pruned, tokens, use_cache=False)
    assert greedy(case.pruned, tokens, past_key_values=caches(case.pruned)["quantized"]) == expected
    # transformers has no quantized cache for sliding windows.
    if "sliding_attention" not in (getattr(case.pruned.config, "layer_types", None) or ()):
        rounded = greedy(case.pruned, tokens, cache_implementation="quantized", cache_config={"backend": "fp8"}, **beams)
        assert [len(row) for row in rounded] == [8, 8]


@torch.inference_mode()
def test_attention_weights_have_the_index_of_their_layer(case: Case) -> None:
    tokens = tokens_of(2, LENGTH)
    used = case.pruned.config._attn_implementation
    try:
        case.pruned.set_attn_implementation("eager")
        found = case.pruned(tokens, output_attentions=True, output_hidden_states=True)
        heads = [None if attention is None else attention.shape[1] for attention in found.attentions]
        assert heads == [shape.heads or None for shape in shapes_of(case.pruned.config)]
        assert heads[0] is None
        assert len(found.hidden_states) == 4
        if case.pruned._supports_sdpa:
            case.pruned.set_attn_implementation("sdpa")
            assert not case.pruned(tokens, output_attentions=True).attentions, "no weights at all, not those of dropped layers"
    finally:
        case.pruned.set_attn_implementation(used)


def prefixed(model: Any, heads: int) -> PeftModel:
    # The families' own width of a head; peft takes it for the hidden size over the heads.
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_attention_heads=heads, token_dim=8 * heads)
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_prefix_that_is_alike_in_all_layers_is_refused(tmp_path: Path) -> None:
    for family in FAMILIES:
        for drop in (False, True):
            pruned = prune(folder(tmp_path / f"{family}{drop}", family)[1], drop=drop, biased=True).pruned
            if family == "gemma2" and not drop:
                continue  # peft itself fits a Gemma 2's prefix to each layer
            with pytest.raises(ValueError, match=r"for layer \d it has another number of KV heads.*use LoRA or prompt tuning"):
                prefixed(pruned, 2)(tokens_of(2, LENGTH))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_prefix_that_fits_is_learnt(tmp_path: Path) -> None:
    pruned = prune(folder(tmp_path, "llama", kv_heads=1)[1], drop=True, biased=True).pruned
    model = prefixed(pruned, 1)
    tokens = tokens_of(2, LENGTH)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    weight = model.prompt_encoder["default"].embedding.weight
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0
