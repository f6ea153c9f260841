"""The manifest: sha256 and size of every file of a checkpoint. It is written last, so a folder that has one is complete.

    {format, created_at, plan, export, parameters, verification, files: {name: {sha256, bytes}}}

``format`` is the manifest's own version. ``plan`` is the content of plan.json; ``export`` says which export format the folder has,
and of a converted one from which checkpoint. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NotRequired, TypedDict

from selfpruner.errors import CorruptCheckpointError, ExportError
from selfpruner.files.atomic import sync

NAME = "manifest.json"
FORMAT = 1


class LayerCounts(TypedDict):
    query_heads: int
    kv_groups: int
    ffn_channels: int


class PlanFile(TypedDict):
    """The content of plan.json. ``rate`` is removed / original parameters of ``of``, ``layer_rates`` the same per layer;
    ``parameters`` are those of the pruned model, ``nonzeros`` those of them that a pattern did not make zero."""

    base_model: str
    made_from: dict[str, str]
    family: str
    dtype: str
    parameters: int
    rate: float | None
    of: str
    pattern: str
    criterion: str
    compensation: str
    calibration: list[str]
    plan_hash: str
    levels: list[int]
    layer_rates: list[float]
    nonzeros: NotRequired[int]
    layers: list[LayerCounts]


class ExportFacts(TypedDict):
    """``checkpoint``: the sha256 of the manifest of the checkpoint that was converted."""

    format: str
    checkpoint: NotRequired[str]
    quantize: NotRequired[str]


class Verification(TypedDict, total=False):
    """What a verifier found, as far as others read it; the rest is for people. Nothing is wrong where ``problems`` is empty."""

    problems: list[str]
    out_of_memory: bool
    transformers: str
    greedy: str
    error: float
    allowed_error: float
    max_difference: float
    allowed_difference: float


class FileEntry(TypedDict):
    sha256: str
    bytes: int


class Manifest(TypedDict):
    """The content of manifest.json."""

    format: int
    created_at: str
    plan: PlanFile
    export: ExportFacts
    parameters: int
    verification: Verification
    files: dict[str, FileEntry]


CHECKPOINT: ExportFacts = {"format": "transformers"}  # what a search exports


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(
    directory: Path,
    *,
    plan: PlanFile,
    parameters: int,
    verification: Verification,
    export: ExportFacts = CHECKPOINT,
) -> str:
    """List every file of ``directory`` in its manifest, durably, and return the manifest's own sha256."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    body = {
        "format": FORMAT,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan": plan,
        "export": export,
        "parameters": parameters,
        "verification": verification,
        "files": {path.relative_to(directory).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files},
    }
    target = directory / NAME
    target.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    sync(target)
    sync(directory)
    return sha256(target)


def kept(plan: PlanFile) -> int:
    """Parameters of the pruned model by its plan.json, without those that a pattern made zero: what reports and tables count."""
    return plan.get("nonzeros") or plan["parameters"]


def read(directory: Path) -> Manifest:
    """Raises ExportError when there is no manifest, CorruptCheckpointError when it is not one of ours."""
    path = directory / NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(directory) from None
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read ({error}). Export the checkpoint again.") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT or not isinstance(body.get("files"), dict):
        raise CorruptCheckpointError(f"{path} is not a manifest of format {FORMAT}. Export the checkpoint again.")
    body.setdefault("export", CHECKPOINT)  # a manifest from before there were other formats
    found: Manifest = body  # type: ignore[assignment] # beyond that sha256 says whether it is what was written
    return found


def _absent(directory: Path) -> ExportError:
    """Why there is no manifest, and what to do."""
    no = f"{directory} holds no {NAME}: "
    if directory.is_file():
        return ExportError(f"{directory} is a file; name the folder of a checkpoint.")
    if not directory.is_dir():
        return ExportError(f"{no}there is no such folder.")
    if (directory / "plan.json").exists():
        return ExportError(f"{no}the checkpoint is incomplete. Copy all of it, or export it again.")
    if (directory / "config.json").exists():
        return ExportError(
            f"{no}it was not exported by selfpruner, or trained further and saved since, so there is nothing to compare it with. "
            f"It can be evaluated and benchmarked as it is, and `selfpruner export {directory} -o FOLDER` makes a checkpoint of it."
        )
    if (directory / "adapter_config.json").exists():
        return ExportError(
            f"{no}it is an adapter. Merge it into its model (merge_and_unload), save that with its tokenizer, and name its folder."
        )
    return ExportError(f"{no}it is no checkpoint.")


def check(directory: Path, cancelled: Callable[[], None] = lambda: None) -> Manifest:
    """Compare every listed file with its size and sha256 and return the manifest; reads all bytes once.

    ``cancelled`` is called between files and may raise. Raises as :func:`read`, and CorruptCheckpointError naming the first
    file that is missing, of another size, or changed.
    """
    body = read(directory)
    for name, entry in body["files"].items():
        cancelled()
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()) or not path.is_file():
            raise CorruptCheckpointError(f"{name} is listed in {directory / NAME} but missing. Export the checkpoint again.")
        if path.stat().st_size != entry["bytes"]:
            problem = f"has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
        elif sha256(path) != entry["sha256"]:
            problem = "does not match its sha256"
        else:
            continue
        raise CorruptCheckpointError(
            f"{path} {problem}. Export the checkpoint again, or copy it again from where it is intact. Where a model was trained "
            "further and saved over its checkpoint, save it to a folder of its own."
        )
    return body
