"""Every error selfpruner raises on purpose.

    SelfprunerError                 anything below; carries message, code, param
      ConfigError                   a request that can never work (unknown name, rate outside (0, 1), ...)
        UnknownNameError            a name that is not registered; lists the known ones
        AmbiguousNameError          the beginning of several names; lists them
        BudgetError                 no plan of the search space meets the target rate
      ModelError                    a model that cannot be used
        ModelNotFoundError          no folder, file, hub id or embedded name matches
        UnsupportedModelError       an architecture without an adapter
        UnsafeModelError            pickle weights, remote code, a hostile header
      TextError                     calibration, fitness or report text that cannot be used
      CalibrationError              statistics or gradients that are not numbers, or that are missing
      ProposerError                 an LLM call that gave no usable reply (code is the outcome)
      WorkerError                   a worker process that died, froze or failed a task
        OutOfMemoryError            the device's memory was exhausted
        CancelledTaskError          the task was cancelled on request
        ContractError               a task or its result that is not of the agreed shape; param names the field
      StoreError                    the database refused
        NotFoundError               no such job, candidate or checkpoint
        ConflictError               the object is in a state that does not allow the action
      ExportError                   a checkpoint that could not be written or verified
        CorruptCheckpointError      a file that does not match its manifest
        FormatError                 a plan or model that an export format's runtime cannot take
      BenchmarkError                a runtime to be timed that is not installed, does not answer, or does not do what it was asked
      DiskFullError                 no space left where something had to be written
      NoPermissionError             a folder or file that this user may not read or write

A message says what was wrong and what to do next. ``code`` is stable and meant for programs; ``param`` names the field of
the request that caused it, when one did. Nothing here imports torch.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar


class SelfprunerError(Exception):
    """Base of the tree. ``type`` groups codes the way the HTTP API does: ``invalid_request_error`` or ``server_error``."""

    code: str = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.param = param

    def to_dict(self) -> dict[str, object]:
        """The body of the HTTP error object: ``{message, type, param, code}``."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class ConfigError(SelfprunerError):
    code = "invalid_value"
    type = "invalid_request_error"


class UnknownNameError(ConfigError):
    """An unregistered name. ``what`` is the kind of thing ("criterion"), ``known`` the registered names; ``more`` ends the message,
    with how others are registered, say."""

    code = "unknown_name"

    def __init__(self, what: str, name: str, known: Iterable[str], *, param: str | None = None, more: str = "") -> None:
        names = sorted(known)
        close = get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        more = f" {more}" if more else ""
        super().__init__(f"Unknown {what} {name!r}.{hint} Known: {', '.join(names)}.{more}", param=param or what)


class AmbiguousNameError(ConfigError):
    """The ``beginning`` of more than one name. ``found`` are some of them, ``more`` whether there are others."""

    code = "ambiguous_name"

    def __init__(self, what: str, beginning: str, found: Sequence[str], *, more: bool = False, param: str | None = None) -> None:
        super().__init__(
            f"{beginning!r} is the beginning of more than one {what}: {', '.join(found)}{' and others' if more else ''}. "
            "Give more of it.",
            param=param or what,
        )


class BudgetError(ConfigError):
    code = "budget_unreachable"


class ModelError(SelfprunerError):
    code = "model_unusable"
    type = "invalid_request_error"


class ModelNotFoundError(ModelError):
    code = "model_not_found"


class UnsupportedModelError(ModelError):
    code = "model_unsupported"


class UnsafeModelError(ModelError):
    code = "model_unsafe"


class TextError(SelfprunerError):
    code = "text_unusable"
    type = "invalid_request_error"


class CalibrationError(SelfprunerError):
    """What was measured on the calibration text cannot be used."""

    code = "calibration_unusable"


class ProposerError(SelfprunerError):
    """A failed LLM call; ``code`` is one of the outcomes in ``proposers.base.OUTCOMES``."""

    code = "proposer_failed"


class WorkerError(SelfprunerError):
    code = "worker_failed"


class OutOfMemoryError(WorkerError):
    code = "out_of_memory"


class CancelledTaskError(WorkerError):
    code = "cancelled"


class ContractError(WorkerError):
    """What was sent to a worker, or what it answered, is not of the shape that ``workers.tasks`` says."""

    code = "wrong_shape"


class StoreError(SelfprunerError):
    code = "store_failed"


class NotFoundError(StoreError):
    code = "not_found"
    type = "invalid_request_error"


class ConflictError(StoreError):
    code = "conflict"
    type = "invalid_request_error"


class ExportError(SelfprunerError):
    code = "export_failed"


class CorruptCheckpointError(ExportError):
    code = "corrupt"


class FormatError(ExportError):
    """Refused before any work; says which option of the search would have avoided it, where one would."""

    code = "format_unsupported"
    type = "invalid_request_error"


class BenchmarkError(SelfprunerError):
    code = "benchmark_failed"


class DiskFullError(SelfprunerError):
    code = "disk_full"


class NoPermissionError(SelfprunerError):
    code = "no_permission"


def of_system(error: OSError, path: Path | str | None = None) -> SelfprunerError | None:
    """What the operating system refused, as an error of ours that names the folder or file; None for what is no such refusal.
    ``path`` is where it happened, where the system does not say."""
    where = error.filename if isinstance(error.filename, str) and error.filename else path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"No space left while writing {where or 'a file'}. Free some space and resume the job.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and where is not None:
        what = "is on a disk that can only be read" if error.errno == errno.EROFS else "is closed to this user (permission denied)"
        return NoPermissionError(f"{where} {what}. Name another place, or change who may read and write there.")
    return None


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn "no space left" under this block into :class:`DiskFullError` naming ``path``, and what is not permitted into
    :class:`NoPermissionError`; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.filename = str(path)
        if (ours := of_system(error, path)) is not None:
            raise ours from error
        raise
    except Exception as error:
        # safetensors reports I/O errors as its own exception type, with the operating system's text in it.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise DiskFullError(f"No space left while writing {path}. Free some space and resume the job.") from error
        raise


def from_dict(body: Mapping[str, object]) -> SelfprunerError:
    """Rebuild an error that crossed a process boundary as :meth:`SelfprunerError.to_dict`.

    The class is found by its name where the sender added one as ``class``, else by its code.
    """
    code = str(body.get("code") or "internal_error")

    def classes(base: type[SelfprunerError]) -> Iterator[type[SelfprunerError]]:
        yield base
        for child in base.__subclasses__():
            yield from classes(child)

    known = list(classes(SelfprunerError))
    named = (cls for cls in known if cls.__name__ == body.get("class"))
    kind = next(named, None) or next((cls for cls in known if cls.code == code), SelfprunerError)
    error = kind.__new__(kind)
    param = body.get("param")
    SelfprunerError.__init__(error, str(body.get("message", "")), code=code, param=param if isinstance(param, str) else None)
    return error


def nearest(name: str, fields: Sequence[str]) -> list[str]:
    """At most three of ``fields`` (dots for nested ones) that are spelled like ``name``, or whose last part is."""
    last: dict[str, list[str]] = {}
    for field in fields:
        last.setdefault(field.rpartition(".")[2], []).append(field)
    close = get_close_matches(name, fields, n=2) + [
        field for part in get_close_matches(name.rpartition(".")[2], list(last), n=2, cutoff=0.75) for field in last[part]
    ]
    return list(dict.fromkeys(close))[:3]


def from_problems(problems: Sequence[Mapping[str, object]], fields: Sequence[str] = ()) -> ConfigError:
    """pydantic's ``ValidationError.errors()`` as one error: the first problem by name, the others counted.

    ``fields`` are the names there are, with dots for nested ones: an unknown one is told its nearest. The input is never quoted: it
    may be huge, or a secret.
    """
    first = problems[0]
    place = first["loc"]
    param = ".".join(map(str, place))[:200] or None if isinstance(place, tuple) else None
    code = {"extra_forbidden": "unknown_field", "missing": "missing_field"}.get(str(first["type"]), "invalid_value")
    message = str(first["msg"]).removeprefix("Value error, ")
    if code == "unknown_field":
        message = "unknown field"
        if fields:
            close = nearest(param or "", fields)
            message += f". Did you mean {' or '.join(close)}?" if close else "."
            message += " `selfpruner fields` lists all of them"
    others = len(problems) - 1
    more = f" ({others} more problem{'s' if others > 1 else ''})" if others else ""
    return ConfigError((f"{param}: {message}" if param else message) + more, code=code, param=param)
