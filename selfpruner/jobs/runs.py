"""A folder of searches in this process: its database, and which job a call means.

    selfpruner.db, checkpoint/, result.json      of the first search
    checkpoint-2/, result-2.json                 of the next one there: with other settings, or `again`

A call with the same settings continues an unfinished search, and returns at once what a finished one found. If a search failed, the
next call with the same settings takes over what it computed. A server's jobs, where the folder is its home too, are left to it.
Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from selfpruner import models
from selfpruner.config import SearchConfig
from selfpruner.errors import ConfigError, ConflictError, NotFoundError, StoreError
from selfpruner.evolution.windows import Windows
from selfpruner.files import atomic, manifest, places
from selfpruner.files.report import Report
from selfpruner.store.store import Store
from selfpruner.store.tables import Checkpoint, Job

DATABASE = "selfpruner.db"
CHECKPOINT = "checkpoint"
ALL = 1_000_000


@dataclass(frozen=True, slots=True)
class Run:
    """The job a call means. ``checkpoint`` and ``result`` are its places in the folder; ``done`` is the row of its checkpoint where
    the search has finished and the checkpoint is still what it was."""

    job: Job
    checkpoint: Path
    result: Path
    done: Checkpoint | None = None

    def write_result(self, report: Report) -> None:
        atomic.write_text(self.result, json.dumps(report, indent=2) + "\n")


def database(source: Path | str, begin: str = "There") -> Path:
    """The database of a folder of searches, or that file itself. Raises NotFoundError, whose message begins as given, where there
    is none."""
    file = Path(source) / DATABASE if Path(source).is_dir() else Path(source)
    if not file.is_file():
        raise NotFoundError(f"{begin} is no database of a search at {file}.", param="source")
    return file


def reading(database: Path) -> Store:
    """The jobs of a folder, to be read. A database of an earlier release is brought up to date first: here is no server that would
    do it. Raises StoreError where a process of that release still writes it."""
    try:
        return Store(database, read_only=True)
    except StoreError as error:
        if error.code != "store_older":
            raise
    Store(database).close()
    return Store(database, read_only=True)


def checkpoint_folder(folder: Path, job: Job) -> Path:
    """Where the checkpoint of a job in ``folder`` is, or will be. Raises ConflictError for a server's, which keeps it elsewhere."""
    return folder / _name(job)


def refuse(folder: Path, config: SearchConfig) -> None:
    """Raise what can be raised before anything is written: for a model that cannot be pruned, a fitness text too short for the
    stages, a folder that cannot be, or with something else where a first checkpoint would go. Where there is a search already the
    rest is :func:`find`'s to say: what it found is shown although its model may be gone."""
    Windows.of(config)
    places.writable_folder(folder)
    if not (folder / DATABASE).is_file():
        models.precheck(config.model)
    place = folder / CHECKPOINT
    if not (folder / DATABASE).is_file() and _occupied(place):
        raise ConfigError(f"{place} is there already, and no search in {folder} made it; name another folder.", param="output")


def find(store: Store, folder: Path, config: SearchConfig, *, again: bool) -> Run:
    """The job that a call with ``config`` means, made if there is none. Raises, where there is work to do, what
    :func:`selfpruner.models.precheck` does."""
    jobs = [job for job in store.jobs(limit=ALL).data if job.checkpoint_number is not None]
    mine = [job for job in jobs if _settings(job.config) == config.model_dump(mode="json")]
    waiting = next((job for job in mine if not job.finished), None)
    if waiting is not None:
        models.precheck(config.model)
        return _run(folder, waiting)
    if not again:
        for job in mine:
            if job.status == "succeeded":
                done = _intact(store, job, checkpoint_folder(folder, job))
                if done is None:
                    models.precheck(config.model)
                return _run(folder, job, done)
    models.precheck(config.model)
    job, _ = store.create_job(config, checkpoint_number=_free(folder, jobs))
    if not again and (failed := next((job for job in mine if job.status == "failed"), None)) is not None:
        store.take_over(job.id, failed.id)
    return _run(folder, job)


def _settings(stored: Mapping[str, object]) -> dict[str, object]:
    """A stored config as this version would store it: an older one lacks fields that came since."""
    try:
        return SearchConfig.model_validate(dict(stored)).model_dump(mode="json")
    except ValidationError:
        return dict(stored)


def _free(folder: Path, jobs: Sequence[Job]) -> int:
    """The number of a new checkpoint, which no job has; a failed or cancelled one has none."""
    taken = {job.checkpoint_number for job in jobs if job.status not in ("failed", "cancelled")}
    number = 1
    while number in taken or _occupied(folder / _named(number)):
        number += 1
    return number


def _occupied(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _name(job: Job) -> str:
    if job.checkpoint_number is None:
        raise ConflictError(
            f"Job {job.id} is a server's. Start that with `selfpruner serve --home`, and name the job alone, not its folder."
        )
    return _named(job.checkpoint_number)


def _named(number: int) -> str:
    return CHECKPOINT if number == 1 else f"{CHECKPOINT}-{number}"


def _run(folder: Path, job: Job, done: Checkpoint | None = None) -> Run:
    name = _name(job)
    return Run(job, checkpoint_folder(folder, job), folder / f"result{name.removeprefix(CHECKPOINT)}.json", done)


def _intact(store: Store, job: Job, place: Path) -> Checkpoint | None:
    """The row of the job's checkpoint in ``place``, if its manifest is still the one that was recorded and its files are there."""
    listed = place / manifest.NAME
    for row in store.checkpoints(job.id):
        if listed.is_file() and manifest.sha256(listed) == row.manifest_sha256:
            files = manifest.read(place)["files"].items()
            if all((place / name).is_file() and (place / name).stat().st_size == entry["bytes"] for name, entry in files):
                return row
    return None
