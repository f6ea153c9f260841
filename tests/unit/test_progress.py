"""What people see while it works: lines on stderr, how far it is, how long it takes, and how to go on after Ctrl-C."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest

import selfpruner
from selfpruner.cli import app as cli
from selfpruner.jobs.live_view import LiveView
from selfpruner.progress import Teller, TimeLeft, duration, shown
from selfpruner.store.store import Store
from selfpruner.testing.tiny_models import sample_text, tiny_model


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_how_far_and_how_long() -> None:
    clock = Clock()
    estimate = TimeLeft(clock)
    for at, text, says in (
        (0, "loading", ""),
        (0, "statistics of layer 1/5", "20 %"),
        (1, "units of layer 1/5", "20 %"),
        (10, "statistics of layer 2/5", "40 %, 0:30 left"),
        (11, "units of layer 2/5 ordered by obs", "40 %, 0:30 left"),  # it takes turns with the other
        (20, "statistics of layer 3/5", "60 %, 0:20 left"),
        (25, "statistics of layer 3/5", "60 %, 0:15 left"),
        (40, "statistics of layer 5/5", "100 %"),
        (50, "self: 1,000 of 4,000 tokens", "25 %"),
        (60, "self: 2,000 of 4,000 tokens", "50 %, 0:20 left"),
        (70, "self: 500 of 4,000 tokens", "12 %"),  # begun again
        (80, "a 2 of 3, and 7 of 4", ""),
        (90, "loading", ""),
    ):
        clock.now = at
        estimate.see(text)
        assert (text, str(estimate)) == (text, says)
    assert [duration(seconds) for seconds in (0.4, 65, 7265)] == ["0:00", "1:05", "2:01:05"]


def test_outside_a_terminal_lines_come_now_and_then() -> None:
    stream = StringIO()
    with Teller(stream, every=0.2, still=0.5) as tell:
        for step in range(1, 101):
            tell(f"step {step}/100 \x1b[31m")
            time.sleep(0.002)
        time.sleep(1.0)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/100")
    assert 2 <= len(lines) <= 10
    assert lines[-1].startswith("step 100/100")
    assert lines[-2].startswith("step 100/100"), "that the work goes on is said again"
    assert "\x1b" not in stream.getvalue()


def test_whoever_closes_stderr_stops_nothing() -> None:
    stream = StringIO()
    stream.close()
    stream = StringIO()
    with Teller(stream, every=0.05) as tell:
        tell("one")
        stream.close()
        tell("two")
        time.sleep(0.2)


def test_progress_is_shown_given_to_a_function_or_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    for progress in (True, heard.append, False):
        with shown(progress) as tell:
            tell("working")
    assert heard == ["working"]
    assert re.fullmatch(r"working · \d:\d\d\n", capsys.readouterr().err)


def test_a_search_says_how_far_it_is_outside_a_terminal() -> None:
    from rich.console import Console

    stream = StringIO()
    with LiveView("a search", Console(file=stream, width=60)) as view:
        view.progress({"stage": "searching", "generation": 2, "generations": 8, "plans": 9, "message": "6 new plans"})
        view.event({"level": "info", "message": "Generation 2: " + "word " * 30})
    told = stream.getvalue()
    assert "searching · 9 plans · 6 new plans · 25 %" in told
    assert told.count("\n") == 2, "whole lines, however narrow"


def test_outside_a_terminal_every_stage_of_a_search_has_a_line_with_what_is_left() -> None:
    from rich.console import Console

    stream = StringIO()
    with LiveView("a search", Console(file=stream)) as view:
        view.progress({"stage": "preparing", "generations": 3, "message": "statistics of layer 1/2"})
        view.progress({"stage": "preparing", "generations": 3, "message": "statistics of layer 2/2"})
        view.event({"level": "info", "message": "takes long"})
        view.progress({"stage": "preparing", "generations": 3, "message": "takes long"})
        for generation in (0, 1, 2):
            for new in ("12", "6"):
                message = f"generation {generation}: {new} new plans"
                view.progress({"stage": "searching", "generation": generation, "generations": 3, "message": message})
        view.progress({"stage": "searching", "generation": 3, "generations": 3, "message": "final"})
        view.progress({"stage": "reporting", "generation": 3, "generations": 3, "message": "timing"})
        view.progress({"stage": "exporting", "generation": 3, "generations": 3, "message": "writing"})
        view.progress({"stage": "reporting", "generation": 3, "generations": 3, "message": "scoring the baseline"})
    lines = [re.sub(r"^\d\d:\d\d:\d\d · ", "", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        "preparing · statistics of layer 1/2 · 50 % · then up to 3 generations, report and checkpoint · 0:00",
        "takes long",
        "searching · generation 0: 12 new plans · then up to 3 generations, report and checkpoint · 0:00",
        "searching · final · 100 % · then report and checkpoint · 0:00",
        "reporting · timing · then the checkpoint · 0:00",
        "exporting · writing · 0:00",
        "reporting · scoring the baseline · 0:00",
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder / "llama", "llama")
    (folder / "text.txt").write_text(sample_text(30_000))
    return folder


SMALL = ["--set", "calibration.sequences=4", "--set", "calibration.length=32", "--device", "cpu"]


def test_prune_and_verify_say_what_they_do(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["prune", "-m", str(model / "llama"), "-r", "20%", "-o", str(tmp_path / "a"), "--calibration", str(model / "text.txt")]
    assert cli.run([*line, *SMALL, "--cache", str(tmp_path / "cache")]) == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert "loading" in err.splitlines()[0]
    for line_ in err.splitlines():
        assert re.search(r" · \d+:\d\d$", line_), "nothing but progress, no other library's bars or warnings"
    assert cli.run(["verify", str(tmp_path / "a")]) == 0
    err = capfd.readouterr().err
    assert re.match(r"sha256 of file 1 of \d+ · \d+ % · 0:0\d\n", err)
    heard: list[str] = []
    selfpruner.verify(tmp_path / "a", progress=heard.append)
    assert heard[-1] == "loading it in a fresh process and computing again"
    assert capfd.readouterr().err == ""
    selfpruner.evaluate(
        tmp_path / "a",
        text=[str(model / "text.txt")],
        sequences=2,
        length=16,
        device="cpu",
        cache=tmp_path / "cache",
        progress=False,
    )
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_one_line_changes() -> None:
    """A real terminal, on which nothing stays of the progress in the end."""
    ours, theirs = pty.openpty()
    code = (
        "import time; from selfpruner.progress import Teller\n"
        "with Teller() as tell:\n tell('a' * 500); time.sleep(0.4); tell('second'); time.sleep(0.6)"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    assert process.wait(60) == 0
    os.close(theirs)
    told = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "second" in told
    assert "\n" not in told
    assert all(len(part) < 80 for part in told.split("\r\x1b[K"))
    assert told.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("line", "goes_on"),
    [
        ("search --rate 20% -o a", True),
        ("prune -r 0.2 -o 'a b'", True),
        ("evaluate m --tasks boolq -o quality.json", True),
        ("evaluate m", False),
        ("benchmark a b -o speed.json", False),
        ("jobs", False),
        ("resume .", True),
        ("resume job_1", False),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(
    line: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    assert cli.run(shlex.split(line)) == 130
    err = capsys.readouterr().err
    assert err.startswith("selfpruner: interrupted")
    assert (f"the same command goes on: selfpruner {line}" in err) == goes_on


ENDED = """
import sys, time
from selfpruner.cli import app
app.GRACE = 0.3
def work(**_):
    while True:
        try:
            print("begun", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            if {stops}:
                raise
app.app = work
sys.argv = ["selfpruner", *{line!r}]
app.main()
"""


@pytest.mark.parametrize("line", [["resume", "."], ["export", "a", "-o", "b"], ["search", "-o", "a"]], ids=lambda line: line[0])
@pytest.mark.parametrize("stops", [True, False])
def test_a_command_that_is_ended_says_how_to_go_on(line: list[str], stops: bool) -> None:
    """Also when its work does not stop in time, and the process ends without it."""
    code = ENDED.format(stops=stops, line=line)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert f"the same command goes on: selfpruner {shlex.join(line)}" in err


@pytest.mark.parametrize(
    ("number", "background"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGHUP, False)], ids=lambda value: str(value)
)
def test_a_search_that_is_ended_and_the_same_command_again(
    number: signal.Signals, background: bool, model: Path, tmp_path: Path
) -> None:
    """By Ctrl-C, by another process, by a terminal that is closed; in a script's background SIGINT is ignored."""
    line = ["search", "-m", str(model / "llama"), "-r", "20%", "-o", str(tmp_path / "a"), "--calibration", str(model / "text.txt")]
    line += [*SMALL, "--preset", "evolution", "--cache", str(tmp_path / "cache"), "--set", "fitness_text.length=32"]
    line += ["--set", "fitness_text.sequences=120", "--set", "report_text.sequences=2", "--set", "report_text.length=32"]
    line += ["--set", "generations=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "selfpruner", *line],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert process.stderr.readline()  # it says something at once
    process.send_signal(number)
    # On a loaded machine its worker's thread, which imports torch, does not look up for long; Ctrl-C waits for it.
    err = process.communicate(timeout=240)[1]
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "the same command goes on: selfpruner search" in err
    with Store(tmp_path / "a" / "selfpruner.db", read_only=True) as store:
        assert [job.status for job in store.jobs().data] == ["queued"]
    if number == signal.SIGINT:
        assert cli.run(line) == 0
