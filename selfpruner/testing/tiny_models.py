"""Tiny random models: complete Hugging Face folders of every supported family, made in milliseconds.

The weights are random but large enough (std 0.3) that layers, heads and tokens really matter: logits vary, and a wrong slice or
a forgotten bias is seen far above rounding. The tokenizer is a byte-level BPE over ASCII (other characters are dropped) that was
trained on :func:`sample_text`; it splits text like Qwen2's, because transformers gives that class to every qwen2 folder.
"""

from __future__ import annotations

import random
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from selfpruner.models.family_layouts import Widths, layout_of
from selfpruner.testing.device import DEVICE

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "opt": OPTConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "phi3": Phi3Config,
}
FAMILIES = tuple(CONFIGS)

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
# In the byte-level alphabet a space is written Ġ and a newline Ċ. The most needed come first: a small vocabulary cuts the rest.
ALPHABET = "Ġetaoinshrdlcumwfgypbvkjxqz.,Ċ" + string.ascii_uppercase + string.digits + "!?;:'\"-()[]{}<>#$%&*+/=@\\^_`|~"
WORDS = """
the of and to in is it that was for on are with as his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would other
into has more her two like him see time could no make than first been its who now people my made over did down only way
find use may water long little very after words called just where most know
""".split()  # noqa: SIM905
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_model(
    folder: Path,
    family: str,
    *,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    ffn: int = 64,
    vocab: int = 128,
    tied: bool = True,
    seed: int = 0,
    **overrides: object,
) -> Path:
    """Write a random model of ``family`` with tokenizer and generation config into ``folder`` and return the folder.

    OPT has neither ``kv_heads`` nor ``head_dim``: every query head has its own keys and values, and heads divide the hidden size.

    ``overrides`` are further config fields (``attention_bias=True``, ``rope_parameters=...``, ``dtype="bfloat16"``). Biases are
    non-zero and norms are not one wherever the family has them. Equal arguments write equal weights.
    """
    dtype = getattr(torch, str(overrides.pop("dtype", "float32")))
    shape: dict[str, object] = {"intermediate_size": ffn, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    caps = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0}
    kinds = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    own: dict[str, dict[str, Any]] = {
        "mistral": {**shape, "sliding_window": None},
        "opt": {"ffn_dim": ffn},
        # Published ones say head_dim only by hidden size and heads.
        "phi3": shape if head_dim * heads != hidden else {name: shape[name] for name in shape if name != "head_dim"},
        # Windows and caps that matter on short texts; a full and a sliding layer among the first two.
        "gemma2": {**shape, "sliding_window": 12, "query_pre_attn_scalar": 12, **caps},
        "gemma3_text": {**shape, "sliding_window": 12, "query_pre_attn_scalar": 12, "layer_types": kinds},
    }
    config = CONFIGS[family](
        **{
            "vocab_size": vocab,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 512,
            "tie_word_embeddings": tied,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **own.get(family, shape),
            **overrides,
        }
    )
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    model.to(dtype)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    tiny_tokenizer(vocab).save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int, std: float = 0.3) -> None:
    """Draw every parameter anew from ``seed``: matrices and biases from N(0, std), norms from 1 + N(0, std)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        parameter.copy_(1 + noise if "norm" in name else noise)


@cache
def tiny_tokenizer(vocab: int = 128) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of at most ``vocab`` tokens (at least 40), with eos, pad, unk and a chat template."""
    letters = vocab - len(SPECIAL)
    tokenizer = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=list(ALPHABET[:letters]),
        limit_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text(2000)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def sample_text(words: int, seed: int = 0) -> str:
    """English-like text of ``words`` words in sentences and paragraphs; each word has a few likely successors."""
    rng = random.Random(seed)
    successors = {word: random.Random(word).choices(WORDS, k=4) for word in WORDS}
    parts: list[str] = []
    word, start = rng.choice(WORDS), True
    for position in range(words):
        parts.append(word.capitalize() if start else word)
        start = rng.random() < 0.1 or position == words - 1
        parts.append((".\n\n" if rng.random() < 0.15 else ". ") if start else ", " if rng.random() < 0.05 else " ")
        word = rng.choice(successors[word]) if rng.random() < 0.9 else rng.choice(WORDS)
    return "".join(parts).strip()


def load_tiny(family: str, **options: Any) -> PreTrainedModel:
    """A random model of ``family``; options as for :func:`tiny_model`."""
    with tempfile.TemporaryDirectory() as folder:
        source = tiny_model(Path(folder), family, **options)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    model.train(False)
    nn.Module.to(model, DEVICE)
    return model.requires_grad_(False)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model, dense or pruned."""
    layers = model.get_submodule(f"{layout_of(model.config).decoder}.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def rows_of(model: PreTrainedModel, part: str) -> tuple[str, slice]:
    """The place of a part (``q``, ``down``) in a layer of a dense model, and its rows there."""
    layout = layout_of(model.config)
    widths, block = Widths.of(layout, model.config.to_dict()), int(part in layout.ffn)
    place = (layout.ffn if block else layout.attention)[part]
    start = 0
    for other in layout.places(block)[place]:
        if other == part:
            break
        start += widths.shape(other)[0]
    return place, slice(start, start + widths.shape(part)[0])


def outputs_of(model: PreTrainedModel, layer: int) -> tuple[nn.Linear, nn.Linear]:
    """The output matrices' modules of attention and FFN."""
    layout, block = layout_of(model.config), layers_of(model)[layer]
    attention, ffn = block.get_submodule(layout.attention["o"]), block.get_submodule(layout.ffn["down"])
    assert isinstance(attention, nn.Linear)
    assert isinstance(ffn, nn.Linear)
    return attention, ffn


def tokens_of(sequences: int, length: int, seed: int = 1, vocab: int = 128) -> Tensor:
    return torch.randint(4, vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))
