"""Nothing outlives what started it: real processes, ended by real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from selfpruner.export import proof
from selfpruner.workers.lifeline import tied
from tests.helpers import ROOT

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
FACTS = "import json, sys; print(json.dumps([__name__, sys.argv[1:], sys.path[0], 'selfpruner' in sys.modules]))"


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.02)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def named(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def ended(processes: list[psutil.Process]) -> bool:
    # A process that this container's init does not reap stays a zombie: it has ended all the same.
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_a_demo_that_is_ended_leaves_neither_server_nor_worker(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SELFPRUNER_")}
    with ExitStack() as stack:
        demos = {}
        for number in SIGNALS:
            command = [sys.executable, "-m", "selfpruner.cli.demo", "--home", str(tmp_path / number.name)]
            demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean)
            stack.callback(demo.wait)
            stack.callback(demo.kill)
            demos[number] = demo
        left = []
        for number, demo in demos.items():
            wait_for(lambda demo=demo: any("workers.child" in named(process) for process in descendants(demo.pid)), "worker")
            left += descendants(demo.pid)
            demo.send_signal(number)
            assert demo.wait(20) == -number
        assert len(left) == 2 * len(SIGNALS), "a server and a worker each"
        wait_for(lambda: ended(left), "end of servers and workers", 30)


def test_a_verification_ends_with_the_export_that_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own thread, as the command line has it, of a process that is killed."""
    (tmp_path / "verifier.py").write_text("import sys, time; open(sys.argv[1], 'w').write('x'); time.sleep(120)")
    parent = f"""
import threading
from selfpruner.export import proof
arguments = ["-P", {str(tmp_path / "verifier.py")!r}, {str(tmp_path / "begun")!r}]
threading.Thread(target=proof.prove, args=(lambda _: arguments, "cpu", lambda: None)).start()
"""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        try:
            wait_for((tmp_path / "begun").exists, "verification")
            left = descendants(process.pid)
        finally:
            process.kill()
    assert len(left) == 1
    wait_for(lambda: ended(left), "end of the verification", 10)
    assert len(list(tmp_path.glob("selfpruner-verify-*"))) == 1
    proof.prove(lambda _: ["-c", "print('{}')"], "cpu", lambda: None)
    assert not list(tmp_path.glob("selfpruner-verify-*")), "the next one sweeps up"


@pytest.mark.parametrize("arguments", [("-m", "facts", "-x", "1"), ("-P", "-m", "json.tool", "--help"), ("{}/facts.py", "-x", "1")])
def test_what_is_tied_runs_as_python_would_run_it(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "facts.py").write_text(FACTS)
    given = [argument.format(tmp_path) for argument in arguments]
    plain, bound = (
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for command in ([sys.executable, *given], tied(*given))
    )
    assert plain == bound
    if "facts" in given[-3]:
        assert json.loads(bound) == ["__main__", ["-x", "1"], str(tmp_path), False]


def test_what_is_tied_to_a_process_that_is_gone_ends_at_once() -> None:
    command = tied("-m", "http.server", "0", "--bind", "127.0.0.1")
    command[3] = str(2**22)  # no process has this number: as after the parent's death
    assert subprocess.run(command, timeout=30, check=False).returncode == -signal.SIGTERM
