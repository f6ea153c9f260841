"""What a request may name: models, texts, proposers and devices. SearchConfig judges everything else about a request.

A request never holds a path that the operator did not open: local models lie below ``model_root``, text files below ``text_root``,
hub ids match the operator's list, and proposers and devices are the configured ones. Errors list what is allowed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from selfpruner import models
from selfpruner.calibration import files
from selfpruner.catalogue import EMBEDDED_MODELS, check_proposer
from selfpruner.config import SearchConfig, Source, TextConfig
from selfpruner.errors import ConfigError, ModelNotFoundError, TextError, UnknownNameError
from selfpruner.evolution.windows import Windows
from server.settings import ServerSettings

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
HUB_TEXT = re.compile(r"hub:[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(:[\w.-]*){0,3}")


def admit(config: SearchConfig, settings: ServerSettings) -> SearchConfig:
    """The config with local paths made absolute; raises a ConfigError or ModelNotFoundError that names what is allowed, and
    what :func:`selfpruner.models.precheck` does: what is no model, or of an unknown family, is refused before it is queued."""
    check_proposer(config.proposer, settings.all_proposers)
    _check_device(config.device, settings.devices)
    Windows.of(config)  # raises for a fitness text too short for the stages
    model = _model(config.model, settings)
    models.precheck(model)
    return config.model_copy(
        update={
            "model": model,
            **{field: _text(getattr(config, field), field, settings) for field in ("calibration", "fitness_text", "report_text")},
        }
    )


def local_models(settings: ServerSettings) -> list[str]:
    """Names, relative to ``model_root``, of the folders with a config.json and the GGUF files at most two levels below it."""
    root = settings.model_root
    if root is None:
        return []
    folders = (path.parent for pattern in ("*/config.json", "*/*/config.json") for path in root.glob(pattern))
    files = (path for pattern in ("*.gguf", "*/*.gguf") for path in root.glob(pattern))
    names = {str(path.relative_to(root)) for path in (*folders, *files)}
    return sorted(name for name in names if _below(root, name) is not None)


def _model(name: str, settings: ServerSettings) -> str:
    if name in EMBEDDED_MODELS:
        return name
    root = settings.model_root
    if root is not None and _printable(name) and "://" not in name:
        path = _below(root, name)
        if path is not None and path.exists():
            return str(path)
    # A hub id that is also a path of the server's working directory would open that folder instead.
    if HUB_ID.fullmatch(name) and ".." not in name and not Path(name).exists():
        if any(fnmatchcase(name, pattern) for pattern in settings.hub_ids):
            return name
        raise ModelNotFoundError(f"This server does not offer {name!r}. {_offer(settings)}", param="model")
    raise ModelNotFoundError(
        f"No model {name!r} here: neither an embedded name, nor a hub id like 'org/name', nor a folder or .gguf file below the "
        f"server's model root. {_offer(settings)}",
        param="model",
    )


def _offer(settings: ServerSettings) -> str:
    offered = [*EMBEDDED_MODELS, *local_models(settings)[:20], *settings.hub_ids]
    return f"It offers: {', '.join(offered)}. The operator adds more with SELFPRUNER_MODEL_ROOT and SELFPRUNER_MODELS."


def _text(text: TextConfig, field: str, settings: ServerSettings) -> TextConfig:
    sources = tuple(
        Source(source=_source(source.source, f"{field}.sources.{index}.source", settings), weight=source.weight)
        for index, source in enumerate(text.sources)
    )
    return text.model_copy(update={"sources": sources})


def _source(name: str, param: str, settings: ServerSettings) -> str:
    if name in files.WORDS or (HUB_TEXT.fullmatch(name) and ".." not in name):
        return name
    root = settings.text_root
    if root is not None and files.is_file_name(name) and _printable(name) and "://" not in name:
        with contextlib.suppress(files.NoFileError):
            file = files.find(name, root)
            try:
                file.check()
            except TextError as error:
                error.param = param
                raise
            return file.name
    where = f"a text file or JSON lines below {root}" if root is not None else "a file, once the operator sets SELFPRUNER_TEXT_ROOT"
    raise ConfigError(
        f"No text source {name!r} here. Use one of {', '.join(files.WORDS)}, 'hub:DATASET[:CONFIG[:SPLIT[:FIELD]]]', or {where}.",
        code="unknown_name",
        param=param,
    )


def _check_device(device: str, served: Iterable[str]) -> None:
    served = tuple(served)
    if device != "auto" and "auto" not in served and device not in served:
        raise UnknownNameError("device", device, ("auto", *served))


def _below(root: Path, name: str) -> Path | None:
    """``root / name`` with links resolved, when that is still below ``root``."""
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a null byte
        return None
    return path if path.is_relative_to(root) and path != root else None


def _printable(name: str) -> bool:
    return name.isprintable() and "\\" not in name
