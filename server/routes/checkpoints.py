"""``/v1/jobs/{id}/checkpoints``: what a job exported, and its files.

A file is served only under a name that the manifest lists, and only while its content matches: the manifest's own sha256 is in
the database, the others' are in the manifest. What does not match is code ``corrupt``, never a reply with bytes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import FileResponse

from selfpruner import manifest
from selfpruner.errors import CorruptCheckpointError, NotFoundError
from selfpruner.store.store import Store
from selfpruner.store.tables import Checkpoint
from server.errors import responses
from server.routes.dependencies import Cursor, Limit, OwnJob, TheStore
from server.schemas import CheckpointObject, FileObject, ListObject

router = APIRouter(prefix="/v1/jobs/{job_id}/checkpoints", tags=["checkpoints"])
CheckpointId = Annotated[str, Path(max_length=64)]


@router.get("", responses=responses(404))
def list_checkpoints(job: OwnJob, store: TheStore, after: Cursor = None, limit: Limit = 20) -> ListObject[CheckpointObject]:
    """Oldest first."""
    rows = store.checkpoints(job.id)
    if after is not None:
        place = next((index for index, row in enumerate(rows) if row.id == after), None)
        if place is None:
            raise NotFoundError(f"No checkpoint {after!r} in job {job.id}. Use the last id of the page before.", param="after")
        rows = rows[place + 1 :]
    data = [CheckpointObject.of(row) for row in rows[:limit]]
    return ListObject[CheckpointObject].of(data, len(rows) > limit)


@router.get("/{checkpoint_id}", responses=responses(404))
def retrieve_checkpoint(job: OwnJob, checkpoint_id: CheckpointId, store: TheStore) -> CheckpointObject:
    return CheckpointObject.of(_row(job.id, checkpoint_id, store))


@router.get("/{checkpoint_id}/files", responses=responses(404))
def list_files(job: OwnJob, checkpoint_id: CheckpointId, store: TheStore) -> ListObject[FileObject]:
    """Every file with its sha256, the manifest last; not paged."""
    files = _files(_row(job.id, checkpoint_id, store))
    return ListObject[FileObject].of(list(files.values()), False)


@router.get(
    "/{checkpoint_id}/files/{name:path}",
    response_class=FileResponse,
    responses={
        **responses(404),
        200: {"content": {"application/octet-stream": {}}, "description": "The file; ranges are possible"},
    },
)
def retrieve_file(
    job: OwnJob, checkpoint_id: CheckpointId, name: Annotated[str, Path(max_length=255)], store: TheStore
) -> FileResponse:
    row = _row(job.id, checkpoint_id, store)
    file = _files(row).get(name)
    if file is None:
        raise NotFoundError(f"Checkpoint {checkpoint_id} has no file {name!r}. List them with .../{checkpoint_id}/files.")
    path = FilePath(row.path) / name
    _check(path, file.sha256)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name, headers={"etag": f'"{file.sha256}"'})


def _row(job_id: str, checkpoint_id: str, store: Store) -> Checkpoint:
    row = store.checkpoint(checkpoint_id)
    if row.job_id != job_id:
        raise NotFoundError(f"No checkpoint {checkpoint_id!r} in job {job_id}. List them with /v1/jobs/{job_id}/checkpoints.")
    return row


def _files(row: Checkpoint) -> dict[str, FileObject]:
    folder = FilePath(row.path)
    listed = manifest.read(folder)["files"]
    _check(folder / manifest.NAME, row.manifest_sha256)
    files = {name: FileObject(id=name, bytes=entry["bytes"], sha256=entry["sha256"]) for name, entry in listed.items()}
    size = (folder / manifest.NAME).stat().st_size
    return {**files, manifest.NAME: FileObject(id=manifest.NAME, bytes=size, sha256=row.manifest_sha256)}


def _check(path: FilePath, sha256: str) -> None:
    try:
        stat = path.stat()
        found = _digest(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise CorruptCheckpointError(f"{path.name} cannot be read ({error.strerror}). Run the job again.") from error
    if found != sha256:
        raise CorruptCheckpointError(f"{path.name} does not match its sha256: it was changed or cut off. Run the job again.")


@lru_cache(maxsize=256)
def _digest(path: FilePath, _inode: int, _size: int, _modified: int) -> str:
    """A file is read once, however often a client asks for parts of it."""
    return manifest.sha256(path)
