"""What every model family must do: our own forward pass is the transformers one, in all the shapes the family comes in."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner.architectures import FAMILIES, Architecture, FfnWeights, describe
from selfpruner.architectures.cost import attention_cost, decoder_parameters, ffn_cost, model_parameters
from selfpruner.architectures.decoding import Decoding
from selfpruner.testing.device_suite import DeviceSuite
from selfpruner.testing.prepared_models import ready
from selfpruner.testing.tiny_models import layers_of, load_tiny, tokens_of

Shapes = dict[str, dict[str, object]]
SHAPES: Shapes = {
    "mha": {"kv_heads": 4},
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "untied": {"kv_heads": 2, "tied": False},
    "wide heads": {"kv_heads": 2, "head_dim": 16},
    "narrow heads": {"kv_heads": 2, "head_dim": 4},
}


def forward(arch: Architecture, tokens: Tensor) -> Tensor:
    """Logits by the architecture's own functions."""
    with torch.no_grad():
        x, rope = arch.embed(tokens), arch.rope(tokens.shape[1])
        for layer in range(arch.layers):
            x = arch.attend(layer, x, arch.attention(layer), rope)
            x = arch.feed_forward(layer, x, arch.ffn(layer))
        return arch.logits(arch.final_norm(x)).float()


def one_by_one(arch: Architecture, tokens: Tensor) -> Tensor:
    """The same with a token at a time and the keys and values of those before it."""
    decoding = Decoding(arch, *tokens.shape)
    with torch.no_grad():
        return torch.stack([decoding.logits(column).float() for column in tokens.T], 1)


def parameters(model: PreTrainedModel, *modules: tuple[str, ...]) -> int:
    """Of the named modules of a layer."""
    layer = layers_of(model)[0]
    return sum(p.numel() for names in modules for name in names for p in layer.get_submodule(name).parameters())


def assert_equal_logits(model: PreTrainedModel, length: int = 40) -> None:
    tokens = tokens_of(2, length)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    found = forward(describe(model), tokens)
    assert float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


class ArchitectureSuite(DeviceSuite):
    """Subclass it with ``family`` and the ``extra`` shapes that only this family has. ``heads``: query heads, KV groups, heads per
    group and head_dim of the tiny model. ``attention`` and ``ffn``: the modules of a block, and its norms."""

    family: ClassVar[str]
    shapes: ClassVar[Shapes] = SHAPES
    extra: ClassVar[Shapes] = {}
    heads: ClassVar[tuple[int, ...]] = (4, 2, 2, 8)
    attention: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("self_attn",), ("input_layernorm",))
    ffn: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("mlp",), ("post_attention_layernorm",))

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        if "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", cls.shapes)

    def test_is_registered(self) -> None:
        arch = describe(load_tiny(self.family))
        assert type(arch) is FAMILIES[self.family]
        assert (arch.layers, arch.hidden, arch.channels) == (3, 32, 64)
        assert (arch.heads, arch.kv_groups, arch.heads_per_group, arch.head_dim) == self.heads

    def test_logits_are_those_of_transformers(self, shape: str) -> None:
        assert_equal_logits(load_tiny(self.family, **self.shapes[shape]))

    def test_token_by_token_the_logits_are_the_same(self) -> None:
        for options in (*self.shapes.values(), *self.extra.values()):
            arch, tokens = describe(load_tiny(self.family, **options)), tokens_of(3, 40)
            expected = forward(arch, tokens)
            assert float((one_by_one(arch, tokens) - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))

    def test_logits_of_the_familys_own_forms(self) -> None:
        for options in self.extra.values():
            assert_equal_logits(load_tiny(self.family, **options))

    def test_costs_are_the_parameters_there_are(self, shape: str) -> None:
        model = load_tiny(self.family, **self.shapes[shape])
        arch = describe(model)
        assert attention_cost(arch, arch.kv_groups, arch.heads_per_group) == parameters(model, *self.attention)
        assert ffn_cost(arch, arch.channels) == parameters(model, *self.ffn)
        assert decoder_parameters(arch) == sum(p.numel() for p in layers_of(model).parameters())
        assert arch.layers * (parameters(model, *self.attention) + parameters(model, *self.ffn)) == decoder_parameters(arch)
        assert model_parameters(arch) == model.num_parameters()
        assert attention_cost(arch, 0, 0) == ffn_cost(arch, 0) == 0

    def test_fewer_units_cost_what_their_tensors_have(self) -> None:
        case = ready(load_tiny(self.family), method="none")
        for index, block in enumerate(case.blocks):
            for level, option in enumerate(block.options):
                weights = case.engine.weights(index, level)
                assert weights is not None
                tensors = [getattr(weights, name + end) for name in weights.matrices for end in ("", "_bias")]
                norms = parameters(case.model, (self.ffn if index % 2 else self.attention)[1])
                norms += 0 if isinstance(weights, FfnWeights) or weights.q_norm is None else 2 * case.arch.head_dim
                assert sum(t.numel() for t in tensors if t is not None) + norms == option.parameters

    def test_bfloat16_follows_transformers(self) -> None:
        model = load_tiny(self.family, dtype="bfloat16")
        assert model.dtype == torch.bfloat16
        tokens = tokens_of(2, 24)
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits.float()
        found = forward(describe(model), tokens)
        # The residual stream is float32 here and bfloat16 there.
        assert float((found - expected).abs().mean()) <= 0.05 * float(expected.abs().mean())
