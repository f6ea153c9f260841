"""How an exception raised by a task becomes plain data (for the wire) and one of ours (for the caller).

Our own errors keep class, message, code and param. Data of a wrong shape names its field. Exhausted memory and a full disk are
recognised by name and text, whatever library reports them, so torch is never imported here. Everything else is an internal error:
the caller gets its class and message, and the log its traceback.
"""

from __future__ import annotations

import errno

from pydantic import ValidationError

from selfpruner.errors import DiskFullError, OutOfMemoryError, SelfprunerError, WorkerError
from selfpruner.workers.tasks import wrong_shape

# torch raises a plain RuntimeError when the CPU allocator or MPS has no memory left.
_OUT_OF_MEMORY_TEXT = ("out of memory", "can't allocate memory", "not enough memory")


def classify(error: BaseException) -> SelfprunerError:
    """The typed error that stands for ``error``; one of ours is returned as it is."""
    if isinstance(error, SelfprunerError):
        return error
    if isinstance(error, ValidationError):
        return wrong_shape(error)
    name, text = type(error).__name__, str(error)
    if (
        isinstance(error, MemoryError)
        or name == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _OUT_OF_MEMORY_TEXT))
    ):
        return OutOfMemoryError(
            f"The device ran out of memory: {text or name}. Use fewer or shorter sequences, or a larger device."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"No space left while writing {error.filename or 'a file'}. Free some space and resume the job.")
    return WorkerError(
        f"The task failed with {name}: {text or 'no message'}. The traceback is in the worker's log.", code="internal_error"
    )


def is_expected(error: BaseException) -> bool:
    """Whether the error explains itself, so that no traceback has to be logged."""
    return isinstance(error, SelfprunerError)


def to_wire(error: BaseException) -> dict[str, object]:
    """What :func:`selfpruner.errors.from_dict` rebuilds: the HTTP body and the name of the class."""
    typed = classify(error)
    return {**typed.to_dict(), "class": type(typed).__name__}
