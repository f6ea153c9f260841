"""Progress for people: what is being done, how far it is, how much time is left. It goes to stderr; stdout has the results only.

A terminal has one line that changes. Anywhere else a line comes with every new stage, then at most every few seconds, and now and
then while nothing changes, so that a log shows that the work goes on. The words come from whoever does the work; where they hold
``3/12`` or ``3 of 12``, that is how far it is.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Self

# The first is told how work goes on; the second says, when asked now and then, whether to stop.
OnProgress = Callable[[str], None]
Cancelled = Callable[[], bool]


class Foreseen(str):
    """Progress that says, once and before it begins, what preparing will take. It is kept as an event."""

    __slots__ = ()


# Seconds between two lines where lines cannot be taken back, and until one says that the same still goes on.
EVERY, STILL = 5.0, 30.0
_NUMBERS = re.compile(r"[-+]?\d[\d.,]*")
_DONE = re.compile(r"(\d[\d,]*)(?:/| of )(\d[\d,]*)(?!.*\d(?:/| of )\d)")


def counts(text: str) -> bool:
    """Whether ``text`` says how far its stage is."""
    return _DONE.search(text) is not None


@dataclass(slots=True)
class _Stage:
    """``done`` of ``total`` since ``at``; the first of it that was seen was ``first``, at ``since``."""

    total: int
    first: int
    since: float
    done: int
    at: float


class TimeLeft:
    """How far a stage is and how long the rest of it takes, from the times at which it said so. Stages may take turns."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stages: dict[tuple[str, int], _Stage] = {}
        self._now: _Stage | None = None

    def see(self, text: str) -> None:
        """Take in the last ``3/12`` or ``3 of 12`` in ``text``; what stands before it, numbers aside, is the stage."""
        match = _DONE.search(text)
        if match is None:
            self._now = None
            return
        done, total = (int(group.replace(",", "")) for group in match.groups())
        key, now = (_NUMBERS.sub("", text[: match.start()]), total), self._clock()
        stage = self._stages.get(key)
        if stage is None or done < stage.done:
            stage = self._stages[key] = _Stage(total, done, now, done, now)
        elif done > stage.done:
            stage.done, stage.at = done, now
        self._now = stage

    def __str__(self) -> str:
        """``25 %, 1:05 left``; less where less is known."""
        stage = self._now
        if stage is None or not 0 < stage.done <= stage.total:
            return ""
        share = f"{100 * stage.done // stage.total} %"
        spent, steps = stage.at - stage.since, stage.done - stage.first
        if steps <= 0 or spent <= 0 or stage.done == stage.total:
            return share
        left = spent / steps * (stage.total - stage.done) - (self._clock() - stage.at)
        return f"{share}, {duration(max(left, 1.0))} left"


class Teller:
    """Shows the texts it is called with; a context manager, whose end takes its line off a terminal again.

    ``measure`` is the text to tell from how far the work is, where that is not the one that is shown; ``then`` is what comes after
    that.
    """

    def __init__(self, stream: IO[str] | None = None, *, every: float = EVERY, still: float = STILL) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._moves = self._stream.isatty() and os.environ.get("TERM", "") != "dumb"
        self._every, self._still = (0.25, 1.0) if self._moves else (every, still)
        self._text, self._then, self._shown = "", "", ""
        self._stages: set[str] = set()  # texts that were shown, numbers aside
        self._started = self._last = time.monotonic()
        self._estimate = TimeLeft()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._clockwork: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._clockwork is not None:
            self._clockwork.join()
        if self._moves and self._shown:
            self._write("\r\033[K")

    def __call__(self, text: str, measure: str | None = None, then: str = "") -> None:
        with self._lock:
            self._estimate.see(text if measure is None else measure)
            self._text, self._then = " ".join(printable(text).split()), then
            stage = _NUMBERS.sub("", self._text)
            new = stage not in self._stages
            self._stages.add(stage)
            if self._clockwork is None or (new and not self._moves):
                self._show()
            if self._clockwork is None:
                self._clockwork = threading.Thread(target=self._run, name="progress", daemon=True)
                self._clockwork.start()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            with self._lock:
                if self._text != self._shown or time.monotonic() - self._last >= self._still:
                    self._show()

    def _show(self) -> None:
        self._shown, self._last = self._text, time.monotonic()
        spent = duration(self._last - self._started)
        end = "".join(f" · {part}" for part in (str(self._estimate), self._then, spent) if part)
        if self._moves:
            self._write(f"\r\033[K{_fitting(self._text, _width(self._stream) - 1 - len(end))}{end}")
        else:
            self._write(f"{self._text}{end}\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError, UnicodeEncodeError):
            self._end.set()  # nobody can read it; the work matters more


@contextmanager
def shown(progress: bool | OnProgress) -> Iterator[OnProgress]:
    """What to call with texts: a :class:`Teller` for True, ``progress`` itself where it is a function, for False what does
    nothing."""
    if callable(progress):
        yield progress
    elif progress:
        with Teller() as teller:
            yield teller
    else:
        yield lambda _: None


def duration(seconds: float) -> str:
    """``1:05``, ``2:01:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def printable(text: str) -> str:
    """The text without anything a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _fitting(text: str, room: int) -> str:
    """As many of the first words as there is room for: a figure is not halved, and a line that changes has to be one."""
    if len(text) <= room:
        return text
    return text[: max(room - 1, 0)].rpartition(" ")[0] + " …"


def _width(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
