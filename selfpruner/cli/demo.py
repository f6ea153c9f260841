"""``make demo``: the main job as a user would run it. A server, a search over HTTP, a verified checkpoint, one honest table.

Everything goes into ``runs/demo`` and is made afresh every time: database, caches, checkpoint, ``result.json``, ``result.svg``.
The exit code is 0 when the job succeeded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from selfpruner.cli.show import comparison, stages
from selfpruner.client import Client
from selfpruner.errors import SelfprunerError
from selfpruner.files import atomic
from selfpruner.files.report import Report
from selfpruner.jobs.live_view import LiveView, account, contributions
from selfpruner.store.objects import JobObject
from selfpruner.tables import Screen
from selfpruner.workers.lifeline import tied

REQUEST = {"model": "smollm2-135m", "rate": 0.2, "preset": "default", "proposer": "local"}
# What result.json here keeps of the report.
KEPT = (
    *("dense", "uniform_flap_bias", "uniform", "ramp", "best"),
    *("evaluations", "plans", "peak_worker_mib", "stages", "operators", "checkpoint", "verification"),
    *("tokens", "stopped", "tokens_saved", "rank_correlation"),
    *("texts", "plan", "method", "target"),
)


@contextmanager
def server(home: Path) -> Iterator[str]:
    """A server of its own on a free port of 127.0.0.1, stopped at the end, also when this process is killed. Yields its URL."""
    log = (home / "server.log").open("wb")
    command = tied("-m", "selfpruner", "serve", "--home", str(home), "--port", "0", "--json")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SelfprunerError(f"The server did not start; {home / 'server.log'} says why.")
        yield str(json.loads(line)["url"])
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def follow(client: Client, job: JobObject) -> JobObject:
    """Watch the job to its end, on stderr."""
    with LiveView(f"{job['model']}, {job['config']['rate']:.0%} of the decoder") as view:
        for name, data in client.follow(job["id"]):
            view.watch(name, data)
            job = data if data["object"] == "job" else job
    return job


def further(home: Path, job_id: str) -> str:
    database = home / "selfpruner.db"
    return f"""To look further:
  sqlite3 {database} "SELECT rank, generation, operator, round(relative, 4), rates FROM population WHERE job_id IN newest LIMIT 5"
  sqlite3 {database} "SELECT * FROM operator_report WHERE job_id IN newest"
  .venv/bin/selfpruner serve --home {home} & sleep 3; curl -s 'http://127.0.0.1:8000/v1/jobs/{job_id}/candidates?limit=3'
  .venv/bin/python -c "import selfpruner; print(selfpruner.load('{home / "checkpoints" / job_id}'))"
"""


def _change(report: Report, figure: Literal["kl", "perplexity"]) -> str:
    found, uniform = report["best"][figure], report["uniform"][figure]
    return "unknown" if found is None or uniform is None else f"{found / uniform - 1:+.1%}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m selfpruner.cli.demo", description=__doc__)
    parser.add_argument("--home", type=Path, default=Path("runs/demo"), help="removed and made afresh (default: runs/demo)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any field of the search, as in `submit`")
    options = parser.parse_args(arguments)
    from selfpruner.cli.shared_options import read_config

    console = Screen()
    started, load, cores = time.monotonic(), round(os.getloadavg()[0], 1), os.cpu_count()
    home: Path = options.home
    if home.exists():
        shutil.rmtree(home)
    home.mkdir(parents=True)
    try:
        request = {**REQUEST, **read_config(None, options.set)}
        console.print("Starting a server.")
        with server(home) as url:
            console.print(f"Server at {url}. Searching over HTTP for the best plan; this takes some minutes on two cores.")
            with Client(url) as client:
                job = client.submit(request)
                job = follow(client, job)
                report = job["result"]
                if job["status"] != "succeeded" or report is None:
                    error = job["error"] or {"message": job["status"], "code": job["status"]}
                    console.print(f"The job ended as {job['status']}: {error['message']} ({error['code']})", style="red")
                    return 1
                events = list(client.events(job["id"]))
    except SelfprunerError as error:
        console.print(f"selfpruner: {error.message}", style="red")
        return 1
    from selfpruner.cli import plots

    no_picture = plots.draw(lambda: plots.result_chart(report, events), home / "result.svg")
    seconds = round(time.monotonic() - started, 1)
    took = {"seconds": seconds, "cores": cores, "load_average": load}
    result = {**{key: value for key, value in report.items() if key in KEPT}, **took, "job": job["id"]}
    atomic.write_text(home / "result.json", json.dumps(result, indent=2) + "\n")
    source = {role: " + ".join(s["source"] for s in text["sources"]) for role, text in report["texts"].items()}
    console.print(comparison(report))
    if "scores" not in report.get("missing", {}):
        console.print(
            f"KL in nats per token and perplexity on {report['best']['tokens']:,} held-out tokens of {source['report']}; "
            f"calibrated on {source['calibration']}, searched on {source['fitness']}."
        )
        kl, perplexity = _change(report, "kl"), _change(report, "perplexity")
        console.print(f"Found against uniform: KL {kl}, perplexity {perplexity}.")
    console.print(
        f"{seconds:.0f} s on {cores} cores with a load average of {load} before, worker memory {report['peak_worker_mib']:,} MiB."
    )
    for line in account(report):
        console.print(line)
    if contributed := contributions(report):
        console.print(contributed)
    console.print(stages(report["stages"]))
    console.print(f"Checkpoint, loaded again in a fresh process and verified: {report['checkpoint']}")
    console.print(f"Figures: {home / 'result.json'}   picture: {no_picture or home / 'result.svg'}")
    console.print(further(home, job["id"]), soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
