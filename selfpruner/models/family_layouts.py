"""Where a family's checkpoints keep what pruning touches: tensor names, what a configuration means, and what it may not say.

A block's matrices are known by their parts: ``q``, ``k``, ``v``, ``o`` and ``gate``, ``up``, ``down``, the output matrix last. An
FFN without a gate has only ``up`` and ``down``. Parts at one place are one matrix with their rows one after another. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from selfpruner.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What a configuration may not say, with what to do about it: true where it says so.
Refusals = Mapping[str, Callable[[Mapping[str, object]], bool]]


@dataclass(frozen=True, slots=True)
class Layout:
    """Places are module names within a layer. ``decoder`` is the module that has embeddings, layers and the final norm.

    The norms are those that come and go with their block. ``norm_vectors``: 1 for a scale, 2 for a scale and a shift.
    ``positions`` are learned ones, with ``positions_before`` rows before the first. ``defaults`` are what transformers takes for
    keys that a configuration leaves out. ``published_code`` are classes in ``auto_map`` that the family's own models name beside
    transformers' equal ones: they are not run, and no reason to refuse.
    """

    attention: Mapping[str, str]
    ffn: Mapping[str, str]
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    ffn_norms: tuple[str, ...] = ("post_attention_layernorm",)
    final_norm: str = "norm"
    norm_vectors: int = 1
    qk_norm: bool = False
    decoder: str = "model"
    positions: str | None = None
    positions_before: int = 0
    channels_key: str = "intermediate_size"
    activation_key: str = "hidden_act"
    defaults: Mapping[str, bool | int] = field(default_factory=dict)
    refuses: Refusals = field(default_factory=dict)
    published_code: frozenset[str] = frozenset()

    def layer(self, index: int) -> str:
        return f"{self.decoder}.layers.{index}"

    def places(self, block: int) -> dict[str, list[str]]:
        """The parts at every place of attention (block 0) or FFN (block 1), in order."""
        parts_of: dict[str, list[str]] = {}
        for part, place in (self.ffn if block else self.attention).items():
            parts_of.setdefault(place, []).append(part)
        return parts_of

    def block_of(self, name: str) -> tuple[int, int] | None:
        """(layer, block) of the matrix or bias that a tensor's name is of; None for any other tensor."""
        prefix = f"{self.decoder}.layers."
        if not name.startswith(prefix):
            return None
        layer, _, local = name.removeprefix(prefix).partition(".")
        module = local.rpartition(".")[0]
        if module in self.attention.values():
            return int(layer), 0
        return (int(layer), 1) if module in self.ffn.values() else None

    def complete(self, config: Mapping[str, object]) -> dict[str, object]:
        """``config`` with the defaults of what it leaves out."""
        return {**self.defaults, **{key: value for key, value in config.items() if value is not None}}

    def refusal(self, config: Mapping[str, object]) -> str | None:
        """Why a model of this configuration cannot be worked on, and what to do; None where it can."""
        return next((why for why, says in self.refuses.items() if says(config)), None)


@dataclass(frozen=True, slots=True)
class Widths:
    """The widths of a model's parts, from its configuration."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int

    @classmethod
    def of(cls, layout: Layout, config: Mapping[str, object]) -> Widths:
        """Raises ModelError as :func:`whole_number`."""
        config = layout.complete(config)
        hidden, heads = whole_number(config, "hidden_size"), whole_number(config, "num_attention_heads")
        kv_heads = whole_number(config, "num_key_value_heads", heads)
        head_dim = whole_number(config, "head_dim", hidden // heads)
        return cls(hidden, heads, kv_heads, head_dim, whole_number(config, layout.channels_key))

    def shape(self, part: str) -> tuple[int, int]:
        """(out, in) of a part's matrix."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = {"q": queries, "k": keys, "v": keys, "gate": self.channels, "up": self.channels}
        columns = {"o": queries, "down": self.channels}
        return rows.get(part, self.hidden), columns.get(part, self.hidden)

    def shapes(self, layout: Layout) -> Iterator[tuple[str, tuple[int, int]]]:
        """(place, (out, in)) of every matrix of a layer."""
        for block in (0, 1):
            for place, parts in layout.places(block).items():
                each: Sequence[tuple[int, int]] = [self.shape(part) for part in parts]
                yield place, (sum(out for out, _ in each), each[0][1])


_ATTENTION = {part: f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")}
_BIDIRECTIONAL: Refusals = {
    "It is an encoder that attends in both directions (use_bidirectional_attention). Use a model that generates "
    "text.": lambda config: bool(config.get("use_bidirectional_attention")),
}
_GATED = {part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}

_GEMMA2 = Layout(
    _ATTENTION,
    _GATED,
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    activation_key="hidden_activation",
    defaults={"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4},
    refuses=_BIDIRECTIONAL,
)

LAYOUTS: Mapping[str, Layout] = {
    "llama": Layout(_ATTENTION, _GATED),
    "mistral": Layout(_ATTENTION, _GATED, defaults={"num_key_value_heads": 8}),
    "qwen2": Layout(_ATTENTION, _GATED),
    "qwen3": Layout(_ATTENTION, _GATED, qk_norm=True, defaults={"head_dim": 128}),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, qk_norm=True),
    "phi3": Layout(
        {**dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"), "o": "self_attn.o_proj"},
        {**dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"), "down": "mlp.down_proj"},
        published_code=frozenset(("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM")),
    ),
    "opt": Layout(
        {**_ATTENTION, "o": "self_attn.out_proj"},
        {"up": "fc1", "down": "fc2"},
        attention_norms=("self_attn_layer_norm",),
        ffn_norms=("final_layer_norm",),
        final_norm="final_layer_norm",
        norm_vectors=2,
        decoder="model.decoder",
        positions="embed_positions",
        positions_before=2,
        channels_key="ffn_dim",
        activation_key="activation_function",
        defaults={"tie_word_embeddings": True},
        refuses={
            "Its norms come after the blocks (do_layer_norm_before is false, as in opt-350m), which is not supported. Use another "
            "size of OPT.": lambda config: config.get("do_layer_norm_before") is False,
            "Its embeddings are narrower than its layers (word_embed_proj_dim, as in opt-350m), which is not supported. Use "
            "another size of OPT.": lambda config: config.get("word_embed_proj_dim") not in (None, config.get("hidden_size")),
            "It has no final norm (_remove_final_layer_norm), which is not supported. Save it anew with a current version of "
            "transformers.": lambda config: bool(config.get("_remove_final_layer_norm")),
            "Its norms have no parameters (layer_norm_elementwise_affine is false), which is not supported. Use another "
            "model.": lambda config: config.get("layer_norm_elementwise_affine") is False,
        },
    ),
}


def whole_number(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    """What a configuration says of ``key``, or ``default``. Raises ModelError for what is no whole number."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(
            f"The model's config.json says {key} = {value!r}; a whole number is needed. Download the model again.", param="model"
        )
    return value


def family_of(config: PreTrainedConfig) -> str:
    """The family of a loaded model's configuration, dense or pruned by selfpruner."""
    return str(getattr(config, "base_model_type", config.model_type))


def layout_of(config: PreTrainedConfig) -> Layout:
    return LAYOUTS[family_of(config)]
