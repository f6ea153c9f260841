"""The application of the command line. A command prints its result on stdout; progress and errors go to stderr.

Exit codes: 0 done, 1 failed (or the job did), 2 bad input, 130 interrupted. Errors are one line, never a traceback. Commands
return their exit code.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from pydantic import ValidationError

from selfpruner.cli import cache, shared_options
from selfpruner.cli.export import export, verify
from selfpruner.cli.measure import benchmark, compare, criteria, evaluate
from selfpruner.cli.prune import prune, run_search, search
from selfpruner.cli.show import fields
from selfpruner.cli.show import front as show_front
from selfpruner.cli.show import stages as show_stages
from selfpruner.errors import ConfigError, NotFoundError, SelfprunerError, from_problems, of_system

if TYPE_CHECKING:
    from selfpruner.client import Client
    from selfpruner.jobs.local_jobs import LocalJobs
    from selfpruner.store.objects import JobObject

INTERRUPTED = 130
# Commands that, given again, need not do all of it again: they find a search, results, files, or statistics in the cache.
GO_ON = ("search", "resume", "prune", "evaluate", "compare", "export", "download")
# Commands that end on SIGTERM as on Ctrl-C, and how many seconds after one they end at the latest. A job is written as queued after
# a quarter of them; what takes longer is a worker's thread that does not look up, while it imports torch say.
ENDED, GRACE = ("search", "resume", "prune", "evaluate", "export"), 20.0

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, such as job_...; see `selfpruner jobs`.")]
JobOrFolder = Annotated[
    str, typer.Argument(metavar="JOB", help="A job on a server; or the folder or database of searches here, see --job.")
]
OfFolder = Annotated[str | None, typer.Option("--job", help="Which job of a folder.", show_default="the newest")]
WaitingOfFolder = Annotated[str | None, typer.Option("--job", help="Which job of a folder.", show_default="the newest that waits")]

app = typer.Typer(
    help="Prune a language model without retraining, as well as that can be done.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("selfpruner"))
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# -- the server --------------------------------------------------------------------------------------------------------
@app.command()
def serve(
    host: Annotated[
        str | None, typer.Option(help="Address; others than loopback need SELFPRUNER_TOKEN.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one.", show_default="8000")] = None,
    home: Annotated[Path | None, typer.Option(help="Database, cache and checkpoints.", show_default="~/.selfpruner")] = None,
    devices: Annotated[str | None, typer.Option(help="One worker each: cpu or cuda:0,cuda:1.", show_default="auto")] = None,
    model_root: Annotated[Path | None, typer.Option(help="Folder whose models requests may name.")] = None,
    text_root: Annotated[Path | None, typer.Option(help="Folder whose text files requests may name.")] = None,
    as_json: shared_options.Json = False,
) -> int:
    """Serve the HTTP API until SIGTERM or Ctrl-C. Every setting can be given as SELFPRUNER_NAME, too."""
    from server import logs
    from server.serving import serve as run_server
    from server.settings import load_settings

    given = {"host": host, "port": port, "home": home, "devices": devices, "model_root": model_root, "text_root": text_root}
    settings = load_settings(**given)
    logs.configure()

    def ready(url: str) -> None:
        print(json.dumps({"url": url, "pid": os.getpid()}) if as_json else f"selfpruner listens on {url}", flush=True)

    return run_server(settings, ready)


# -- jobs on a server --------------------------------------------------------------------------------------------------
@app.command()
@shared_options.spread
def submit(
    options: shared_options.SearchOptions,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Kept with the job; repeatable.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key twice is one job.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job and exit by its result.")] = True,
    as_json: shared_options.Json = False,
    url: shared_options.Url = shared_options.DEFAULT_URL,
) -> int:
    """Send a search to a server and follow it.

    The exit code is 0 when the job succeeded. Ctrl-C leaves it running.
    """
    body = options.body()
    with shared_options.client(url) as client:
        job = client.submit(body, metadata=_pairs(metadata), idempotency_key=idempotency_key)
        if not wait:
            _print(job, as_json, f"{job['id']} {job['status']}")
            return 0
        return _follow(client, job, as_json)


@app.command()
def jobs(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder or database of searches here.", show_default="those of the server")
    ] = None,
    status: Annotated[
        str | None, typer.Option(help="queued, running, paused, succeeded, failed or cancelled; interrupted in a folder.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: shared_options.Json = False,
    url: shared_options.Url = shared_options.DEFAULT_URL,
) -> int:
    """List jobs, newest first."""
    with shared_options.client(url) if folder is None else _here(folder) as client:
        page = client.list(limit=limit, status=status)
    if as_json:
        print(json.dumps(page))
        return 0
    from selfpruner.tables import Screen, Table

    table = Table("job", "status", "model", "rate", "created", "progress", words=("job", "status", "model", "created", "progress"))
    for job in page["data"]:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created_at"]))
        table.add_row(job["id"], job["status"], job["model"], f"{job['config']['rate']:g}", created, _summary(job))
    Screen().print(table if page["data"] else "No jobs.")
    return 0


@app.command()
def show(
    source: JobOrFolder,
    job: OfFolder = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it until it ends; exit by its result.")] = False,
    as_json: shared_options.Json = False,
    url: shared_options.Url = shared_options.DEFAULT_URL,
) -> int:
    """Show a job: state, best plans, checkpoint."""
    with _jobs_of(source, job, url) as (client, job_id):
        shown = client.get(job_id)
        if follow:
            return _follow(client, shown, as_json)
        if as_json:
            print(json.dumps(shown))
        else:
            _report(client, shown)
    return 0


@app.command()
def cancel(
    source: JobOrFolder,
    job: WaitingOfFolder = None,
    as_json: shared_options.Json = False,
    url: shared_options.Url = shared_options.DEFAULT_URL,
) -> int:
    """Stop a job for good; of a folder one that was interrupted."""
    with _jobs_of(source, job, url, waiting=True) as (client, job_id):
        cancelled = client.cancel(job_id)
    _print(cancelled, as_json, f"{cancelled['id']} {cancelled['status']}")
    return 0


@app.command()
def pause(job_id: JobId, as_json: shared_options.Json = False, url: shared_options.Url = shared_options.DEFAULT_URL) -> int:
    """Stop a running job of a server and keep what it found."""
    if Path(job_id).exists():
        raise ConfigError(
            f"{job_id} is a folder or file, and only a server's job is paused. A search in a folder is stopped with Ctrl-C, and "
            "`selfpruner resume` goes on with it.",
            param="job_id",
        )
    return _act(url, as_json, lambda client: client.pause(job_id))


@app.command()
def resume(
    source: JobOrFolder,
    job: WaitingOfFolder = None,
    cache: shared_options.Cache = None,
    as_json: shared_options.Json = False,
    url: shared_options.Url = shared_options.DEFAULT_URL,
) -> int:
    """Queue a paused job of a server again; of a folder, go on here with a search that has not finished, and wait for its end."""
    from selfpruner.jobs.local_jobs import LocalJobs

    with _jobs_of(source, job, url, waiting=True) as (client, job_id):
        if not isinstance(client, LocalJobs):
            resumed = client.resume(job_id)
            _print(resumed, as_json, f"{resumed['id']} {resumed['status']}")
            return 0
        config, folder = client.waiting(job_id)["config"], client.folder
    return run_search(config, folder, cache, as_json=as_json)


@app.command()
def events(
    source: JobOrFolder,
    job: OfFolder = None,
    after: Annotated[int, typer.Option(min=0, help="Only those after this number.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until the job ends.")] = False,
    as_json: shared_options.Json = False,
    url: shared_options.Url = shared_options.DEFAULT_URL,
) -> int:
    """Print the events of a job; with --json one object per line."""
    from selfpruner.progress import printable

    with _jobs_of(source, job, url) as (client, job_id):
        stream = (
            (data for _, data in client.follow(job_id, after) if data["object"] == "event")
            if follow
            else client.events(job_id, after)
        )
        for event in stream:
            when = time.strftime("%H:%M:%S", time.localtime(event["created_at"]))
            line = f"{event['id']:>5} {when} {event['level']:5} {event['type']}: {event['message']}"
            print(json.dumps(event) if as_json else printable(line).replace("\n", " "), flush=True)
        return _left(client, client.get(job_id)) if follow else 0


@app.command()
def download(
    job_id: JobId,
    folder: Annotated[Path, typer.Argument(help="A new folder for the checkpoint.")],
    as_json: shared_options.Json = False,
    url: shared_options.Url = shared_options.DEFAULT_URL,
) -> int:
    """Fetch the checkpoint of a job.

    It comes over HTTP from the server's machine, and every file is checked against the manifest. The same call again goes on where
    an interrupted one stopped.
    """
    with shared_options.client(url) as client:
        exported = list(client.checkpoints(job_id))
        if not exported:
            raise NotFoundError(f"Job {job_id} has no checkpoint: it is {client.get(job_id)['status']}.")
        client.download(job_id, exported[-1]["id"], folder)
    print(json.dumps({"path": str(folder), **exported[-1]}) if as_json else folder)
    return 0


# -- without a server ---------------------------------------------------------------------------------------------------
for command in (search, prune, evaluate, benchmark, export, verify, criteria, compare, fields):
    app.command()(command)
app.add_typer(cache.app, name="cache")


# -- parts -------------------------------------------------------------------------------------------------------------
def _here(folder: Path) -> LocalJobs:
    from selfpruner.jobs.local_jobs import LocalJobs

    return LocalJobs(folder)


@contextmanager
def _jobs_of(source: str, job: str | None, url: str, *, waiting: bool = False) -> Iterator[tuple[Client | LocalJobs, str]]:
    """Where the job is that ``source`` means, a server or a folder here, and its id: without ``job`` the newest one's, or that of
    the newest which waits."""
    if Path(source).exists():
        with _here(Path(source)) as here:
            yield here, job or here.newest(waiting=waiting)
    elif job is not None:
        raise NotFoundError(f"There is no folder {source}; --job is one of a folder's.", param="source")
    elif not source.startswith("job_"):
        raise NotFoundError(
            f"There is no folder {source}, and it is no id of a job, such as job_...; `selfpruner jobs` lists those of a server.",
            param="source",
        )
    else:
        with shared_options.client(url) as client:
            yield client, source


def _act(url: str, as_json: bool, action: Callable[[Client], JobObject]) -> int:
    with shared_options.client(url) as client:
        job = action(client)
    _print(job, as_json, f"{job['id']} {job['status']}")
    return 0


def _follow(client: Client | LocalJobs, job: JobObject, as_json: bool) -> int:
    """Watch a job to its end. stdout gets the result only, so that ``--json`` is one document."""
    from selfpruner.jobs.live_view import LiveView
    from selfpruner.jobs.local_jobs import LocalJobs

    try:
        with LiveView(f"{job['id']} {job['model']} rate {job['config']['rate']:g}") as view:
            for name, data in client.follow(job["id"]):
                view.watch(name, data)
                job = data if data["object"] == "job" else job
    except KeyboardInterrupt:
        if isinstance(client, LocalJobs):
            goes_on = f"{client.command('show -f', job['id'])}   Stop it: Ctrl-C where it runs"
        else:
            goes_on = f"selfpruner show -f {job['id']}   Stop it: selfpruner cancel {job['id']}"
        print(f"{job['id']} goes on. Watch it: {goes_on}", file=sys.stderr)
        return 130
    if as_json:
        print(json.dumps(job))
    elif job["status"] == "succeeded":
        _report(client, job)
    if error := job["error"]:
        _complain(f"{job['id']} failed: {error['message']} ({error['code']})")
    elif job["status"] == "cancelled":
        _complain(f"{job['id']} was cancelled")
    else:
        _left(client, job)
    return 0 if job["status"] == "succeeded" else 1


def _left(client: Client | LocalJobs, job: JobObject) -> int:
    """Say how to go on with a job of a folder that has not finished and does not run; an exit code."""
    from selfpruner.jobs.local_jobs import LocalJobs

    if job["finished_at"] is not None or not isinstance(client, LocalJobs):
        return 0
    _complain(f"{job['id']} is {job['status']} and does not run; go on with it: {client.command('resume', job['id'])}")
    return 1


def _report(client: Client | LocalJobs, job: JobObject) -> None:
    from itertools import islice

    from selfpruner.jobs.live_view import account, contributions, operators
    from selfpruner.tables import Screen, Table

    console = Screen()
    console.print(f"{job['id']}  {job['status']}  {job['model']}  rate {job['config']['rate']:g}  {_summary(job)}")
    if job["error"]:
        console.print(f"error {job['error']['code']}: {job['error']['message']}")
    best = list(islice(client.candidates(job["id"], "fitness"), 5))
    if best:
        columns = ("plan", "generation", "operator", "window", "fitness", "against uniform")
        table = Table(*columns, words=("plan", "operator", "window"))
        for row in best:
            relative = "" if row["relative"] is None else f"{100 * (row['relative'] - 1):+.1f} %"
            fitness = row["status"] if row["fitness"] is None else f"{row['fitness']:.4f}"
            table.add_row(row["id"], str(row["generation"]), row["operator"], row["window"] or "", fitness, relative)
        console.print(table)
        if len({row["window"] for row in best if row["fitness"] is not None}) > 1:
            console.print("A window is the tokens that a plan was scored on: compare figures of the same window only.")
    if members := (job["result"] or {}).get("front"):
        console.print(show_front(members))
    if contributed := contributions(job["result"] or {}) or operators(job["progress"] or {}):
        console.print(contributed)
    if rows := (job["result"] or {}).get("stages"):
        console.print(show_stages(rows))
    for line in account(job["result"] or {}):
        console.print(line)
    for checkpoint in client.checkpoints(job["id"]):
        console.print(
            f"checkpoint {checkpoint['path']}  {checkpoint['parameters']:,} parameters, {checkpoint['bytes'] / 1e6:,.1f} MB"
        )


def _summary(job: JobObject) -> str:
    from selfpruner.jobs.live_view import facts

    return facts(job["progress"], job["status"]).plain if job["progress"] else ""


def _print(job: JobObject, as_json: bool, text: str) -> None:
    print(json.dumps(job) if as_json else text)


def _pairs(given: Sequence[str] | None) -> dict[str, str]:
    pairs = {}
    for item in given or ():
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--metadata {item!r} is not KEY=VALUE", param="metadata")
        pairs[key] = value
    return pairs


def _complain(message: str) -> None:
    print("selfpruner: " + " ".join(message.split()), file=sys.stderr)


def _interrupted(arguments: Sequence[str]) -> str:
    """What a person who pressed Ctrl-C is told: how to go on, where that is possible."""
    command = next(iter(arguments), "")
    kept = command in GO_ON
    if command == "evaluate":
        kept = any(word.startswith(("-o", "--output")) for word in arguments)
    elif command == "resume":  # of a server it only asks
        kept = any(Path(word).exists() for word in arguments[1:])
    if not kept:
        return "interrupted"
    return f"interrupted. What was computed is kept; the same command goes on: {shlex.join(['selfpruner', *arguments])}"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=arguments, prog_name="selfpruner", standalone_mode=False)
        sys.stdout.flush()
        # typer makes this code of a Ctrl-C; commands that follow a job, and the server, have said themselves what goes on.
        if code == INTERRUPTED and words[:1] not in (["submit"], ["show"], ["serve"]):
            _complain(_interrupted(words))
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        _complain(f"{error.format_message()} Try --help.")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain(_interrupted(words))
        return INTERRUPTED
    except SelfprunerError as error:
        _complain(error.message)
        return 2 if error.type == "invalid_request_error" else 1
    except ValidationError as error:
        _complain(from_problems(error.errors(include_url=False, include_input=False)).message)
        return 2
    except BrokenPipeError:
        # Whoever read our output has had enough; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("SELFPRUNER_DEBUG"):
            raise
        if isinstance(error, OSError) and (ours := of_system(error)) is not None:
            _complain(ours.message)
            return 1
        _complain(f"unexpected {type(error).__name__}: {error}. Set SELFPRUNER_DEBUG=1 to see where it comes from.")
        return 1


def _end_as_interrupted() -> None:
    """SIGTERM, and a terminal that is closed, end a command as Ctrl-C does: its job is queued again, and what it wrote aside is
    removed. Work that does not stop in time ends with this process, which then says the same."""

    def give_up() -> None:
        _complain(_interrupted(sys.argv[1:]))
        sys.stderr.flush()
        os._exit(INTERRUPTED)

    def end(_number: int, _frame: object) -> None:
        last = threading.Timer(GRACE, give_up)
        last.daemon = True
        last.start()
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a script's background
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def main() -> NoReturn:
    if sys.argv[1:2] and sys.argv[1] in ENDED:
        _end_as_interrupted()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character costs no result
    sys.exit(run())
