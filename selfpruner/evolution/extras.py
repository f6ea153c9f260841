"""What a job does besides its checkpoint: figures, timing, baselines. None of it may cost the job its result.

An extra that fails leaves its reason in the report under ``missing`` and as an event. The job goes on.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

from selfpruner.errors import CancelledTaskError, SelfprunerError
from selfpruner.records import Recorder

T = TypeVar("T")


def finite(value: float) -> float | None:
    """The figure, or None for what a report cannot hold."""
    return value if math.isfinite(value) else None


def survived(error: Exception) -> str:
    """What to say of an extra that failed, whatever it was: the checkpoint is worth more. Raises ``error`` again where the job was
    stopped."""
    if isinstance(error, CancelledTaskError) or getattr(error, "code", None) == "pool_closed":
        raise error
    return error.message if isinstance(error, SelfprunerError) else f"{type(error).__name__}: {error}"


class Extras:
    """``missing``: why an extra is not there, by its name."""

    def __init__(self, recorder: Recorder) -> None:
        self.missing: dict[str, str] = {}
        self._recorder = recorder

    async def attempt(self, name: str, what: str, work: Callable[[], Awaitable[T]], otherwise: T) -> T:
        """What ``work`` gives, else ``otherwise``, and ``what`` is missing and why is said. Being stopped is no failure."""
        try:
            return await work()
        except Exception as error:
            self.note(name, what, survived(error))
        return otherwise

    def note(self, name: str, what: str, reason: str) -> None:
        """Say that something is missing."""
        self.missing[name] = reason
        self._recorder.event(
            f"missing/{name}",
            "job.incomplete",
            f"{what}: {reason} The checkpoint is not concerned.",
            level="warn",
            data={"missing": name, "reason": reason},
        )
