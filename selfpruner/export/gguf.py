"""GGUF, the file that llama.cpp and what is built on it read.

A plan whose layers differ in width is written as architecture ``deci``, the one of llama.cpp whose head counts and FFN widths are
arrays with an entry per layer, and whose matrices may have biases. A uniform plan is written as ``llama``, or as the family's own
architecture where that fits. Facts about llama.cpp that shape the file, read in its source and tested with 0.3.36 of
llama-cpp-python:

- ``deci`` and ``llama`` rotate neighbouring pairs of a head's dimensions where transformers rotates the halves, so the rows of q
  and k, and their biases, are put into that order, head by head; ``qwen2`` and ``qwen3`` rotate the halves.
- Neither knows matrices of several parts, so Phi-3's are taken apart.
- ``deci`` knows no norms on q and k. ``openelm`` knows them in layers that differ; it has q, k and v in one matrix, rotates halves,
  and knows no biases and no head but the embeddings. A Qwen3 plan whose layers differ is written as ``openelm``, a uniform one as
  ``qwen3``, and one with biases, or with layers that differ and a head of its own, not at all.
- A layer of ``deci`` may have no heads, but not the first, from which the size of a head is taken, and one without FFN forgets what
  its attention computed; one of ``openelm`` has both. There a head, or an FFN, of zeros stands in, which changes nothing. A layer
  that lost both is left out.
- A sliding window is not known to ``deci`` and ``llama``. Up to the window's length it makes no difference, and no longer context
  is promised by the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto import AutoConfig, AutoTokenizer

from selfpruner.catalogue import PATTERNS
from selfpruner.compensation import COMPENSATIONS
from selfpruner.errors import ExportError, FormatError
from selfpruner.export import gguf_runtime, gguf_tokenizer, verify_gguf
from selfpruner.export.base import FinishedCheckpoint, Format, Origin
from selfpruner.models import quiet
from selfpruner.models.family_layouts import LAYOUTS
from selfpruner.pruning.layer_shapes import LayerShape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
# Written here; the others are llama.cpp's own quantiser's.
_PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_OWN = (*_PLAIN, "q8_0")
_QUANTISER = (
    *("q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
# Numbers that one step of writing holds in memory as float32.
_PIECE = 1 << 24
# Channels of an FFN of zeros: a block of every type that has blocks of 32.
_STAND_IN = 32

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
}
_QKV = ("attn_q", "attn_k", "attn_v")
_FFN = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the file: rows of the checkpoint, as (tensor, first row, rows) one after another, or ``values`` (one number for
    all of them). ``head_dim`` where its rows are heads to be reordered, else 0."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, int, int], ...] = ()
    values: Tensor | float = 0.0
    head_dim: int = 0

    def rows(self, checkpoint: FinishedCheckpoint) -> Iterator[Tensor]:
        """The tensor in runs of whole heads, or rows, of about ``_PIECE`` numbers."""
        unit = self.head_dim or 1
        step = max(_PIECE // prod(self.shape[1:]) // unit, 1) * unit
        for source, first, rows in self.sources:
            for start in range(first, first + rows, step):
                stop = min(start + step, first + rows)
                yield _neighbours(checkpoint.tensors[source].read(source, start=start, stop=stop), self.head_dim)
        for start in range(0, 0 if self.sources else self.shape[0], step):
            stop = min(start + step, self.shape[0])
            if isinstance(self.values, Tensor):
                yield self.values[start:stop]
            else:
                yield torch.full((stop - start, *self.shape[1:]), self.values)


@dataclass(frozen=True, slots=True)
class _Outline:
    """All that the file holds, before a tensor is read."""

    architecture: str
    keys: Mapping[str, gguf_tokenizer.Value]
    tensors: list[_Tensor]


class Gguf(Format):
    name: ClassVar[str] = "gguf"
    library: ClassVar[str] = "gguf"
    relation: ClassVar[str] = "quantized"  # what the hub calls every GGUF file
    quantizations: ClassVar[tuple[str, ...]] = (*_OWN, *_QUANTISER)

    def precheck(self, origin: Origin, quantize: str | None) -> None:
        _check_family(origin.family)
        biased = COMPENSATIONS[origin.compensation].adds_bias and not PATTERNS[origin.pattern].zeros
        if biased and LAYOUTS[origin.family].qk_norm:
            raise _biased()
        self._check_quantiser(quantize)

    def check(self, checkpoint: FinishedCheckpoint, quantize: str | None) -> None:
        _outline(checkpoint)
        self._check_quantiser(quantize)

    def _check_quantiser(self, quantize: str | None) -> None:
        if quantize in _QUANTISER and not gguf_runtime.installed():
            raise FormatError(
                f"{quantize} is made by llama.cpp's own quantiser. Install it (it compiles for some minutes): pip install "
                f"'llama-cpp-python>=0.3.36'; or choose one of {', '.join(_OWN)}.",
                param="quantize",
            )

    def write(self, checkpoint: FinishedCheckpoint, folder: Path, quantize: str | None, go_on: Callable[[], None]) -> int:
        outline = _outline(checkpoint)
        path = folder / _file_name(checkpoint, quantize)
        if quantize not in _QUANTISER:
            _write(outline, checkpoint, path, quantize or _own_type(checkpoint), go_on)
        else:
            plain = path.with_suffix(".plain")
            _write(outline, checkpoint, plain, _own_type(checkpoint), go_on)
            gguf_runtime.quantize(plain, path, LlamaFileType[f"MOSTLY_{quantize.upper()}"], go_on)
            plain.unlink()
        return sum(prod(tensor.shape) for tensor in outline.tensors if tensor.name != "rope_freqs.weight")

    def use(self, checkpoint: FinishedCheckpoint, quantize: str | None) -> str:
        outline, kind = _outline(checkpoint), quantize or _own_type(checkpoint)
        name = _file_name(checkpoint, quantize)
        text = (
            f"One file for llama.cpp and what is built on it, of architecture `{outline.architecture}`. With flash attention the "
            "whole KV cache shrinks with the heads that are gone, without it only the half for keys.\n\n"
            f"```\nllama-server -m {name} -fa on\n```"
        )
        block = 1 if kind in _PLAIN else 256 if "_k" in kind else 32
        if odd := [tensor.name for tensor in outline.tensors if len(tensor.shape) > 1 and tensor.shape[-1] % block]:
            other = "float16" if block == 32 else "a type with blocks of 32, or float16,"
            text += (
                f"\n\n{kind} takes rows of a multiple of {block} numbers. {len(odd)} matrices have others, `{odd[0]}` for one; "
                f"they are stored as {other} instead. An `ffn_step` that is a multiple of {block} keeps FFN matrices from that."
            )
        return text

    def verifier(self, folder: Path, reference: Path, device: str) -> list[str]:
        return ["-m", verify_gguf.__name__, str(folder), str(reference), "--device", device]


def _base(checkpoint: FinishedCheckpoint) -> str:
    return str(checkpoint.plan["base_model"]).rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")


def _file_name(checkpoint: FinishedCheckpoint, quantize: str | None) -> str:
    base = re.sub(r"[^\w.-]+", "-", _base(checkpoint))
    pruned = "" if checkpoint.plan["rate"] is None else "-pruned"
    return f"{base}{pruned}-{(quantize or _own_type(checkpoint)).upper()}.gguf"


def _own_type(checkpoint: FinishedCheckpoint) -> str:
    dtype = getattr(torch, checkpoint.plan["dtype"])
    return next(name for name, known in _PLAIN.items() if known == dtype)


# -- what the file says ------------------------------------------------------------------------------------------------
def _outline(checkpoint: FinishedCheckpoint) -> _Outline:
    """Raises FormatError for what llama.cpp cannot run."""
    with quiet():
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    family = str(checkpoint.plan["family"])
    _check_family(family)
    if config.hidden_act != "silu":
        raise _refusal(f"with the activation {config.hidden_act} cannot be written; llama.cpp has silu there.")
    kept = [(index, shape) for index, shape in enumerate(checkpoint.shapes) if shape.heads or shape.channels]
    if not kept:
        raise _refusal("that has lost every block cannot be written.")
    shapes = [shape for _, shape in kept]
    head_dim = _head_dim(config)
    rope, factors = _rope(config, head_dim)
    architecture = _architecture(checkpoint, config, family, shapes, factors is not None)
    tensors = _tensors(checkpoint, config, kept, architecture)
    if factors is not None:
        tensors.insert(1, _Tensor("rope_freqs.weight", tuple(factors.shape), values=factors))
    # Zeros stand in, see the module's docstring; elsewhere a uniform plan has one shape.
    least = [int(index == 0 or architecture == "openelm") for index in range(len(shapes))]
    widths = {
        "feed_forward_length": [shape.channels or _STAND_IN for shape in shapes],
        "attention.head_count": [max(shape.heads, one) for shape, one in zip(shapes, least, strict=True)],
        "attention.head_count_kv": [max(shape.kv_groups, one) for shape, one in zip(shapes, least, strict=True)],
    }
    own = {
        "vocab_size": config.vocab_size,
        "block_count": len(kept),
        "context_length": _context(config),
        "embedding_length": config.hidden_size,
        **(widths if architecture in ("deci", "openelm") else {key: values[0] for key, values in widths.items()}),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        **rope,
    }
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    rate = checkpoint.plan["rate"]
    keys = {
        "general.type": "model",
        "general.name": _base(checkpoint) + ("" if rate is None else f", pruned by {rate:.0%}"),
        **{f"{architecture}.{key}": value for key, value in own.items()},
        **gguf_tokenizer.metadata(tokenizer, config.vocab_size, _ends(checkpoint)),
    }
    return _Outline(architecture, keys, tensors)


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise _refusal(f"of the family {family} cannot be written. GGUF is written for {', '.join(FAMILIES)}.")


def _biased() -> FormatError:
    return _refusal(
        "with norms on q and k and biases on its matrices cannot be written: llama.cpp has no such architecture. The biases are "
        "the repair's; compensation least_squares_weights leaves none. The format transformers takes every plan.",
        "compensation",
    )


def _refusal(what: str, param: str = "format") -> FormatError:
    return FormatError(f"As GGUF a model {what}", param=param)


def _architecture(
    checkpoint: FinishedCheckpoint, config: PreTrainedConfig, family: str, shapes: list[LayerShape], scaled: bool
) -> str:
    """llama.cpp's name of the architecture to write. ``scaled``: the rotation has a factor per dimension."""
    uniform = len(set(shapes)) == 1 and shapes[0].heads > 0 and shapes[0].channels > 0
    biased = any(name.endswith(("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")) for name in checkpoint.tensors)
    if any(name.endswith("q_norm.weight") for name in checkpoint.tensors):
        if biased:
            raise _biased()
        if scaled:
            raise _refusal("with norms on q and k and this rotary scaling cannot be written: llama.cpp has no such architecture.")
        if not uniform and "lm_head.weight" in checkpoint.tensors:
            raise _refusal(
                "with norms on q and k, layers that differ and an lm_head of its own cannot be written: llama.cpp has such layers "
                "only where the head is tied to the embeddings. A uniform plan can be (initial: uniform, generations: 0); the "
                "formats transformers and masked take every plan."
            )
        return "qwen3" if uniform else "openelm"
    if not uniform:
        return "deci"
    # llama.cpp's qwen2 has q as wide as the model, and biases on q, k and v alone.
    square = shapes[0].heads * _head_dim(config) == config.hidden_size
    return "qwen2" if family == "qwen2" and square and not biased and not scaled else "llama"


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _tensors(
    checkpoint: FinishedCheckpoint, config: PreTrainedConfig, kept: list[tuple[int, LayerShape]], architecture: str
) -> list[_Tensor]:
    """The file's tensors in order."""
    paired, fused, head_dim = architecture in ("deci", "llama"), architecture == "openelm", _head_dim(config)
    tensors: list[_Tensor] = []
    places = _places(checkpoint, head_dim)
    hidden = int(config.hidden_size)

    def copy(name: str, *sources: str, heads: int = 0) -> None:
        for kind in ("weight", "bias"):
            found = tuple(places.pop(full) for source in sources if (full := f"{source}.{kind}") in places)
            if found:
                full = found[0][0]
                shape = (sum(rows for _, _, rows in found), *checkpoint.tensors[full].shapes[full][1][1:])
                tensors.append(_Tensor(f"{name}.{kind}", shape, found, head_dim=heads))

    def zeros(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            tensors.append(_Tensor(f"{prefix}{name}.weight", shape, values=float("norm" in name)))

    copy("token_embd", "model.embed_tokens")
    for position, (index, shape) in enumerate(kept):
        block, layer = f"blk.{position}.", f"model.layers.{index}."
        if shape.heads and fused:
            copy(f"{block}attn_qkv", *(layer + _ATTENTION[name] for name in _QKV))
        for name, source in _ATTENTION.items() if shape.heads else ():
            copy(block + name, layer + source, heads=head_dim if paired and name in ("attn_q", "attn_k") else 0)
        if not shape.heads and fused:
            norms = dict.fromkeys(("attn_q_norm", "attn_k_norm"), (head_dim,))
            zeros(block, {"attn_norm": (hidden,), "attn_qkv": (3 * head_dim, hidden), **norms, "attn_output": (hidden, head_dim)})
        elif not shape.heads and position == 0:
            square = dict.fromkeys(_QKV, (head_dim, hidden))
            zeros(block, {"attn_norm": (hidden,), **square, "attn_output": (hidden, head_dim)})
        for name, source in _FFN.items() if shape.channels else ():
            copy(block + name, layer + source)
        if not shape.channels:
            wide = (_STAND_IN, hidden)
            zeros(block, {"ffn_norm": (hidden,), "ffn_gate": wide, "ffn_up": wide, "ffn_down": (hidden, _STAND_IN)})
    copy("output_norm", "model.norm")
    copy("output", "lm_head")
    if left := sorted(full for full, _, _ in places.values()):
        raise _refusal(f"with the tensor {left[0]} cannot be written; llama.cpp has no place for it.")
    return tensors


def _places(checkpoint: FinishedCheckpoint, head_dim: int) -> dict[str, tuple[str, int, int]]:
    """Where the checkpoint has each tensor, by Llama's name for it: (tensor, first row, rows). A matrix of several parts is several
    of Llama's."""
    layout, llama = LAYOUTS[checkpoint.plan["family"]], LAYOUTS["llama"]
    sources = {name: (name, 0, file.shapes[name][1][0]) for name, file in checkpoint.tensors.items()}
    for index, shape in enumerate(checkpoint.shapes):
        queries, keys = shape.heads * head_dim, shape.kv_groups * head_dim
        rows = {"q": queries, "k": keys, "v": keys, "gate": shape.channels, "up": shape.channels}
        for block, names in enumerate((llama.attention, llama.ffn)):
            for place, parts in layout.places(block).items():
                for kind in ("weight", "bias"):
                    whole = f"{layout.layer(index)}.{place}.{kind}"
                    if len(parts) == 1 or whole not in checkpoint.tensors:
                        continue
                    first = 0
                    del sources[whole]
                    for part in parts:
                        sources[f"{llama.layer(index)}.{names[part]}.{kind}"] = (whole, first, rows[part])
                        first += rows[part]
    return sources


def _rope(config: PreTrainedConfig, head_dim: int) -> tuple[dict[str, gguf_tokenizer.Value], Tensor | None]:
    """The keys of the rotary embedding and, for Llama 3's scaling, the factor by which each frequency is divided."""
    rope = dict(config.rope_parameters)
    kind, theta = rope.pop("rope_type", "default"), float(rope.pop("rope_theta"))
    rope.pop("partial_rotary_factor", None) if rope.get("partial_rotary_factor") == 1.0 else None
    keys: dict[str, gguf_tokenizer.Value] = {"rope.freq_base": theta}
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        plain = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
        return keys, (plain / scaled).float()
    known = {"default": set(), "linear": {"factor"}, "yarn": {"factor", "original_max_position_embeddings"}}
    if kind not in known or (surplus := set(rope) - known[kind]):
        what = repr(kind) if kind not in known else f"{kind!r} with {', '.join(sorted(surplus))}"
        raise _refusal(f"with the rotary embedding {what} cannot be written; llama.cpp's is another.")
    if kind != "default":
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if original := rope.get("original_max_position_embeddings"):
            keys["rope.scaling.original_context_length"] = int(original)
    return keys, None


def _context(config: PreTrainedConfig) -> int:
    window = getattr(config, "sliding_window", None)
    if window is not None and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return min(int(config.max_position_embeddings), int(window))
    return int(config.max_position_embeddings)


def _ends(checkpoint: FinishedCheckpoint) -> list[int]:
    """The ids at which generation ends, from the generation config, or else the config."""
    generation = checkpoint.folder / "generation_config.json"
    body: Mapping[str, object] = json.loads(generation.read_text("utf-8")) if generation.is_file() else {}
    ends = body.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


# -- the file ----------------------------------------------------------------------------------------------------------
def _write(outline: _Outline, checkpoint: FinishedCheckpoint, path: Path, kind: str, go_on: Callable[[], None]) -> None:
    """Write the file with matrices as ``kind``, one of ``_OWN``, holding one tensor at a time."""
    writer = GGUFWriter(path, outline.architecture)
    try:
        file_type = LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType[f"MOSTLY_{kind.upper()}"]
        for key, value in {**outline.keys, "general.file_type": int(file_type), "general.quantization_version": 2}.items():
            _add(writer, key, value)
        types = {tensor.name: _type(tensor, kind) for tensor in outline.tensors}
        for tensor in outline.tensors:
            size = prod(_stored_shape(tensor.shape, types[tensor.name]))
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=types[tensor.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in outline.tensors:
            go_on()
            stored = np.empty(_stored_shape(tensor.shape, types[tensor.name]), np.uint8)
            start = 0
            for rows in tensor.rows(checkpoint):
                stored[start : start + len(rows)] = _encode(tensor.name, rows, types[tensor.name])
                start += len(rows)
            writer.write_tensor_data(stored)
    finally:
        writer.close()


def _add(writer: GGUFWriter, key: str, value: gguf_tokenizer.Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _type(tensor: _Tensor, kind: str) -> GGMLQuantizationType:
    """Vectors stay float32, as llama.cpp wants them; rows that do not divide into blocks are float16."""
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[kind.upper()]
    return GGMLQuantizationType.F16 if tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _stored_shape(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[int, ...]:
    """The shape as bytes; a vector's numbers are its rows."""
    block, size = GGML_QUANT_SIZES[kind]
    return (shape[0], size) if len(shape) == 1 else (*shape[:-1], shape[-1] // block * size)


def _encode(name: str, rows: Tensor, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Rows as the bytes of type ``kind``."""
    if kind == GGMLQuantizationType.Q8_0:
        return quants.quantize(rows.float().numpy(), kind)
    dtype = _PLAIN[kind.name.lower()]
    cast = rows.to(dtype)
    if not bool(cast.isfinite().all()):
        raise ExportError(f"{name} has numbers that {dtype} cannot hold. Use --quantize bf16 or f32.")
    return cast.contiguous().view(torch.uint8).numpy().reshape(len(rows), -1)


def _neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (heads x head_dim, ...) with each head's two halves interleaved: what was rotated with the row half a head on is rotated
    with its neighbour."""
    if not head_dim:
        return rows
    halves: Tensor = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)
