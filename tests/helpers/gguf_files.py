"""GGUF files: exports of cut models, tokenizers of every kind, and dense models as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto import AutoTokenizer

import selfpruner.testing.tiny_models as tiny
from selfpruner.export import checkpoint, proof, verify_gguf
from selfpruner.export.base import FinishedCheckpoint
from selfpruner.export.build import build
from selfpruner.export.gguf import Gguf
from selfpruner.pruning.layer_shapes import LayerShape
from selfpruner.testing.cut_models import CARD, Case, folder, prune
from selfpruner.testing.tiny_models import CHAT_TEMPLATE


@dataclass(frozen=True)
class Made:
    """A checkpoint, the GGUF file made from it, and the reference that it has to meet."""

    case: Case
    checkpoint: FinishedCheckpoint
    folder: Path
    reference: Path

    @property
    def file(self) -> Path:
        (path,) = self.folder.glob("*.gguf")
        return path

    @property
    def keys(self) -> dict[str, Any]:
        return {name: field.contents() for name, field in GGUFReader(self.file).fields.items()}

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(type, shape as torch has it) by name."""
        return {t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape))) for t in GGUFReader(self.file).tensors}

    def verify(self) -> dict[str, Any]:
        return verify_gguf.verify(self.folder, str(self.reference), "cpu")


def checkpoint_of(path: Path, case: Case, source: Path) -> FinishedCheckpoint:
    """The finished checkpoint of ``case``, without the fresh process that looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "prove", lambda *_: {"problems": []})
        checkpoint.write(case.pruned, AutoTokenizer.from_pretrained(source), source, path, CARD)
    return FinishedCheckpoint.open(path)


def export(path: Path, case: Case, source: Path, quantize: str | None = None) -> Made:
    """What the format writes for ``case``, and the reference that the checkpoint kept."""
    made = checkpoint_of(path / "checkpoint", case, source)
    form, out = Gguf(), path / "gguf"
    form.check(made, quantize)
    out.mkdir()
    proof.copy_reference(made.folder, out, form.write(made, out, quantize, lambda: None))
    return Made(case, made, out, out / proof.REFERENCE)


def pruned(
    path: Path, family: str, quantize: str | None = None, *, drop: bool = False, biased: bool = False, **options: Any
) -> Made:
    source, model = folder(path / "base", family, **options)
    return export(path, prune(model, drop=drop, biased=biased), source, quantize)


def uniform(path: Path, family: str, shape: LayerShape, quantize: str | None = None, **options: Any) -> Made:
    """All layers keep the first channels and KV groups."""
    source, model = folder(path / "base", family, **options)
    dense: dict[str, torch.Tensor] = model.state_dict()
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = {}
    for name in dense:
        kind = name.split(".")[-2]
        if kind in ("qkv_proj", "gate_up_proj"):  # Phi-3's matrices of several parts
            queries, keys = size * config.num_attention_heads, size * config.num_key_value_heads
            ffn = config.intermediate_size
            parts = dense[name].split([queries, keys, keys] if kind == "qkv_proj" else [ffn, ffn])
            rows = [size * n for n in (shape.heads, shape.kv_groups, shape.kv_groups)]
            weights[name] = torch.cat(
                [part[:n] for part, n in zip(parts, rows if kind == "qkv_proj" else [shape.channels] * 2, strict=True)]
            )
        elif kind in ("q_proj", "k_proj", "v_proj"):
            weights[name] = dense[name][: size * (shape.heads if kind == "q_proj" else shape.kv_groups)]
        elif kind in ("gate_proj", "up_proj"):
            weights[name] = dense[name][: shape.channels]
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = dense[name][:, : size * shape.heads if kind == "o_proj" else shape.channels]
    layers = model.config.num_hidden_layers
    return export(path, Case(model, build(model, [shape] * layers, weights), [], {}), source, quantize)


# Everything varies by layer; dropped: the first layer has no attention, the last no FFN.
VARYING: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-untied-biased": {"family": "llama", "tied": False, "biased": True},
    "llama-dropped-biased": {"family": "llama", "drop": True, "biased": True},
    "llama-qkv-bias-wide-head": {"family": "llama", "attention_bias": True, "head_dim": 16},
    "mistral-window": {"family": "mistral", "sliding_window": 64, "biased": True},
    "qwen2-dropped-biased": {"family": "qwen2", "drop": True, "biased": True},
    "phi3": {"family": "phi3"},
    "qwen3": {"family": "qwen3"},
    "qwen3-dropped-wide-head": {"family": "qwen3", "drop": True, "head_dim": 16},
    "phi3-dropped-biased-wide-head": {"family": "phi3", "drop": True, "biased": True, "head_dim": 16},
}


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def wrapped(backend: Any, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def with_pre_tokenizer(pre: Any, *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    body = json.loads(tiny.tiny_tokenizer().backend_tokenizer.to_str())
    body["model"]["ignore_merges"] = ignore_merges
    backend: Any = Tokenizer.from_str(json.dumps(body))
    backend.pre_tokenizer = pre
    return wrapped(backend, eos_token="</s>")


def sentencepiece(pieces: list[str], *, prefix: bool = True, lost: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers makes one of a sentencepiece model: every pair that makes a piece merges, in the pieces' order.
    As in Llama 2 the runs of spaces have one score, the least, and of their merges those with the longest left side go first.

    ``lost`` pairs of the last piece are left out.
    """
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for piece in pieces for letter in piece})
    long = [piece for piece in pieces if len(piece) > 1]
    vocabulary = {token: index for index, token in enumerate([*special, *long, *letters])}
    runs = [piece for piece in long if set(piece) == {"▁"}]
    made = [
        (0 if piece in runs else -long.index(piece) + len(long), cut, len(piece) - cut, piece)
        for piece in long
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges = [(piece[:cut], piece[cut:]) for _, cut, _, piece in sorted(made, key=lambda pair: pair[:3], reverse=True)]
    merges = merges[: len(merges) - lost]
    backend: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = wrapped(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    from tokenizers import processors

    template: Any = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


PIECES = [
    "▁t",
    "he",
    "in",
    "er",
    "▁a",
    "▁the",
    "the",
    "ing",
    "▁▁",
    "▁▁▁▁",
    "▁▁▁▁▁",
    "▁▁▁",
    "an",
    "▁an",
    "and",
    "▁and",
    "ee",
    "eee",
    *"▁abcdefghinorst",
]


def write_gguf(path: Path, model: Path, **extra: float | str | bool) -> None:
    """A GGUF file of a tiny Hugging Face folder, written the way llama.cpp's converter does."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    family, heads, kv_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    writer.add_vocab_size(config["vocab_size"])
    if family == "llama":
        writer.add_rope_dimension_count(config["head_dim"])
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(extra.pop("pre", "smollm")))
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if index < 4 else 1 for _, index in vocab])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    for key, index in (("pad", 0), ("bos", 1), ("eos", 2), ("unk", 3)):
        getattr(writer, f"add_{key}_token_id")(index)
    writer.add_add_bos_token(bool(extra.pop("add_bos", False)))
    writer.add_chat_template(CHAT_TEMPLATE)
    if scaling := extra.pop("scaling", None):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
    if factor := extra.pop("llama3_factor", None):
        writer.add_tensor("rope_freqs.weight", np.linspace(1, factor, config["head_dim"] // 2, dtype=np.float32))
    kind = gguf.GGMLQuantizationType[str(extra.pop("kind", "F32"))]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), config["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        data = tensor.numpy()
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            count = heads if "q_proj" in name else kv_heads
            data = data.reshape(count, 2, data.shape[0] // count // 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        own = kind if data.ndim > 1 else gguf.GGMLQuantizationType.F32
        place = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        writer.add_tensor(place, gguf.quants.quantize(np.ascontiguousarray(data), own), raw_dtype=own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
