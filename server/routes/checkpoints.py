"""``/v1/jobs/{id}/checkpoints``: what a job exported, its files one by one, and all of them as a tar archive.

A file is served only under a name that the manifest lists, and only while its content matches: the manifest's own sha256 is in
the database, the others' are in the manifest. A file that does not match is answered with code ``corrupt``, never with bytes. So
the first request for a file reads it once before it is answered. An archive is made while it is sent, and always has the same
bytes.
"""

from __future__ import annotations

import tarfile
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response, StreamingResponse

from selfpruner.errors import CorruptCheckpointError, NotFoundError
from selfpruner.files import manifest
from selfpruner.store.objects import CheckpointObject, FileObject, ListObject, checkpoint_object, list_object
from selfpruner.store.store import Store
from selfpruner.store.tables import Checkpoint
from server.errors import responses
from server.ranges import FilePart, reply
from server.routes.dependencies import Cursor, Limit, OwnJob, TheStore

router = APIRouter(prefix="/v1/jobs/{job_id}/checkpoints", tags=["checkpoints"])
CheckpointId = Annotated[str, Path(max_length=64)]


def _bytes(what: str, media: str = "application/octet-stream") -> dict[int | str, dict[str, object]]:
    """The replies of what is served in bytes."""
    return {
        **responses(404, 416),
        200: {"content": {media: {}}, "description": what},
        206: {"content": {media: {}}, "description": "The range that was asked for"},
        304: {"description": "The client has it already"},
    }


@router.get("", responses=responses(404))
def list_checkpoints(job: OwnJob, store: TheStore, after: Cursor = None, limit: Limit = 20) -> ListObject[CheckpointObject]:
    """Oldest first."""
    rows = store.checkpoints(job.id)
    if after is not None:
        place = next((index for index, row in enumerate(rows) if row.id == after), None)
        if place is None:
            raise NotFoundError(f"No checkpoint {after!r} in job {job.id}. Use the last id of the page before.", param="after")
        rows = rows[place + 1 :]
    data = [checkpoint_object(row) for row in rows[:limit]]
    return list_object(data, len(rows) > limit)


@router.get("/{checkpoint_id}", responses=responses(404))
def retrieve_checkpoint(job: OwnJob, checkpoint_id: CheckpointId, store: TheStore) -> CheckpointObject:
    return checkpoint_object(_row(job.id, checkpoint_id, store))


@router.get("/{checkpoint_id}/files", responses=responses(404))
def list_files(job: OwnJob, checkpoint_id: CheckpointId, store: TheStore) -> ListObject[FileObject]:
    """Every file with its sha256, the manifest last; not paged."""
    files = _files(_row(job.id, checkpoint_id, store))
    return list_object(list(files.values()))


@router.head("/{checkpoint_id}/files/{name:path}", include_in_schema=False)
@router.get("/{checkpoint_id}/files/{name:path}", response_class=StreamingResponse, responses=_bytes("The file"))
def retrieve_file(
    request: Request, job: OwnJob, checkpoint_id: CheckpointId, name: Annotated[str, Path(max_length=255)], store: TheStore
) -> Response:
    """The ETag is the file's sha256."""
    row = _row(job.id, checkpoint_id, store)
    file = _files(row).get(name)
    if file is None:
        raise NotFoundError(f"Checkpoint {checkpoint_id} has no file {name!r}. List them with .../{checkpoint_id}/files.")
    parts = [_part(FilePath(row.path), file)]
    return reply(request, parts, tag=file["sha256"], media_type="application/octet-stream", filename=FilePath(name).name)


@router.head("/{checkpoint_id}/archive", include_in_schema=False)
@router.get("/{checkpoint_id}/archive", response_class=StreamingResponse, responses=_bytes("The archive", "application/x-tar"))
def retrieve_archive(request: Request, job: OwnJob, checkpoint_id: CheckpointId, store: TheStore) -> Response:
    """All files in a folder named by the checkpoint's id, the manifest last: an archive that was cut off unpacks to a folder
    without one. The ETag is the manifest's sha256."""
    row = _row(job.id, checkpoint_id, store)
    parts = []
    for file in _files(row).values():
        parts += [_header(row, file), _part(FilePath(row.path), file), _padding(file["bytes"])]
    parts.append(FilePart(2 * tarfile.BLOCKSIZE, bytes(2 * tarfile.BLOCKSIZE)))
    return reply(request, parts, tag=row.manifest_sha256, media_type="application/x-tar", filename=f"{row.id}.tar")


def _header(row: Checkpoint, file: FileObject) -> FilePart:
    entry = tarfile.TarInfo(f"{row.id}/{file['id']}")
    entry.size, entry.mtime, entry.mode = file["bytes"], row.created_at, 0o644
    data = entry.tobuf(tarfile.PAX_FORMAT)
    return FilePart(len(data), data)


def _padding(size: int) -> FilePart:
    return FilePart(-size % tarfile.BLOCKSIZE, bytes(-size % tarfile.BLOCKSIZE))


def _part(folder: FilePath, file: FileObject) -> FilePart:
    path = folder / file["id"]
    _check(path, file["sha256"])
    return FilePart(file["bytes"], path=path)


def _row(job_id: str, checkpoint_id: str, store: Store) -> Checkpoint:
    row = store.checkpoint(checkpoint_id)
    if row.job_id != job_id:
        raise NotFoundError(f"No checkpoint {checkpoint_id!r} in job {job_id}. List them with /v1/jobs/{job_id}/checkpoints.")
    return row


def _files(row: Checkpoint) -> dict[str, FileObject]:
    folder = FilePath(row.path)
    listed = manifest.read(folder)["files"]
    _check(folder / manifest.NAME, row.manifest_sha256)
    files = {name: _file(name, entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    size = (folder / manifest.NAME).stat().st_size
    return {**files, manifest.NAME: _file(manifest.NAME, size, row.manifest_sha256)}


def _file(name: str, size: int, sha256: str) -> FileObject:
    return {"id": name, "object": "file", "bytes": size, "sha256": sha256}


def _check(path: FilePath, sha256: str) -> None:
    try:
        stat = path.stat()
        digest = _digest(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise CorruptCheckpointError(f"{path.name} cannot be read ({error.strerror}). Run the job again.") from error
    if digest != sha256:
        raise CorruptCheckpointError(f"{path.name} does not match its sha256: it was changed or cut off. Run the job again.")


@lru_cache(maxsize=256)
def _digest(path: FilePath, _inode: int, _size: int, _modified: int) -> str:
    """A file is read once, however often a client asks for parts of it."""
    return manifest.sha256(path)
