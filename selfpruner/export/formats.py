"""The export formats by name: write a checkpoint in one of them, and prove it again later.

:mod:`selfpruner.export.base` says what a format does itself and what is done here for all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TypedDict

from selfpruner import catalogue
from selfpruner.errors import ExportError, FormatError
from selfpruner.export import proof
from selfpruner.export.base import FinishedCheckpoint, Format
from selfpruner.export.card import converted
from selfpruner.export.checkpoint import copy_terms, stopper
from selfpruner.export.folder import Exported, write_folder
from selfpruner.export.transformers_format import Transformers
from selfpruner.files import manifest
from selfpruner.files.manifest import ExportFacts, PlanFile, Verification
from selfpruner.progress import OnProgress, shown

FORMATS: dict[str, type[Format]] = {name: entry.load() for name, entry in catalogue.FORMATS.items()}


def create(name: str) -> Format:
    """The format of that name. Raises UnknownNameError."""
    catalogue.check("export format", name, catalogue.FORMATS, param="format")
    return FORMATS[name]()


def asked(name: str, quantize: str | None, tensor_parallel: int) -> Format:
    """The format of that name, if it knows these options. Raises UnknownNameError and FormatError."""
    form = create(name)
    if quantize is not None and quantize not in form.quantizations:
        known = f"It knows {', '.join(form.quantizations)}." if form.quantizations else "It knows none."
        raise FormatError(f"The format {name} has no quantization {quantize!r}. {known}", param="quantize")
    if tensor_parallel > 1 and name != Transformers.name:
        raise FormatError(
            f"tensor_parallel is a matter of the format transformers; leave it out with {name}.", param="tensor_parallel"
        )
    return form


def convert(
    source: Path | str,
    directory: Path | str,
    name: str,
    *,
    quantize: str | None = None,
    tensor_parallel: int = 1,
    device: str = "cpu",
    cancelled: Callable[[], bool] = lambda: False,
    progress: OnProgress = lambda _: None,
) -> Exported:
    """Write the checkpoint in ``source`` to ``directory`` in the format ``name``, verified on ``device``.

    ``tensor_parallel`` refuses a checkpoint whose layers do not divide among so many ranks.

    A complete export of the same checkpoint and options in ``directory`` is kept. Raises FormatError for what the format cannot
    take, before anything is written; CorruptCheckpointError naming a file of ``source``; ExportError, DiskFullError and
    CancelledTaskError, which leave nothing behind.
    """
    form, folder, go_on = asked(name, quantize, tensor_parallel), Path(source), stopper(cancelled)
    if Path(directory).resolve() == folder.resolve():
        raise ExportError(f"{folder} is the checkpoint itself; choose another folder for the export.")
    checkpoint = FinishedCheckpoint.open(folder, go_on)
    form.check(checkpoint, quantize)
    if tensor_parallel > 1:
        _check_ranks(checkpoint, tensor_parallel)
    export: ExportFacts = {"format": name, "checkpoint": manifest.sha256(folder / manifest.NAME)}
    if quantize is not None:
        export["quantize"] = quantize

    def fill(place: Path) -> int:
        shutil.copyfile(folder / "plan.json", place / "plan.json")
        copy_terms(folder, place)
        card = converted((folder / "README.md").read_text("utf-8"), form.library, form.relation, form.use(checkpoint, quantize))
        (place / "README.md").write_text(card, "utf-8")
        parameters = form.write(checkpoint, place, quantize, go_on)
        if not (place / proof.REFERENCE).exists():  # a copy of the checkpoint has its own
            proof.copy_reference(folder, place, parameters)
        return parameters

    def prove(place: Path) -> Verification:
        reference = place / proof.REFERENCE
        return proof.refused(proof.prove(lambda where: form.verifier(place, reference, where), device, go_on))

    return write_folder(
        Path(directory), plan=checkpoint.plan, export=export, fill=fill, prove=prove, go_on=go_on, progress=progress
    )


def _check_ranks(checkpoint: FinishedCheckpoint, ranks: int) -> None:
    for layer, shape in enumerate(checkpoint.shapes):
        # Where there are fewer KV heads than ranks, runtimes give every rank a copy.
        whole = shape.kv_groups == 0 or shape.kv_groups % ranks == 0 or ranks % shape.kv_groups == 0
        if not whole or shape.heads % ranks or shape.channels % ranks:
            raise FormatError(
                f"Layer {layer} keeps {shape.heads} query heads, {shape.kv_groups} KV heads and {shape.channels} FFN channels, "
                f"which do not divide among {ranks} ranks. A search with tensor_parallel {ranks} keeps numbers that do.",
                param="tensor_parallel",
            )


class Proof(TypedDict):
    """What :func:`verify` says of an export that is good."""

    path: str
    format: str
    parameters: int
    files: int
    bytes: int
    plan: PlanFile
    verification: Verification


def verify(
    directory: Path | str,
    *,
    device: str = "cpu",
    memory: int | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: bool | OnProgress = True,
) -> Proof:
    """Prove an export again: the sha256 of every file, then, in a fresh process, that it loads and computes what it did in memory
    when it was made. Code that the folder brings is run only where it is this version's own.

    With ``memory``, in bytes, what transformers would load is streamed from its files instead. Returns ``{path, format,
    parameters, files, bytes, plan, verification}``. Raises CorruptCheckpointError naming the file that was changed, and ExportError
    for a folder that is incomplete, that no longer computes the same, or that keeps no reference.
    """
    folder, go_on = Path(directory), stopper(cancelled)
    seen, total = count(1), len(manifest.read(folder)["files"])

    def arguments(place: str) -> list[str]:
        reference = folder / proof.REFERENCE
        if isinstance(form, Transformers):
            return form.verifier(folder, reference, place, memory)
        return form.verifier(folder, reference, place)

    with shown(progress) as tell:

        def next_file() -> None:
            go_on()
            tell(f"sha256 of file {next(seen)} of {total}")

        body = manifest.check(folder, next_file)
        form = create(body["export"]["format"])
        proof.check_reference(folder)
        if memory is not None and not isinstance(form, Transformers):
            raise FormatError(f"An export in the format {form.name} cannot be streamed; leave out memory.", param="memory")
        tell("loading it in a fresh process and computing again")
        result = proof.prove(arguments, device, go_on)
    if result["problems"]:
        then = body["verification"].get("transformers", "an unknown version")
        raise ExportError(
            f"Every file of {folder} matches its sha256, but it does not compute what it did: {'; '.join(result['problems'])}. "
            f"It was written with transformers {then}; here is {version('transformers')}."
        )
    return {
        "path": str(folder),
        "format": form.name,
        "parameters": manifest.kept(body["plan"]),
        "files": len(body["files"]),
        "bytes": sum(entry["bytes"] for entry in body["files"].values()),
        "plan": body["plan"],
        "verification": result,
    }
