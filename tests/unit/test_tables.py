"""Tables keep every figure, hash, id and path whole: at 40 columns, at 80, and in a pipe, which has no width."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import front as front_benchmark
from benchmarks import summary
from selfpruner.cli.show import comparison, front, stages
from selfpruner.jobs.live_view import LiveView, contributions
from selfpruner.progress import Teller
from selfpruner.tables import Screen, Table

HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
PLAN = "a3bf4f1b2b0b822c"
JOB_ID = "job_01JDQ8Z5X7M3V9K2B4N6P8R0ST"
MODEL = "/data/models/organisation/a-model-with-a-long-name-135m-instruct"
OPERATOR = "crossover_of_distant_plans_with_reflection"
MODELS = ("org/model-of-135-million", "runs/pruned-20", "runs/pruned-30")
PARAMETERS = 123_456_789_012
WIDTHS = (40, 80, None)  # None is a pipe

REPORT: dict[str, Any] = {
    name: {"parameters": PARAMETERS, "kl": 0.123456, "perplexity": 123456.789, "prefill_tps": 123_456.7, "decode_tps": 1_234.5}
    for name in ("dense", "uniform_flap_bias", "uniform", "ramp", "best")
}
MEMBERS = [
    {
        "plan": plan,
        "rate": 0.125,
        "parameters": PARAMETERS,
        "kl": 0.1234,
        "perplexity": 12345.678,
        "latency_us": 1_234_567.8,
        "prefill_tps": 123_456.7,
        "speedup": 1.234,
        "operator": OPERATOR,
        "best": plan == HASH,
    }
    for plan in (HASH, PLAN)
]
STAGES = [
    {"stage": "thinking", "seconds": 12_345.67, "share": 0.9992, "tokens": 123_456_789_012, "workers": 64, "peak_mib": 98_765},
    {"stage": "other", "seconds": 1.0, "share": 0.0008, "tokens": 0, "workers": 0, "peak_mib": 0},
]
SPREAD = {"mean": 0.1234, "min": 0.1201, "max": 0.1302}
BENCHED = {
    "level_switch": {
        "tokens": 123_456_789.0,
        "evaluations": 12_345.0,
        "seconds": 123_456.0,
        "tokens_to_level_switch": 98_765_432,
        "held_out": {text: {"kl": SPREAD, "perplexity": SPREAD} for text in ("c4", "wikitext2", "pydoc")},
    },
    "self-pruner": {"note": "no LLM configured"},
}


def quality() -> Table:
    table = Table("", *MODELS, words=("",))
    table.add_row("parameters", *[f"{PARAMETERS:,}"] * 3)
    table.add_row("arc_challenge acc_norm", "43.21 ± 1.23", "41.21 ± 1.24 (-2.00 ± 0.81)", "40.11 ± 1.25 (-3.10 ± 0.82)")
    return table


TABLES: dict[str, tuple[Callable[[], Table], tuple[str, ...]]] = {
    "comparison": (
        lambda: comparison(REPORT),
        ("123,456,789,012", "0.1235", "123456.79", "123,457", "1,234", "parameters", "perplexity"),
    ),
    "front": (
        lambda: front(MEMBERS),
        (HASH, PLAN, "0.125", "123,456,789,012", "0.1234", "12345.68", "1,234.6 ms", "123,457 tok/s", "1.23x", OPERATOR),
    ),
    "stages": (
        lambda: stages(STAGES),
        ("generations: thinking", "12,345.7", "99.9 %", "123,456,789,012", "64", "98,765", "12,346.7", "together"),
    ),
    "operators": (
        lambda: _some(contributions({"operators": {OPERATOR: {"made": 1_234_567, "improved": 98_765}}})),
        (OPERATOR, "1234567", "98765", "operator", "improved"),
    ),
    "benchmark": (
        lambda: summary.table("0.2", BENCHED, "smollm2-135m"),
        ("123,456,789", "12,345", "123,456", "98,765,432", "0.1234", "(0.1201-0.1302)", "0.12", "(0.12-0.13)", "no LLM configured"),
    ),
    "fronts": (
        lambda: front_benchmark.table({"rates": {"0.125": dict.fromkeys(("front", "alone", "sensitivity", "uniform"), 0.12344)}}),
        ("0.125", "0.1234", "sensitivity"),
    ),
    "quality": (quality, ("123,456,789,012", *MODELS, "arc_challenge", "43.21 ± 1.23", "(-2.00 ± 0.81)")),
}


def _some(table: Table | None) -> Table:
    assert table is not None
    return table


def printed(thing: Any, width: int | None) -> str:
    file = StringIO()
    if width is None:
        Screen(file=file).print(thing)
    else:
        Screen(file=file, width=width, force_terminal=True, color_system=None).print(thing)
    return file.getvalue()


def whole(text: str, facts: tuple[str, ...], width: int | None) -> None:
    assert "…" not in text
    assert "..." not in text
    for fact in facts:
        assert fact in text
    for line in text.splitlines():
        words = re.split(r"  +", line.strip())[-1]
        assert width is None or len(line) <= width or " " not in words or words == "no LLM configured", (
            "only what is one may be longer"
        )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_whole(name: str, width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # a pipe inherits it; it is no width of the pipe
    make, facts = TABLES[name]
    text = printed(make(), width)
    whole(text, facts, width)
    assert width is not None or max(map(len, text.splitlines())) > 40, "one line per row"


def test_words_are_broken_and_figures_are_not() -> None:
    table = Table("what", "improved the best", "size", words=("what",), title="a title")
    table.add_row("many words that say something", "12", "1.5 MB")
    table.add_row("few", "3", "11.25 MB")
    assert printed(table, 40).splitlines() == [
        "a title",
        "what              improved the      size",
        "                          best",
        "many words                  12    1.5 MB",
        "that say",
        "something",
        "few                          3  11.25 MB",
    ]
    assert printed(table, 60).splitlines()[2] == "many words that say something                 12    1.5 MB"
    assert printed(table, 24).splitlines() == [
        "a title",
        "what               many",
        "                   words",
        "                   that",
        "                   say",
        "                   something",
        "improved the best  12",
        "size               1.5 MB",
        "",
        "what               few",
        "improved the best  3",
        "size               11.25 MB",
        "",
    ]
    assert printed(table, None).splitlines()[2] == "many words that say something                 12    1.5 MB"
    table.add_row("word " * 19, "4", "1 MB")
    assert "what               few" in printed(table, 40).splitlines(), "blocks, where a row of the table would be taller"


def test_a_path_in_a_sentence_stays_whole() -> None:
    sentence = f"checkpoint {MODEL}/{HASH}  123,456,789,012 parameters, 1,234.5 MB"
    for width in WIDTHS:
        whole(printed(sentence, width), (f"{MODEL}/{HASH}", "123,456,789,012", "1,234.5"), width)
    assert printed(sentence, None) == f"{sentence}\n"


# -- commands, in processes of their own on real terminals and pipes -----------------------------------------------------
CODE = """
import json, sys
from contextlib import contextmanager
from selfpruner.cli import app as cli, shared_options

job, candidates = json.load(open(sys.argv[1]))

class Client:
    def get(self, job_id): return job
    def list(self, **_): return {"data": [job]}
    def candidates(self, *_): return iter(candidates)
    def checkpoints(self, *_): return [{"path": job["model"], "parameters": 123456789012, "bytes": 1234567890}]

@contextmanager
def client(url):
    yield Client()

shared_options.client = client
assert cli.run(["jobs"]) == 0
assert cli.run(["show", job["id"]]) == 0
"""


def told(arguments: list[str], width: int | None) -> str:
    """The stdout of a Python process: a terminal of that width, or a pipe."""
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    environment.pop("COLUMNS", None)
    if width is None:
        environment["COLUMNS"] = "80"
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    process = subprocess.Popen([sys.executable, *arguments], stdin=theirs, stdout=theirs, env=environment)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # Linux says so that nobody has the other end any more
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait(60) == 0
    return re.sub(r"\x1b\[[\d;]*m", "", b"".join(parts).decode()).replace("\r\n", "\n")


@pytest.mark.parametrize("width", WIDTHS)
def test_commands_lose_nothing(width: int | None, tmp_path: Path) -> None:
    windows = ("final", "g12.0+g12.1+g12.2", "g3.0")
    rows = [
        {
            "id": f"{number}{PLAN[1:]}",
            "generation": 123,
            "operator": OPERATOR,
            "window": window,
            "fitness": 0.1234 + number,
            "relative": 0.8765,
            "status": "evaluated",
        }
        for number, window in enumerate(windows)
    ]
    progress = {
        "stage": "searching",
        "plans": 12_345,
        "evaluations": 67_890,
        "best_fitness": 0.4321,
        "best_relative": 0.8765,
        "data": {"operators": {OPERATOR: 1_234_567}, "tokens": 123_456_789_012},
    }
    job = {
        "id": JOB_ID,
        "status": "succeeded",
        "model": MODEL,
        "config": {"rate": 0.125},
        "created_at": 1_732_000_000,
        "progress": progress,
        "error": None,
        "result": {"front": MEMBERS, "stages": STAGES},
    }
    (tmp_path / "job.json").write_text(json.dumps([job, rows]))
    text = told(["-c", CODE, str(tmp_path / "job.json")], width)
    figures = (
        "0.1234",
        "1.1234",
        "2.1234",
        "0.4321",
        "-12.4 %",
        "123,456,789,012",
        "1234567",
        "1,234.6 ms",
        "1,234.6 MB",
        "12345",
        "12,345.7",
    )
    whole(
        text, (JOB_ID, "succeeded", MODEL, "0.125", HASH, OPERATOR, "window", *windows, *(r["id"] for r in rows), *figures), width
    )
    said = " ".join(text.split())
    assert "compare figures of the same window only" in said, "these plans were scored on different tokens"
    (tmp_path / "job.json").write_text(json.dumps([job, rows[:1]]))
    if width == 80:
        assert "of the same window" not in told(["-c", CODE, str(tmp_path / "job.json")], width)


# -- what changes while work goes on ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [40, 80])
def test_the_live_view_keeps_figures_whole(width: int) -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=width, height=24, color_system=None)
    operators = dict.fromkeys(("mutate", "crossover", "closed_form", "reflect_on_the_landscape"), 123456)
    progress = {
        "stage": "searching",
        "generation": 12,
        "generations": 34,
        "plans": 98_765,
        "evaluations": 87_654,
        "best_fitness": 0.4321,
        "best_relative": 0.8765,
        "message": f"12 of 34 plans, {HASH[:30]}",
        "data": {"operators": operators, "improved": operators, "tokens": 123_456_789_012},
    }
    with LiveView(f"{JOB_ID} {MODEL[:30]} rate 0.125", console) as view:
        view.progress(progress)
        view.event({"level": "info", "message": f"Generation 12: best plan {HASH} of {MODEL}"})
        view.progress({**progress, "data": {**progress["data"], "operators": {f"operator_{n}": n for n in range(40)}}})  # type: ignore[dict-item]
    text = re.sub(r"(\x1b\[[\d;?]*[A-Za-z]|\r)+", "\n", screen.getvalue())
    assert "…" not in text
    assert "..." not in text
    for fact in (JOB_ID, "0.125", "98765", "87654", "0.4321", "-12.4", "123,456,789,012", HASH[:30], HASH, MODEL, *operators):
        assert fact in text, text
    assert re.search(r"mutate +123456 +123456", text)
    assert "40 operators, more than this screen has lines for" in " ".join(text.split())
    for line in text.splitlines():
        assert len(line) <= width or HASH in line or MODEL in line


def test_a_progress_line_leaves_out_words_and_keeps_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    with Teller(screen) as tell:
        tell(f"12 of 48 plans, of {MODEL} and {' '.join(['123,456,789'] * 9)}")
    line = screen.getvalue().split("\r\x1b[K")[1]
    assert len(line) < 80
    assert line.endswith(" · 25 % · 0:00")
    assert set(line.split(" …")[0].split()) <= {"12", "of", "48", "plans,", "and", MODEL, "123,456,789"}
