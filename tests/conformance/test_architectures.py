"""What every model family must do: our own forward pass is the transformers one, in all the shapes the family comes in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from transformers import GPT2Config
from transformers.models.auto import AutoModelForCausalLM

from selfpruner.architectures import FAMILIES, describe
from selfpruner.errors import UnsupportedModelError
from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.models.family_layouts import LAYOUTS
from selfpruner.testing import ArchitectureSuite
from selfpruner.testing.architecture_suite import assert_equal_logits, forward
from selfpruner.testing.tiny_models import load_tiny, tokens_of

LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}


class TestLlama(ArchitectureSuite):
    family = "llama"
    extra: ClassVar = {
        "biases": {"attention_bias": True, "mlp_bias": True},
        "scaled rope": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    }


class TestMistral(ArchitectureSuite):
    family = "mistral"
    extra: ClassVar = {
        "window": {"sliding_window": 7},
        "window over the edge": {"sliding_window": 64},
        "window of one": {"sliding_window": 1},
    }


class TestQwen2(ArchitectureSuite):
    family = "qwen2"
    extra: ClassVar = {
        "window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        "window in some layers": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        "window switched off": {"use_sliding_window": False, "sliding_window": 7},
    }


class TestQwen3(ArchitectureSuite):
    family = "qwen3"
    extra: ClassVar = {
        "window in some layers": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        "biases": {"attention_bias": True},
    }


class TestOpt(ArchitectureSuite):
    family = "opt"
    shapes: ClassVar = {
        "plain": {},
        "untied": {"tied": False},
        "wide heads": {"heads": 2},
        "narrow heads": {"heads": 8},
        "without biases": {"enable_bias": False},
    }
    extra: ClassVar = {"gelu": {"activation_function": "gelu"}}
    heads = (4, 4, 1, 8)
    attention = (("self_attn",), ("self_attn_layer_norm",))
    ffn = (("fc1", "fc2"), ("final_layer_norm",))

    def test_positions_matter(self) -> None:
        """The same token twice has two embeddings, and the first position is the third row."""
        arch = describe(load_tiny("opt"))
        x = arch.embed(torch.full((1, 2), 7))
        table = arch.decoder.embed_positions.weight
        torch.testing.assert_close(x[0, 1] - x[0, 0], table[3] - table[2])
        assert float((x[0, 1] - x[0, 0]).abs().max()) > 0.1


class TestGemma2(ArchitectureSuite):
    family = "gemma2"
    extra: ClassVar = {
        "without caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "window over the edge": {"sliding_window": 64},
        "window of one": {"sliding_window": 1},
        "biases": {"attention_bias": True},
    }
    attention = (("self_attn",), ("input_layernorm", "post_attention_layernorm"))
    ffn = (("mlp",), ("pre_feedforward_layernorm", "post_feedforward_layernorm"))

    @pytest.mark.parametrize("length", [63, 64, 65, 200])
    def test_capped_attention_in_blocks(self, length: int) -> None:
        for window in (5, 70):
            assert_equal_logits(load_tiny(self.family, sliding_window=window), length)


class TestGemma3(ArchitectureSuite):
    family = "gemma3_text"
    extra: ClassVar = {
        "only windows": {"layer_types": ["sliding_attention"] * 3},
        "scaled rope where attention is full": {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            }
        },
        "a cap on logits": {"final_logit_softcapping": 5.0},
        "a cap on attention, which is not used": {"attn_logit_softcapping": 1.0},
    }
    attention = (("self_attn",), ("input_layernorm", "post_attention_layernorm"))
    ffn = (("mlp",), ("pre_feedforward_layernorm", "post_feedforward_layernorm"))


class TestPhi3(ArchitectureSuite):
    family = "phi3"
    extra: ClassVar = {
        "window": {"sliding_window": 7},
        "window over the edge": {"sliding_window": 64},
        "a part of the head turns": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "long rope, short text": {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 256},
        "long rope, long text": {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 24},
    }

    def test_a_long_text_stretches_the_table(self) -> None:
        """The cases above prove something only if length matters."""
        arch = describe(load_tiny(self.family, **self.extra["long rope, long text"]))
        assert float((arch.rope(40)[0][:24] - arch.rope(24)[0]).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_norms_after_a_block_come_and_go_with_it(family: str) -> None:
    arch = describe(load_tiny(family))
    x, rope = arch.embed(tokens_of(1, 16)), arch.rope(16)
    assert arch.attend(0, x, None, rope) is x
    assert arch.feed_forward(0, x, None) is x
    # What is added has the size that the norm gives it, whatever the output matrix's.
    for louder in (1.0, 100.0):
        w, f = arch.attention(0), arch.ffn(0)
        found = (
            arch.attention_update(0, x, replace(w, o=w.o * louder), rope),
            arch.ffn_update(0, x, replace(f, down=f.down * louder)),
        )
        for update, norm in zip(found, ("post_attention_layernorm", "post_feedforward_layernorm"), strict=True):
            scale = 1 + arch.decoder.layers[0].get_submodule(norm).weight
            torch.testing.assert_close((update / scale).pow(2).mean(-1), torch.ones(1, 16), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "encoder"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "encoder"),
        ("opt", {"do_layer_norm_before": False}, "opt-350m"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
        ("opt", {"_remove_final_layer_norm": True}, "final norm"),
        ("opt", {"layer_norm_elementwise_affine": False}, "no parameters"),
    ],
)
def test_forms_of_a_family_that_are_refused(family: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        describe(load_tiny(family, **options))
    assert caught.value.param == "model"


def test_every_family_has_its_suite() -> None:
    assert {suite.family for suite in ArchitectureSuite.__subclasses__()} == set(FAMILIES) == set(LAYOUTS) == set(MODELING_FILES)


def test_windows_matter() -> None:
    """The window cases above prove something only if a window changes the logits."""
    tokens = tokens_of(1, 40)
    model = load_tiny("mistral", sliding_window=7)
    windowed = forward(describe(model), tokens)
    model.config.sliding_window = None
    assert float((forward(describe(model), tokens) - windowed)[:, 7:].abs().max()) > 0.1


def test_other_families_are_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' are not supported. Supported: llama, mistral, qwen2, qwen3") as caught:
        describe(model)
    assert caught.value.param == "model"
