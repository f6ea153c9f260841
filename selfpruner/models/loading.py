"""From a checked folder to a loaded dense model, whole or streamed; device and type are chosen here.

torch and transformers are imported only when something is loaded.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from selfpruner import catalogue
from selfpruner.errors import ConfigError, ModelError, OutOfMemoryError, TextError
from selfpruner.models import checks
from selfpruner.models.sources import ModelSource, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What else a model in memory needs: streams, levels that differ from the model's own weights, and the work itself.
RESIDENT_FACTOR = 1.3


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A dense model in evaluation mode, without gradients, on one device.

    ``dtype`` is what is computed in, ``written`` what a checkpoint made of the model has: the type of its files, unless another
    was asked for; None where that is ``dtype``. ``memory`` is the ceiling in bytes on what the model and the work with it may take
    there, None for no ceiling; ``streamed``: its weights stay in their files (see :mod:`selfpruner.models.streaming`).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    dtype: torch.dtype
    memory: int | None = None
    streamed: bool = False
    written: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.model.parameters() if not p.is_meta)  # norms are always there


def load(source: ModelSource, device: str = "auto", dtype: str = "auto", memory: int | None = None) -> LoadedModel:
    """Load a resolved model. ``device`` and ``dtype`` may be ``auto``, see :func:`choose_device` and :func:`choose_dtype`.

    ``memory`` (bytes) bounds what the model and the work with it may take on the device; the program itself comes on top. A model
    that does not fit, or not into what a GPU has free, stays in its files and is streamed. Raises :class:`ModelError` when
    weights or tokenizer do not fit together, :class:`OutOfMemoryError`, :class:`ConfigError` for a ceiling too low to stream.
    """
    import torch
    from transformers import AutoTokenizer

    target = choose_device(device)
    stored = checks.stored_dtype(source.folder)
    chosen = choose_dtype(dtype, target, stored=stored)
    written = getattr(torch, stored) if dtype == "auto" else chosen
    room = memory if memory is not None else _free_memory(target)
    weights, layer = checks.weight_bytes(source.folder, chosen.itemsize)
    streamed = room is not None and weights * RESIDENT_FACTOR > room
    # In the order of what they cost: a file that is wrong is found before the weights are read.
    with _reading(f"config.json of {source.folder}", "Compare it with the one the model was published with."):
        with quiet():
            config = read_config(source)
        # How a model is run is the runner's to choose. Its last training may have left notes of that in the file.
        config._attn_implementation = None
        config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    advice = "Copy the model's own tokenizer files into the folder, tokenizer.json among them."
    with _reading(f"The tokenizer of {source.folder}", advice), quiet():
        how = {"config": config, "local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **how)
    try:
        with _reading(str(source.folder), "Download the model again."):
            # A streamed model's checkpoint is streamed too, in its own type.
            layer = max(layer, layer // chosen.itemsize * written.itemsize)
            model = _model(source, config, target, chosen, room if streamed else None, layer)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"{source.name} in {chosen} does not fit the memory of {target}. Use another device or a smaller model."
        ) from error
    return LoadedModel(model, tokenizer, source, chosen, room if streamed else memory, streamed, written)


def read_config(source: ModelSource) -> PreTrainedConfig:
    """transformers' configuration of a resolved model, its ``dtype`` what its files have: what ``config.json`` says of that is a
    note, which differs among versions and may be wrong."""
    mapping = importlib.import_module("transformers.models.auto.configuration_auto")
    body = {key: value for key, value in source.config.items() if key not in ("dtype", "torch_dtype")}
    config: PreTrainedConfig = mapping.CONFIG_MAPPING[source.model_type].from_dict(body)
    config.dtype = getattr(importlib.import_module("torch"), checks.stored_dtype(source.folder))
    return config


def as_written(loaded: LoadedModel, memory: int | None) -> LoadedModel:
    """The same model, streamed from its files in the type that a checkpoint of it has, within ``memory`` bytes."""
    from selfpruner.models import streaming

    written = loaded.written or loaded.dtype
    with _reading(str(loaded.source.folder), "Download the model again."):
        paths = checks.weight_files(loaded.source.folder)
        model = streaming.stream(read_config(loaded.source), paths, loaded.device, written, memory or 0)
    model.generation_config = loaded.model.generation_config
    return replace(loaded, model=model, dtype=written, memory=memory, streamed=True)


def check_ids(ids: Iterable[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Raise TextError where ``what`` holds a token that the model has no row for.

    A tokenizer may know more than its model: Gemma 3's has an image token, the first Llama 2's a padding token. Such tokens are in
    no ordinary text.
    """
    rows = int(model.config.get_text_config().vocab_size)
    beyond = max(ids, default=0)
    if beyond >= rows:
        names = tokenizer
        raise TextError(
            f"{what} holds the token {names.convert_ids_to_tokens(beyond)!r} (id {beyond}), for which the model has no embedding "
            f"(it has {rows:,}). Take the token out of the text; or, where ordinary text has such ids, copy the tokenizer files "
            "that belong to the model."
        )


@contextmanager
def _reading(what: str, advice: str) -> Iterator[None]:
    """Silence, and a :class:`ModelError` for whatever transformers or safetensors raise of the files being read."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    damage = (
        SafetensorError,
        StrictDataclassError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        AttributeError,
        ImportError,
        AssertionError,
    )
    try:
        with quiet():
            yield
    except torch.OutOfMemoryError:
        raise
    except damage as error:
        raise ModelError(f"{what} cannot be loaded ({error}). {advice}", param="model") from error


def _model(
    source: ModelSource, config: PreTrainedConfig, target: torch.device, dtype: torch.dtype, memory: int | None, layer_bytes: int
) -> PreTrainedModel:
    """The model whole, or streamed within ``memory``."""
    from selfpruner.models import streaming

    auto = importlib.import_module("transformers")
    paths = checks.weight_files(source.folder)
    if memory is None:
        model = streaming.whole(config, paths, target, dtype)
    else:
        check_ceiling(source.name, memory, layer_bytes, target)
        model = streaming.stream(config, paths, target, dtype, memory)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = auto.GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    return model


def check_ceiling(name: str, memory: int, layer_bytes: int, target: torch.device) -> None:
    """Raise ConfigError where a model whose largest layer has so many bytes cannot be streamed within ``memory``."""
    from selfpruner.models import streaming

    if memory < (least := streaming.least_memory(layer_bytes, target)):
        raise ConfigError(
            f"{name} cannot be worked on in {memory / 2**20:,.0f} MiB. Set memory to {-(-least >> 20)}MiB or more, or use a "
            "device that has it.",
            param="memory",
        )


def _free_memory(device: torch.device) -> int | None:
    """What a GPU has free, less a tenth for what its libraries take; None elsewhere."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0] * 0.9) if device.type == "cuda" else None


def choose_device(device: str) -> torch.device:
    """The torch device for ``auto``, ``cpu``, ``mps`` or ``cuda[:N]``. Raises :class:`ConfigError` for one that is not here."""
    import torch

    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    here = devices_here()
    target = torch.device(catalogue.check_device(device, here))
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda:0")
    if str(target) not in here:
        raise ConfigError(f"Device {device!r} is not here. This machine has: {', '.join(here)}.", param="device")
    return target


def devices_here() -> list[str]:
    """The names of this machine's devices."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(["mps"] if torch.backends.mps.is_available() else []), *(f"cuda:{number}" for number in range(gpus))]


def choose_dtype(dtype: str, device: torch.device, *, stored: str | None = None) -> torch.dtype:
    """The torch dtype to compute in, for ``auto`` or a name. ``auto``: on a GPU the checkpoint's ``stored`` half type, bfloat16 for
    a float32 checkpoint where CUDA has it; on CPU bfloat16 where it is faster than float32; else float32."""
    import torch

    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto":
        if dtype not in named:
            raise ConfigError(f"Unknown dtype {dtype!r}. Use auto, {', '.join(named)}.", param="dtype")
        return named[dtype]
    if device.type == "cpu":
        return torch.bfloat16 if _bfloat16_is_fast() else torch.float32
    if stored in ("bfloat16", "float16"):
        return named[stored]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


@functools.cache
def _bfloat16_is_fast() -> bool:
    """Does this CPU multiply bfloat16 matrices in hardware? x86 says so in its flags; anything else is measured."""
    import torch

    try:
        flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), None)
    except OSError:
        flags = None
    if flags is not None:
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())

    def seconds(kind: torch.dtype) -> float:
        a, b = torch.ones(256, 512, dtype=kind), torch.ones(512, 512, dtype=kind)
        a @ b
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            runs.append(time.perf_counter() - start)
        return min(runs)

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)
