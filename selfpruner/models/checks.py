"""Inspect a Hugging Face model folder without trusting it: everything wrong is found before torch opens a file.

:func:`check_config` judges ``config.json`` alone, so a hub repository is refused before its weights are downloaded.
:func:`check_folder` also reads the safetensors headers (a few KB) and compares them with the configuration. Only safetensors is
ever read: no pickle, no code from the folder. :func:`fingerprint` identifies a folder by content.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from selfpruner.errors import ModelError, ModelNotFoundError, UnsafeModelError, UnsupportedModelError
from selfpruner.models.family_layouts import LAYOUTS, Widths, whole_number

SUPPORTED_MODEL_TYPES = tuple(LAYOUTS)
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

_JSON_LIMIT = 64 << 20
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library
_WHOLE_FILE_LIMIT = 64 << 20
_SAMPLE_BYTES = 4096
_SAMPLES = 4096
_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 8),
}
_READ_SUFFIXES = (".json", ".safetensors", ".model", ".txt")
# How a file begins that `git clone` left to be fetched by Git LFS.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FLOAT_DTYPES = frozenset(("F64", "F32", "F16", "BF16"))
_IN_LAYER = re.compile(r"[\w.]*?\blayers\.(\d+)\.")
# Upper bounds far above any published model: they stop a hostile config before it allocates anything.
_BOUNDS = {
    "num_hidden_layers": 1_024,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "ffn_dim": 1 << 20,
    "num_attention_heads": 4_096,
    "num_key_value_heads": 4_096,
    "head_dim": 1 << 13,
    "vocab_size": 1 << 23,
    "max_position_embeddings": 1 << 31,
}
# What transformers can be asked for by name (a test compares them with its own tables, which only torch can open).
ACTIVATIONS = frozenset(
    (
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh"),
        *("hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid"),
        *("silu", "sqrtsoftplus", "swish", "tanh", "xielu"),
    )
)
ROPES = frozenset(("default", "dynamic", "linear", "llama3", "longrope", "proportional", "su", "yarn"))
_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def read_json(path: Path, what: str) -> dict[str, object]:
    """The JSON object in ``path``. Raises :class:`ModelError` naming the file when it is not one."""
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise ModelError(f"{what} {path} is larger than {_JSON_LIMIT >> 20} MiB; it is not a usable file.", param="model")
        value = json.loads(path.read_text("utf-8"))  # from bytes json would take encodings that transformers does not
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{what} {path} cannot be read as JSON ({error}). Download the model again.", param="model") from error
    if not isinstance(value, dict):
        raise ModelError(f"{what} {path} must hold a JSON object. Download the model again.", param="model")
    return value


def _check_numbers(path: Path, body: Mapping[str, object]) -> None:
    """Raise :class:`ModelError` where the parsed JSON holds NaN or infinity, in any of the ways in which it may."""
    left: list[tuple[str, object]] = list(body.items())
    while left:
        key, value = left.pop()
        # transformers writes {"__float__": "Infinity"}.
        said = value["__float__"] if isinstance(value, dict) and "__float__" in value else value
        if said is not value or (isinstance(value, float) and not math.isfinite(value)):
            raise ModelError(
                f"{path} says {key} = {said}, which is no number to compute with. Compare it with the file the model was "
                "published with.",
                param="model",
            )
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        left += [(f"{key}.{name}", item) for name, item in inner]


def _check_functions(path: Path, config: Mapping[str, object], activation: str) -> None:
    """Raise :class:`ModelError` for an activation or a rotary table that no version of transformers can make."""
    asked = [(activation, config.get(activation), ACTIVATIONS)]
    for place in ("rope_parameters", "rope_scaling"):
        value = config.get(place)
        if value is not None and not isinstance(value, dict):
            raise ModelError(
                f"{path} says {place} = {value!r}; an object or null is possible. Download the model again.", param="model"
            )
        # Models whose layers differ have one for each kind of layer.
        for part in (value, *value.values()) if value else ():
            if isinstance(part, dict):
                asked += [(f"{place}.{key}", part.get(key), ROPES) for key in ("rope_type", "type")]
    for place, name, known in asked:
        if name is not None and not (isinstance(name, str) and name in known):
            raise ModelError(
                f"{path} says {place} = {name!r}, which transformers does not know. Known: {', '.join(sorted(known))}. Compare it "
                "with the file the model was published with.",
                param="model",
            )


def refuse_pointer(path: Path) -> None:
    """Raises :class:`ModelError` for a file whose content Git LFS has yet to fetch."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(
                f"{path} is a pointer of Git LFS, not the file itself. Run `git lfs install` and `git lfs pull` in {path.parent}, "
                "or download the model from the hub.",
                param="model",
            )


def check_config(folder: Path) -> dict[str, object]:
    """Read and judge ``config.json``.

    Raises :class:`ModelNotFoundError` (no config), :class:`UnsafeModelError` (remote code), :class:`UnsupportedModelError`
    (another architecture, a checkpoint pruned by selfpruner, quantised weights) or :class:`ModelError` (numbers out of bounds).
    """
    path = folder / "config.json"
    for entry in sorted(folder.iterdir()):
        if entry.suffix in _READ_SUFFIXES and entry.is_symlink() and not entry.exists():
            raise ModelError(
                f"{entry} is a link to a file that is not there ({entry.readlink()}): the folder was copied out of a hub cache, or "
                "half downloaded. Copy it with what its links lead to (cp -rL), or download the model again.",
                param="model",
            )
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise ModelNotFoundError(
            f"{folder} is a PEFT adapter, not a model (adapter_config.json, no config.json). Merge it into its base model "
            "(merge_and_unload) and give the folder of the result.",
            param="model",
        )
    if not path.is_file():
        raise ModelNotFoundError(
            f"{folder} has no config.json. Give a Hugging Face model folder (config.json, tokenizer, safetensors), a .gguf file "
            "or a hub id.",
            param="model",
        )
    config = read_json(path, "The model configuration")
    _check_numbers(path, config)
    model_type = config.get("model_type")
    if str(model_type).startswith("selfpruner") or config.get("per_layer_config"):
        raise UnsupportedModelError(
            f"{folder} is already a pruned checkpoint (model_type {model_type!r}); a pruned checkpoint cannot be pruned again. "
            "Use its base model with a higher rate instead. evaluate, benchmark and export take it as it is.",
            param="model",
        )
    layout = LAYOUTS.get(model_type) if isinstance(model_type, str) else None
    code = config.get("auto_map")
    known = layout is not None and isinstance(code, dict) and all(str(cls) in layout.published_code for cls in code.values())
    if code and not known:
        raise UnsafeModelError(
            f"{folder} brings its own Python code (auto_map in config.json), which selfpruner never runs. "
            f"Use a model of a built-in architecture: {', '.join(SUPPORTED_MODEL_TYPES)}.",
            param="model",
        )
    if layout is None:
        raise UnsupportedModelError(
            f"Model type {model_type!r} is not supported. Supported: {', '.join(SUPPORTED_MODEL_TYPES)}.", param="model"
        )
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{folder} holds quantised weights (quantization_config in config.json). "
            "Use the model's unquantised checkpoint, or a GGUF file of it.",
            param="model",
        )
    if why := layout.refusal(config):
        raise UnsupportedModelError(f"{folder} is not supported. {why}", param="model")
    for key, bound in _BOUNDS.items():
        value = config.get(key)
        if value is None and key not in (*_REQUIRED, layout.channels_key):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= bound:
            raise ModelError(
                f"config.json of {folder} says {key} = {value!r}; a whole number from 1 to {bound} is possible. "
                "The file is damaged or hostile: download the model again.",
                param="model",
            )
    _check_functions(path, config, layout.activation_key)
    pad, vocabulary = config.get("pad_token_id"), whole_number(config, "vocab_size")
    if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not -vocabulary <= pad < vocabulary):
        raise ModelError(
            f"config.json of {folder} says pad_token_id = {pad!r}, and the model has the tokens 0 to {vocabulary - 1}. "
            "Set it to one of them, or to null.",
            param="model",
        )
    widths = Widths.of(layout, config)
    if widths.heads % widths.kv_heads:
        raise ModelError(
            f"config.json of {folder}: {widths.heads} query heads cannot share {widths.kv_heads} key/value heads.", param="model"
        )
    return config


def check_folder(folder: Path) -> dict[str, object]:
    """Judge a whole model folder; returns the parsed ``config.json``.

    Beyond :func:`check_config`: a tokenizer is there, weights are safetensors and complete, every header is well formed, and every
    layer has the shapes the configuration promises.
    """
    config = check_config(folder)
    for name in ("tokenizer_config.json", "generation_config.json"):
        if not (folder / name).is_file():
            continue
        body = read_json(folder / name, name)
        if name == "generation_config.json":
            _check_numbers(folder / name, body)
        if body.get("auto_map"):
            raise UnsafeModelError(
                f"{folder} brings its own Python code (auto_map in {name}), which selfpruner never runs. "
                "Remove that entry if the tokenizer is a plain one.",
                param="model",
            )
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            refuse_pointer(folder / name)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}). Copy the model's tokenizer files into the folder.",
            param="model",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        for name, (dtype, shape) in read_header(file).items():
            if dtype not in _FLOAT_DTYPES:
                raise UnsupportedModelError(
                    f"Tensor {name} of {file} has dtype {dtype}; float32, float16 or bfloat16 weights are needed. "
                    "Use the model's unquantised checkpoint.",
                    param="model",
                )
            if name in shapes:
                raise ModelError(f"Tensor {name} is in more than one file of {folder}. Download the model again.", param="model")
            shapes[name] = shape
    _check_shapes(folder, config, shapes)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, by name. Raises when there are none, or one of the index is missing."""
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    index = folder / INDEX_NAME
    if index.is_file():
        mapping = read_json(index, "The weight index").get("weight_map")
        if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
            raise ModelError(f"{index} has no usable weight_map. Download the model again.", param="model")
        files = sorted(set(mapping.values()))
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UnsafeModelError(f"{index} names the shard {file!r}, which is not a file of this folder.", param="model")
            if not (folder / file).is_file():
                raise ModelError(
                    f"{folder} lacks {file}, named in {INDEX_NAME}: the download is incomplete. Download the model again.",
                    param="model",
                )
        return [folder / file for file in files]
    if any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise UnsafeModelError(
            f"{folder} holds pickle weights only, and a pickle can run code when it is opened. "
            "Use a safetensors copy of the model (model.safetensors).",
            param="model",
        )
    others = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".safetensors"))
    raise ModelError(
        f"{folder} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there"
        + (f", and {others} is not read. Save the model with save_pretrained." if others else "."),
        param="model",
    )


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """``{tensor: (dtype, shape)}`` of a safetensors file whose header passed every check of the format's specification.

    The header fits the file, offsets are in order without overlap or hole, and each span has the size its dtype and shape need.
    Source: https://github.com/huggingface/safetensors, "Format".
    """

    def damaged(what: str) -> ModelError:
        return UnsafeModelError(f"{path} is not a valid safetensors file: {what}. Download the model again.", param="model")

    size = path.stat().st_size
    refuse_pointer(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise damaged(f"it has only {size} bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_HEADER_LIMIT, size - 8):
            raise damaged(f"its header claims {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise damaged("its header is not JSON") from error
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    data_bytes = size - 8 - length
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise damaged(f"the entry of tensor {name} is incomplete") from error
        if dtype not in _DTYPE_BITS:
            raise UnsupportedModelError(
                f"Tensor {name} of {path} has dtype {dtype!r}; float32, float16 or bfloat16 weights are needed.", param="model"
            )
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (*shape, begin, end)):
            raise damaged(f"tensor {name} has a negative or fractional shape or offset")
        if end > data_bytes:
            raise damaged(f"tensor {name} ends at byte {end} of {data_bytes}; the file is truncated")
        if (end - begin) * 8 != math.prod(shape) * _DTYPE_BITS[dtype]:
            raise damaged(f"tensor {name} of shape {list(shape)} and dtype {dtype} does not fit its {end - begin} bytes")
        tensors[name] = (dtype, shape)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise damaged(f"tensor {name} {'overlaps another' if begin < position else 'leaves a hole before it'}")
        position = end
    if position != data_bytes:
        raise damaged(f"{data_bytes - position} bytes belong to no tensor")
    return tensors


def weight_bytes(folder: Path, itemsize: int) -> tuple[int, int]:
    """Bytes of all weights of a checked folder, and of the largest decoder layer, with ``itemsize`` bytes per number."""
    layers: dict[str, int] = {}
    total = 0
    for file in weight_files(folder):
        for name, (_, shape) in read_header(file).items():
            size = math.prod(shape) * itemsize
            total += size
            if inside := _IN_LAYER.match(name):
                layers[inside[1]] = layers.get(inside[1], 0) + size
    return total, max(layers.values(), default=0)


def stored_dtype(folder: Path) -> str:
    """The type that most numbers of the decoder's layers have in the files of a checked folder, whatever its config says:
    ``float32``, ``float16`` or ``bfloat16``. float64 counts as float32, the widest that is written."""
    names = {"F16": "float16", "BF16": "bfloat16"}
    counts: dict[str, int] = {}
    for file in weight_files(folder):
        for name, (dtype, shape) in read_header(file).items():
            if _IN_LAYER.match(name):
                kind = names.get(dtype, "float32")
                counts[kind] = counts.get(kind, 0) + math.prod(shape)
    return max(counts, key=counts.__getitem__, default="float32")


def _check_shapes(folder: Path, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> None:
    layout = LAYOUTS[str(config["model_type"])]
    widths, vocabulary = Widths.of(layout, config), whole_number(config, "vocab_size")
    tied = bool(layout.complete(config).get("tie_word_embeddings"))
    expected: dict[str, tuple[int, ...]] = {f"{place}.weight": shape for place, shape in widths.shapes(layout)}
    expected |= {f"{norm}.weight": (widths.hidden,) for norm in (*layout.attention_norms, *layout.ffn_norms)}
    wanted: dict[str, tuple[int, ...]] = {
        f"{layout.decoder}.embed_tokens.weight": (vocabulary, widths.hidden),
        f"{layout.decoder}.{layout.final_norm}.weight": (widths.hidden,),
    }
    for layer in range(whole_number(config, "num_hidden_layers")):
        wanted |= {f"{layout.layer(layer)}.{name}": shape for name, shape in expected.items()}
    if "lm_head.weight" in shapes:
        wanted["lm_head.weight"] = (vocabulary, widths.hidden)
        if tied and (embeddings := f"{layout.decoder}.embed_tokens.weight") not in shapes:
            del wanted[embeddings]  # of two tied matrices one is saved, whichever it is
    elif not tied:
        raise ModelError(
            f"{folder} has no lm_head.weight, and its config.json does not tie it to the embeddings. "
            "Download the model again, or set tie_word_embeddings to true if that is what the model does.",
            param="model",
        )
    for name, shape in wanted.items():
        if name not in shapes:
            if other := next((o for o in shapes if o.endswith(f".{name}") or name.endswith(f".{o}")), None):
                raise ModelError(
                    f"{folder} has a tensor {other} where its model type has {name}: it was saved from inside another module "
                    "(torch.compile, DDP, PEFT), or without its head. Save the CausalLM itself with save_pretrained.",
                    param="model",
                )
            raise ModelError(
                f"{folder} has no tensor {name}, which its config.json calls for. Download the model again; "
                "LoRA adapters and other partial checkpoints have to be merged first.",
                param="model",
            )
        if shapes[name] != shape:
            raise ModelError(
                f"Tensor {name} of {folder} has shape {list(shapes[name])}, but config.json means {list(shape)} "
                f"({widths.heads} heads of {widths.head_dim}, {widths.kv_heads} key/value heads, hidden {widths.hidden}, "
                f"FFN {widths.channels}). "
                "Config and weights are not of the same model.",
                param="model",
            )


def sampled_digest(path: Path) -> str:
    """SHA-256 of a file's size and content; beyond 64 MiB of 4,096 evenly spread pieces of 4 KiB, first and last included.

    A file that differs only between the pieces goes unnoticed: it tells models apart, it does not certify them.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_LIMIT:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """Identity of a checked folder: SHA-256 over the names and :func:`sampled_digest` of config, tokenizer and weight files, and
    over each weight file's full header. Moving or copying the folder does not change it."""
    digest = hashlib.sha256()
    tokenizer = [folder / name for name in (*TOKENIZER_FILES, "merges.txt", "tokenizer_config.json") if (folder / name).is_file()]
    for file in (folder / "config.json", *tokenizer, *weight_files(folder)):
        digest.update(f"{file.name}\0{sampled_digest(file)}\0".encode())
        if file.suffix == ".safetensors":
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                digest.update(opened.read(length))
    return digest.hexdigest()
