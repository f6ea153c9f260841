"""A job as a person watches it: progress, best plan so far, what each operator contributed, and the events above it.

Fed with progress data (see :class:`selfpruner.evolution.records.Progress`) and events, whoever sends them: an event stream, or a
search in this process. Without a terminal it prints one line per event and nothing that moves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MARKS = {"info": ("·", "dim"), "warn": ("!", "yellow"), "error": ("x", "red")}


class LiveView:
    """A context manager; ``event`` and ``progress`` may be called in any order and at any rate."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._title = title
        self._status = ""
        self._progress: Mapping[str, Any] = {}
        self._started = time.monotonic()
        self._live = Live(self, console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, event: Mapping[str, Any]) -> None:
        """Print an event: ``created_at``, ``level``, ``message``."""
        mark, style = MARKS.get(str(event.get("level")), MARKS["info"])
        when = time.strftime("%H:%M:%S", time.localtime(event.get("created_at") or time.time()))
        # Messages may quote an LLM: no markup, no control characters.
        self.console.print(Text.assemble((f"{when} {mark} ", style), printable(str(event.get("message", "")))), soft_wrap=True)

    def progress(self, progress: Mapping[str, Any] | None, status: str = "running") -> None:
        self._progress, self._status = progress or {}, status

    def __rich__(self) -> Group:
        progress = self._progress
        done, total = int(progress.get("generation") or 0), int(progress.get("generations") or 0)
        seconds = int(time.monotonic() - self._started)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._title, "bold"),
            ProgressBar(total=max(total, 1), completed=done, width=30),
            Text(f"generation {done} of {total}" if total else self._status),
            Text(f"{seconds // 60}:{seconds % 60:02d}", "dim"),
        )
        return Group(head, facts(progress, self._status), operators(progress) or "")


def facts(progress: Mapping[str, Any], status: str) -> Text:
    """One line: stage, plans, evaluations, plan-tokens, best fitness."""
    parts = [str(progress.get("stage") or status)]
    for name in ("plans", "evaluations"):
        if progress.get(name):
            parts.append(f"{progress[name]} {name}")
    if tokens := (progress.get("data") or {}).get("tokens"):
        parts.append(f"{tokens:,} tokens")
    if progress.get("best_fitness") is not None:
        parts.append(f"best {progress['best_fitness']:.4f} nats/token")
    if progress.get("best_relative") is not None:
        parts.append(f"{100 * (progress['best_relative'] - 1):+.1f} % against uniform")
    if progress.get("message"):
        parts.append(printable(str(progress["message"])))
    return Text(" · ".join(parts))


def operators(progress: Mapping[str, Any]) -> Table | None:
    """How many plans each operator made and how many improved the best: ``operators`` and ``improved`` of ``data``, by name."""
    data = progress.get("data") or {}
    made, improved = data.get("operators") or {}, data.get("improved") or {}
    if not made:
        return None
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("operator")
    table.add_column("plans", justify="right")
    table.add_column("improved the best", justify="right")
    for name, plans in made.items():
        table.add_row(str(name), str(plans), str(improved.get(name, 0)))
    return table


def account(report: Mapping[str, Any]) -> list[str]:
    """Lines for the end of a job, from its report: what the search cost and why it ended, what it foresaw, how the result writes.
    Reports of older jobs lack some of that."""
    lines = []
    if report.get("tokens"):
        line = f"{report['plans']} plans on {report['tokens']:,} plan-tokens; {report['stopped']}"
        lines.append(line + (f", which saved up to {report['tokens_saved']:,}." if report["tokens_saved"] else "."))
    if report.get("rank_correlation") is not None:
        lines.append(f"Rank correlation of foreseen and measured fitness: {report['rank_correlation']:.2f}.")
    rates = [report.get(name, {}).get("repetition") for name in ("best", "dense")]
    if None not in rates:
        lines.append(f"Greedy text repeats {100 * rates[0]:.0f} % of itself, the dense model's {100 * rates[1]:.0f} %.")
    named = {"scores": "figures", "timing": "speed", "generation_probe": "repetition"}
    for name, reason in report.get("missing", {}).items():
        lines.append(f"Missing: {named.get(name, name)}. {reason}")
    return lines


def printable(text: str) -> str:
    """The text without anything a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
