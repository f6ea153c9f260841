"""Turn a GGUF file into a plain Hugging Face folder, once per file.

Reading a GGUF through transformers takes some twenty seconds and leaves a model that calls itself quantised. The folder written
here (config, safetensors, tokenizer with chat template, generation config) loads in under a second and is an ordinary checkpoint.
What transformers drops on the way is restored from the file's own metadata: rotary scaling, the head width of Qwen3, the digit
splitting of some tokenizers, automatic BOS, the chat template, numbers rounded to float32.

The folder appears under its final name only when it is complete. Two processes that convert the same file do the work once.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock

from selfpruner.errors import ModelError, UnsupportedModelError, disk_errors
from selfpruner.files import atomic
from selfpruner.files.cache_folder import use
from selfpruner.models.checks import refuse_pointer, sampled_digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

Scalar = str | float  # of the metadata; a float may be an int or a bool
# Part of the folder's name: raise it when the conversion changes.
_RECIPE = 2
# The architectures whose files were found to become the same model.
_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# llama.cpp writes Llama 3's rotary scaling as a tensor of factors; the published models all use these three numbers.
_LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Pre-tokenizers (tokenizer.ggml.pre) that split numbers into digits before byte-level BPE.
_DIGIT_SPLITTING = ("smollm", "starcoder", "refact", "command-r", "codeshell")
# The types of metadata: struct's letters of the numbers, and the two others.
_GGUF_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_LONGEST_STRING = 1 << 24


def convert(gguf: Path, models: Path) -> Path:
    """The Hugging Face folder made from the file ``gguf``: ``models/<digest>``, converted now if it is not there.

    Raises :class:`UnsupportedModelError` or :class:`ModelError` for a file that cannot be converted, :class:`DiskFullError`.
    """
    check(gguf)
    target = models / f"gguf-{sampled_digest(gguf)[:24]}-{_RECIPE}"
    use(target, gguf.name, "converted from GGUF")
    if target.is_dir():
        return target
    with disk_errors(target):
        models.mkdir(parents=True, exist_ok=True)
        # The lock goes with its process, so a kill leaves nothing locked, and whoever holds it may sweep what a kill left.
        with FileLock(target.with_suffix(".lock")):
            if not target.is_dir():
                aside = target.with_suffix(".tmp")
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                try:
                    _write(gguf, aside)
                    for path in (*aside.iterdir(), aside):
                        atomic.sync(path)
                    aside.rename(target)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
    return target


def check(gguf: Path) -> None:
    """Judge the file by its first bytes, in no time. Raises as :func:`convert` does."""
    refuse_pointer(gguf)
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{gguf} is not a GGUF file (it does not start with GGUF). Download it again.", param="model")
        try:
            facts = _first_scalars(file)
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise ModelError(f"{gguf} is a damaged GGUF file. Download it again.", param="model") from error
    if "general.architecture" in facts:
        _judge(gguf, facts)


def _judge(gguf: Path, facts: Mapping[str, Scalar]) -> None:
    """Raises UnsupportedModelError for an architecture whose files are not read."""
    architecture = facts.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{gguf.name} is of architecture {architecture!r}. GGUF files of {', '.join(_ARCHITECTURES)} can be read; for another "
            "family use the model's safetensors.",
            param="model",
        )
    for key, value in facts.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{gguf.name} says {key} = {value}, which is no number. Download it again.", param="model")
    if any(key.endswith(".expert_count") and value for key, value in facts.items()):
        raise UnsupportedModelError(
            f"{gguf.name} is a mixture of experts, which is not supported. Use a dense model.", param="model"
        )


def _first_scalars(file: BinaryIO) -> dict[str, Scalar]:
    """The numbers and strings before the first array of the metadata: the vocabulary, which takes the library seconds to read,
    comes after what says whose file it is. Source: the GGUF specification, "File structure"."""

    def number(code: str) -> float:
        value: float
        (value,) = struct.unpack(f"<{code}", file.read(struct.calcsize(code)))
        return value

    def string() -> str:
        length = int(number("Q"))
        if length > _LONGEST_STRING:
            raise KeyError(length)
        return file.read(length).decode("utf-8")

    number("I")  # the version
    number("Q")  # of tensors
    facts: dict[str, Scalar] = {}
    for _ in range(int(number("Q"))):
        key, kind = string(), int(number("I"))
        if kind == _GGUF_ARRAY:
            break
        facts[key] = string() if kind == _GGUF_STRING else number(_GGUF_NUMBERS[kind])
    return facts


def _metadata(gguf: Path) -> tuple[dict[str, Scalar], NDArray[np.float32] | None, str]:
    """Scalar and string metadata of the file by key, its ``rope_freqs`` tensor (None where it has none), and the dtype that most of
    its layers' numbers have: bfloat16 for quantised ones, which say less than 16 bits can."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        # Arrays (vocabulary, merges) are long and transformers reads those itself.
        fields = {key: field.contents() for key, field in reader.fields.items() if len(field.types) == 1}
        factors = next((tensor.data.copy() for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
        counts: dict[str, int] = {}
        for tensor in reader.tensors:
            if tensor.name.startswith("blk."):
                kind = {"F32": "float32", "F16": "float16"}.get(tensor.tensor_type.name, "bfloat16")
                counts[kind] = counts.get(kind, 0) + int(tensor.n_elements)
    except Exception as error:  # the reader indexes into the file unguarded: anything may come out of a damaged one
        raise ModelError(f"{gguf} is a damaged GGUF file ({error}). Download it again.", param="model") from error
    return fields, factors, max(counts, key=counts.__getitem__, default="float32")


def _write(gguf: Path, folder: Path) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    metadata, rope_factors, kind = _metadata(gguf)
    dtype = getattr(torch, kind)
    _judge(gguf, metadata)
    architecture = str(metadata["general.architecture"])
    source = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        # transformers draws its progress bar here whatever its settings say.
        with contextlib.redirect_stderr(io.StringIO()):
            body = AutoConfig.from_pretrained(gguf.parent, **source).to_dict()
            for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "torch_dtype", "unk_token_id"):
                body.pop(key, None)
            # The file's own numbers win over transformers' reading of them, before any weight is shaped by them.
            clean = AutoConfig.for_model(**body | _repaired_numbers(metadata, architecture, rope_factors))
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
            how = {"config": copy.deepcopy(clean), "dtype": torch.float32, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, **source, **how)  # a pair, which its type does not say
            model, report = loaded
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError, NotImplementedError) as error:
        raise ModelError(
            f"{gguf.name} cannot be read by transformers ({error}). Use another quantisation of the model, or its safetensors.",
            param="model",
        ) from error
    missing = [name for name in report["missing_keys"] if not (name == "lm_head.weight" and clean.tie_word_embeddings)]
    if missing:
        raise ModelError(f"{gguf.name} lacks {len(missing)} tensors, such as {missing[0]}. Download it again.", param="model")
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if not name.endswith("rotary_emb.inv_freq")}
    if clean.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    clean.architectures = [type(model).__name__]
    clean.dtype = dtype
    clean.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    _repair_tokenizer(tokenizer, metadata)
    tokenizer.save_pretrained(folder)
    _tidy_tokenizer(folder, clean.vocab_size, clean.max_position_embeddings)


def _repaired_numbers(
    metadata: Mapping[str, Scalar], architecture: str, rope_factors: NDArray[np.float32] | None
) -> dict[str, object]:
    """Configuration entries as the file has them. GGUF numbers are float32: 1e-5 comes back as 9.99e-06 unless shortened."""
    import numpy as np

    def number(key: str) -> float | None:
        value = metadata.get(f"{architecture}.{key}")
        return None if value is None else float(str(np.float32(value)))

    hidden, heads = int(metadata[f"{architecture}.embedding_length"]), int(metadata[f"{architecture}.attention.head_count"])
    repaired: dict[str, object] = {"head_dim": int(metadata.get(f"{architecture}.attention.key_length") or hidden // heads)}
    if epsilon := number("attention.layer_norm_rms_epsilon"):
        repaired["rms_norm_eps"] = epsilon
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": number("rope.freq_base") or 10_000.0}
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if rope_factors is not None:
        # The factor of the slowest frequencies is the scaling itself.
        rope |= {**_LLAMA3_ROPE, "factor": float(rope_factors.max())}
    elif scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": number("rope.scaling.factor") or 1.0}
        if original := metadata.get(f"{architecture}.rope.scaling.original_context_length"):
            rope["original_max_position_embeddings"] = int(original)
    elif scaling != "none":
        raise UnsupportedModelError(
            f"Rotary scaling {scaling!r} cannot be taken from a GGUF file. Use the model's safetensors.", param="model"
        )
    return repaired | {"rope_parameters": rope}


def _repair_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Scalar]) -> None:
    from tokenizers import pre_tokenizers, processors

    backend = tokenizer.backend_tokenizer
    if metadata.get("tokenizer.ggml.pre") in _DIGIT_SPLITTING:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    for name in ("bos", "eos", "padding", "unknown"):
        attribute = {"padding": "pad_token", "unknown": "unk_token"}.get(name, f"{name}_token")
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(index)))
    # llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if add_bos and bos is not None and tokenizer("a")["input_ids"][:1] != [bos_id]:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bos_id)]
        )
    template = metadata.get("tokenizer.chat_template")
    if template and not tokenizer.chat_template:
        tokenizer.chat_template = template


def _tidy_tokenizer(folder: Path, vocabulary: int, context: int) -> None:
    """Leave files that every transformers release reads, without what transformers adds to them.

    That is: traces of the loading call, a class name only new releases know, and special tokens of GPT-2 that the file does not
    have, which would get numbers beyond the model's ``vocabulary``.
    """
    path = folder / "tokenizer.json"
    body = json.loads(path.read_text())
    surplus = {token["content"] for token in body["added_tokens"] if token["id"] >= vocabulary}
    body["added_tokens"] = [token for token in body["added_tokens"] if token["content"] not in surplus]
    path.write_text(json.dumps(body, ensure_ascii=False))

    path = folder / "tokenizer_config.json"
    body = json.loads(path.read_text())
    for key in ("backend", "is_local", "local_files_only", *(key for key, value in body.items() if str(value) in surplus)):
        body.pop(key, None)
    body |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
