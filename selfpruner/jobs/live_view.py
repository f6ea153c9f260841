"""A job as a person watches it: progress, best plan so far, what each operator contributed, and the events above it.

It is fed with a job's stream: a server's, or the store's of a search in this process. Without a terminal it prints one line per
event and per stage, and now and then one that says how far the stage is; every one says what is left after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from selfpruner.files.report import Report
from selfpruner.progress import OnProgress, Teller, TimeLeft, counts, duration, printable
from selfpruner.records import StoredProgress
from selfpruner.store.feed import Feed, named
from selfpruner.store.objects import EventObject, JobObject
from selfpruner.store.store import Store
from selfpruner.tables import Screen, Table

# Called with every message of a job's stream: ("job", the job) whenever its status or progress changed, and (type, event).
Watch = Callable[[str, EventObject | JobObject], None]

BAR = 30  # columns
MARKS = {"info": ("·", "dim"), "warn": ("!", "yellow"), "error": ("x", "red")}


class LiveView:
    """A context manager; ``event`` and ``progress`` may be called in any order and at any rate."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.console = console or Screen(stderr=True)
        self._title = title
        self._status = ""
        self._progress: StoredProgress = {}
        self._written = False  # the checkpoint, or it is being written
        self._event = ""
        self._started = time.monotonic()
        self._estimate = TimeLeft()
        self._lines = Teller(self.console.file)
        self._live = Live(self, console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        self._lines.__exit__()

    def watch(self, _name: str, data: EventObject | JobObject) -> None:
        """Take in a message of a job's stream."""
        if data["object"] == "job":
            self.progress(data["progress"], data["status"])
        else:
            self.event(data)

    def event(self, event: EventObject) -> None:
        """Print an event: ``created_at``, ``level``, ``message``."""
        self._event = event.get("message", "")
        mark, style = MARKS.get(str(event.get("level")), MARKS["info"])
        when = time.strftime("%H:%M:%S", time.localtime(event.get("created_at") or time.time()))
        # Messages may quote an LLM: no markup, no control characters.
        self.console.print(Text.assemble((f"{when} {mark} ", style), printable(str(event.get("message", "")))), soft_wrap=True)

    def progress(self, progress: StoredProgress | None, status: str = "running") -> None:
        self._progress, self._status = progress or {}, status
        done = measure(self._progress)
        self._estimate.see(done)
        if self._live is None and progress and progress.get("message", "") != self._event:
            self._written |= progress.get("stage") == "exporting"
            self._lines(facts(progress, status).plain, done, "" if self._written else ahead(progress))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # rich gives it the options of the event that is printed above it: those would crop its lines.
        options = options.update(no_wrap=False, overflow="fold", height=None)
        progress = self._progress
        shown: list[RenderableType] = [self._head(options.max_width), facts(progress, self._status)]
        if table := operators(progress):
            height = sum(len(console.render_lines(part, options)) for part in (*shown, table))
            small = f"{len(progress['data']['operators'])} operators, more than this screen has lines for"
            shown.append(table if height < console.height else Text(small, "dim"))
        yield from console.render(Group(*shown), options)

    def _head(self, width: int) -> Grid | Text:
        """Title, bar, generation, time; on two lines without the bar where that is too long for one."""
        done, total = int(self._progress.get("generation") or 0), int(self._progress.get("generations") or 0)
        title, spent = Text(self._title, "bold"), Text(duration(time.monotonic() - self._started), "dim")
        state = [Text(f"generation {done} of {total}" if total else self._status), Text(str(self._estimate))]
        if sum(cell_len(part.plain) + 2 for part in (title, *state, spent)) + BAR > width:
            return Text.assemble(title, "\n", Text(" · ").join([part for part in (*state, spent) if part.plain]))
        head = Grid.grid(padding=(0, 2))
        head.add_row(title, ProgressBar(total=max(total, 1), completed=done, width=BAR), *state, spent)
        return head


def measure(progress: StoredProgress) -> str:
    """From what to tell how far a job is: its message where that counts, else the generations of its search."""
    message = str(progress.get("message") or "")
    if counts(message) or progress.get("stage") != "searching":
        return message
    return f"generation {progress.get('generation') or 0} of {progress.get('generations') or 0}"


def ahead(progress: StoredProgress) -> str:
    """What comes after the present stage of a job that has not written its checkpoint yet."""
    stage, left = progress.get("stage"), (progress.get("generations") or 0) - (progress.get("generation") or 0)
    if stage == "reporting":
        return "then the checkpoint"
    if stage not in ("preparing", "probing", "searching"):
        return ""
    generations = f"up to {left} generation{'s' if left > 1 else ''}, " if left > 0 else ""
    return f"then {generations}report and checkpoint"


def facts(progress: StoredProgress, status: str) -> Text:
    """One line: stage, plans, evaluations, plan-tokens, best fitness."""
    parts = [str(progress.get("stage") or status)]
    for name in ("plans", "evaluations"):
        if progress.get(name):
            parts.append(f"{progress[name]} {name}")
    if tokens := (progress.get("data") or {}).get("tokens"):
        parts.append(f"{tokens:,} tokens")
    if (fitness := progress.get("best_fitness")) is not None:
        parts.append(f"best {fitness:.4f} nats/token")
    if (relative := progress.get("best_relative")) is not None:
        parts.append(f"{100 * (relative - 1):+.1f} % against uniform")
    if progress.get("message"):
        parts.append(printable(str(progress["message"])))
    return Text(" · ".join(parts))


def operators(progress: StoredProgress) -> Table | None:
    """How many plans each operator made and how many improved the best: ``operators`` and ``improved`` of ``data``, by name."""
    data = progress.get("data") or {}
    made, improved = data.get("operators") or {}, data.get("improved") or {}
    if not made:
        return None
    table = Table("operator", "plans", "improved the best", words=("operator",))
    for name, plans in made.items():
        table.add_row(str(name), str(plans), str(improved.get(name, 0)))
    return table


def contributions(report: Report) -> Table | None:
    """The same of a job that has ended, from its report."""
    rows = report.get("operators", {})
    made = {name: row["made"] for name, row in rows.items()}
    return operators({"data": {"operators": made, "improved": {name: row["improved"] for name, row in rows.items()}}})


def account(report: Report) -> list[str]:
    """Lines for the end of a job, from its report: what the search cost and why it ended, what it foresaw, how the result writes.
    Reports of older jobs lack some of that."""
    lines = []
    if report.get("tokens"):
        line = f"{report['plans']} plans on {report['tokens']:,} plan-tokens; {report['stopped']}"
        lines.append(line + (f", which saved up to {report['tokens_saved']:,}." if report["tokens_saved"] else "."))
    if report.get("rank_correlation") is not None:
        lines.append(f"Rank correlation of foreseen and measured fitness: {report['rank_correlation']:.2f}.")
    own, dense = (row.get("repetition") for row in (report.get("best", {}), report.get("dense", {})))
    if own is not None and dense is not None:
        lines.append(f"Greedy text repeats {100 * own:.0f} % of itself, the dense model's {100 * dense:.0f} %.")
    named = {"scores": "figures", "timing": "speed", "generation_probe": "repetition"}
    for name, reason in report.get("missing", {}).items():
        lines.append(f"Missing: {named.get(name, name)}. {reason}")
    return lines


@contextmanager
def watched(title: str, progress: bool | OnProgress) -> Iterator[Watch]:
    """What shows a job: for True a live view, for a function its calls with a line of text, for False nothing."""
    if callable(progress):
        yield lambda _, data: progress(facts(data["progress"] or {}, data["status"]).plain) if data["object"] == "job" else None
    elif progress:
        with LiveView(title) as view:
            yield view.watch
    else:
        yield lambda _name, _data: None


class Listener:
    """A caller's ``watch``, called until it raises. What it raised is ``error``; ``on_error`` is called then, in the thread that
    wrote what was watched."""

    def __init__(self, watch: Watch) -> None:
        self.error: Exception | None = None
        self.on_error: Callable[[], object] = lambda: None
        self._watch = watch

    def __call__(self, name: str, data: EventObject | JobObject) -> None:
        if self.error is not None:
            return
        try:
            self._watch(name, data)
        except Exception as error:
            self.error = error
            self.on_error()


def watching(store: Store, job_id: str, watches: Sequence[Watch]) -> Callable[..., None]:
    """What tells ``watches`` what is new of a job: to be called after every change, see ``Store.on_event``."""
    feed = Feed(store, job_id)

    def tell(changed: str, *_: object) -> None:
        while changed == job_id:
            for each in feed.look():
                for watch in watches:
                    watch(named(each), each)
            if not feed.more:
                return

    return tell
