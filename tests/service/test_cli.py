"""The command line against a scripted server: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfpruner.cli import app as cli
from selfpruner.cli import shared_options
from selfpruner.client import Client
from selfpruner.errors import ConfigError
from selfpruner.jobs.live_view import LiveView, account, printable
from server.settings import ServerSettings
from tests.helpers.serving import BUDGET, QUICK, WAITS, Running, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_server(ServerSettings(home=tmp_path_factory.mktemp("home"), parallel_jobs=4)) as running:
        yield running


@pytest.fixture(autouse=True)
def _address(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFPRUNER_URL", server.url)
    monkeypatch.delenv("SELFPRUNER_TOKEN", raising=False)


def one_line(text: str) -> str:
    assert text.count("\n") == 1
    assert text.startswith("selfpruner: ")
    assert "Traceback" not in text
    return text


def test_submit_follows_and_exits_by_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["submit", "--rate", "0.2", "--seed", str(QUICK)]) == 0
    out, err = capsys.readouterr()
    assert "succeeded" in out
    assert "checkpoint" in out
    assert "0.3333" in out
    assert "plan 2" in err

    assert cli.run(["submit", "--rate", "0.2", "--seed", str(BUDGET)]) == 1
    out, err = capsys.readouterr()
    assert "Lower the rate." in err.splitlines()[-1]
    assert "budget_unreachable" in err


def test_json_output_is_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["submit", "--rate", "0.2", "--json", "--metadata", "who=me"]) == 0
    job = json.loads(capsys.readouterr().out)
    assert (job["status"], job["metadata"]) == ("succeeded", {"who": "me"})
    assert cli.run(["download", job["id"], str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "manifest.json").exists()
    assert cli.run(["download", job["id"], str(tmp_path / "copy")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.run(["show", job["id"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == job
    assert cli.run(["jobs", "--json", "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["data"][0]["id"] == job["id"]
    for follow in ([], ["--follow"]):
        assert cli.run(["events", job["id"], "--json", "--after", "1", *follow]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
        assert [event["id"] for event in lines] == list(range(2, len(lines) + 2))
        assert lines[-1]["type"] == "job.succeeded"


def test_no_wait_then_cancel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["submit", "-r", "0.2", "--seed", str(WAITS), "--no-wait"]) == 0
    job_id = capsys.readouterr().out.split()[0]
    assert cli.run(["jobs"]) == 0
    assert job_id in capsys.readouterr().out
    assert cli.run(["cancel", job_id]) == 0
    assert capsys.readouterr().out.split() == [job_id, "cancelled"]
    assert cli.run(["show", "--follow", job_id]) == 1
    assert "cancelled" in one_line(capsys.readouterr().err.splitlines()[-1] + "\n")
    assert cli.run(["cancel", job_id]) == 2


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("submit", 2, "rate: Field required"),
        ("submit --rate 2", 2, "did you mean 0.02 (2 %)?"),
        ("submit --rate 25", 2, "did you mean 0.25 (25 %)?"),
        ("submit --rate 0.2 --criterion flop", 2, "Did you mean 'flap'?"),
        ("submit --rate 0.2 --model /etc", 2, "No model '/etc' here"),
        ("submit --rate 0.2 --set generations", 2, "KEY=VALUE"),
        ("submit --rate 0.2 --set no.such=1", 2, "no: unknown field"),
        ("submit --rate 0.2 --set population.x=1", 2, "population: "),
        ("submit --rate 0.2 --set limit.calls=1", 2, "Did you mean limits"),
        ("submit --rate 0.2 --metadata x", 2, "KEY=VALUE"),
        ("submit --config /no/such.json", 2, "Cannot read /no/such.json"),
        ("show job_none", 2, "`selfpruner jobs` lists"),
        ("show", 2, "JOB"),
        ("nonsense", 2, "nonsense"),
        ("jobs --limit 0", 2, "--limit"),
        ("jobs --status lost", 2, "status"),
        ("jobs --url http://127.0.0.1:9", 1, "selfpruner serve"),
        ("jobs --url nonsense", 1, "nonsense"),
        ("serve --host 0.0.0.0", 2, "needs a token"),
        ("serve --model-root /no/such", 2, "not a folder"),
        ("serve --host 203.0.113.1", 2, "needs a token"),
        ("serve --home /dev/null --port 0", 2, "/dev/null is a file; name a folder"),
        ("serve --home /proc --port 0", 2, "/proc cannot be written"),
        ("verify /dev/null", 1, "/dev/null holds no manifest.json"),
        (f"verify {__file__}", 1, "test_cli.py is a file; name the folder of a checkpoint"),
    ],
)
def test_errors_are_one_line(line: str, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in one_line(err)


def test_a_server_does_not_start_with_a_cache_limit_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SELFPRUNER_CACHE_LIMIT", "lots")
    monkeypatch.setattr("server.serving._Server.run", lambda *_, **__: pytest.fail("it started"))
    assert cli.run(["serve", "--port", "0", "--home", str(tmp_path / "home")]) == 2
    assert "SELFPRUNER_CACHE_LIMIT is 'lots'" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "home").exists()


def test_help_names_every_command_and_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("serve", "submit", "jobs", "show", "cancel", "pause", "resume", "events", "download"):
        assert command in text
        assert cli.run([command, "--help"]) == 0
        assert len(capsys.readouterr().out) > 100
    assert cli.run(["submit", "--help"]) == 0
    assert "least_squares" in capsys.readouterr().out
    assert cli.run([]) == 0
    assert "Usage" in capsys.readouterr().out


def test_config_file_options_and_settings_in_that_order(tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    file.write_text('{"rate": 0.1, "seed": 1, "limits": {"calls": 5}}')
    body = shared_options.read_config(
        file,
        ["limits.cost=0.5", 'initial=["uniform"]', "of=model", "seed=3"],
        calibration=["self", "a.txt"],
        rate=0.3,
        seed=2,
        model=None,
    )
    assert body == {
        "rate": 0.3,
        "seed": 3,
        "limits": {"calls": 5, "cost": 0.5},
        "initial": ["uniform"],
        "of": "model",
        "calibration": {"sources": [{"source": "self"}, {"source": "a.txt"}]},
    }
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="JSON object"):
        shared_options.read_config(file, None)
    with pytest.raises(ConfigError, match="holds no fields"):
        shared_options.read_config(None, ["rate=1", "rate.x=2"])


def test_interrupt_leaves_the_job_running(server: Running) -> None:
    """A real Ctrl-C, in a real process."""
    with Client(server.url) as client:
        job_id = client.submit({"rate": 0.2, "seed": WAITS})["id"]
        process = subprocess.Popen(
            [sys.executable, "-m", "selfpruner", "show", "--follow", job_id],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A suite that a shell runs in the background inherits an ignored Ctrl-C, and so would this process.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stderr is not None
        assert "Job queued" in process.stderr.readline()  # it follows
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 130
        assert out == ""
        assert f"selfpruner cancel {job_id}" in err
        assert "Traceback" not in err
        assert client.get(job_id)["status"] == "running"
        client.cancel(job_id)


def test_a_closed_pipe_is_no_error() -> None:
    line = f"{sys.executable} -m selfpruner submit --help | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.stderr == ""


def test_live_view_draws_progress_and_obeys_no_control_characters() -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with LiveView("job_1 model", console) as view:
        view.progress(
            {
                "stage": "searching",
                "generation": 2,
                "generations": 7,
                "plans": 9,
                "best_fitness": 0.25,
                "best_relative": 0.88,
                "data": {"operators": {"mutate": 3}, "improved": {"mutate": 1}, "tokens": 12_345},
            }
        )
        view.event({"created_at": time.time(), "level": "warn", "message": "evil \x1b[31m[bold]text"})
        time.sleep(0.3)
    text = screen.getvalue()
    for part in (
        "generation 2 of 7",
        "9 plans",
        "12,345 tokens",
        "0.2500",
        "-12.0 %",
        "mutate",
        "improved",
        "evil \N{REPLACEMENT CHARACTER}[31m[bold]text",
    ):
        assert part in text
    assert printable("a\x07b\nc") == "a\N{REPLACEMENT CHARACTER}b\nc"


def test_the_account_of_a_job() -> None:
    report: dict[str, Any] = {
        "plans": 93,
        "tokens": 412_160,
        "stopped": "no better plan in 4 generations",
        "tokens_saved": 24_000,
        "rank_correlation": 0.617,
        "best": {"repetition": 0.31},
        "dense": {"repetition": 0.28},
    }
    assert account(report) == [
        "93 plans on 412,160 plan-tokens; no better plan in 4 generations, which saved up to 24,000.",
        "Rank correlation of foreseen and measured fitness: 0.62.",
        "Greedy text repeats 31 % of itself, the dense model's 28 %.",
    ]
    plain = {**report, "tokens_saved": 0, "rank_correlation": None, "best": {"kl": 0.2}}
    assert account(plain) == ["93 plans on 412,160 plan-tokens; no better plan in 4 generations."]
    assert account({"best": {}, "dense": {}, "plans": 3}) == [], "a report made before these figures"
