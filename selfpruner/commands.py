"""Commands that need no server: search, prune, evaluate, benchmark, export, verify, criteria, compare: the same engine, here.

Like the others they print their result on stdout, everything else on stderr, and return their exit code.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import TypeAdapter

from selfpruner import names, options
from selfpruner.errors import ConfigError, NotFoundError, disk_errors

if TYPE_CHECKING:
    from selfpruner.api import Pruned
    from selfpruner.live import LiveView
    from selfpruner.search.records import Candidate, Evaluation, Level, LlmCall, Progress, Recorder

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")]
Cache = Annotated[
    Path | None, typer.Option(envvar="SELFPRUNER_CACHE", help="Models, texts, statistics.", show_default="~/.cache/selfpruner")
]
Text = Annotated[
    list[str] | None, typer.Option("--text", "-t", help="Held-out text: auto, pydoc, hub:DATASET, or a file; repeat to mix.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (search, prune, evaluate, benchmark, export, verify, criteria, compare):
        app.command()(command)


def search(
    output: Output,
    model: options.Model = None,
    rate: options.Rate = None,
    objective: options.Objective = None,
    rates: options.Rates = None,
    preset: options.Preset = None,
    pattern: options.Pattern = None,
    criterion: options.Criterion = None,
    compensation: options.Compensation = None,
    calibration: options.Calibration = None,
    generations: options.Generations = None,
    population: options.Population = None,
    proposer: options.Proposer = None,
    seed: options.Seed = None,
    device: options.Device = None,
    memory: options.Memory = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    cache: Cache = None,
    as_json: Json = False,
) -> int:
    """Search in this process, without a server. The same call again goes on where it was interrupted."""
    from selfpruner import api
    from selfpruner.live import LiveView, account
    from server.settings import load_settings

    body = options.read_config(
        config,
        settings,
        calibration=calibration,
        model=model,
        rate=rate,
        objective=objective,
        rates=rates,
        preset=preset,
        pattern=pattern,
        criterion=criterion,
        compensation=compensation,
        generations=generations,
        population=population,
        proposer=proposer,
        seed=seed,
        device=device,
        memory=memory,
    )
    checked = api.config_of(body)
    proposers = load_settings().all_proposers
    with LiveView(f"{checked.model} rate {checked.rate:g}") as view:
        result = api.search(
            checked.rate,
            output,
            cache=cache,
            proposers=proposers,
            watch=lambda recorder: _Watched(recorder, view),
            **{key: value for key, value in body.items() if key != "rate"},
        )
    if as_json:
        print(json.dumps(result.report))
    else:
        _table(result.report)
        for line in account(result.report):
            print(line)
        print(f"checkpoint {result.checkpoint['path']}")
    return 0


def prune(
    output: Output,
    model: options.Model = None,
    rate: options.Rate = None,
    plan: Annotated[
        Path | None, typer.Option(help='JSON with "levels", or "rates" per layer or block; a checkpoint\'s plan.json will do.')
    ] = None,
    pattern: options.Pattern = None,
    criterion: options.Criterion = None,
    compensation: options.Compensation = None,
    calibration: options.Calibration = None,
    seed: options.Seed = None,
    device: options.Device = None,
    memory: options.Memory = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    cache: Cache = None,
    as_json: Json = False,
) -> int:
    """Apply one plan without a search: a uniform rate, or the levels or rates of a file."""
    from selfpruner import api

    body = options.read_config(
        config,
        settings,
        calibration=calibration,
        model=model,
        pattern=pattern,
        criterion=criterion,
        compensation=compensation,
        seed=seed,
        device=device,
        memory=memory,
        rate=rate,
    )
    given = _plan_file(plan) if plan is not None else {}
    wanted = body.pop("rate", None)
    result = api.prune(output, rate=wanted, **given, cache=cache, progress=_tell, **body)
    return _print_pruned(result, as_json)


def evaluate(
    model: Annotated[list[str], typer.Argument(help="Checkpoints, or models by name, folder or hub id.", show_default=False)],
    tasks: Annotated[
        str | None, typer.Option(help=f"Zero-shot tasks, by commas: {','.join(names.ZERO_SHOT_TASKS)}, or others of the harness.")
    ] = None,
    perplexity: Annotated[str | None, typer.Option(help=f"Customary texts: {','.join(names.PERPLEXITY_TEXTS)}.")] = None,
    seqlen: Annotated[str, typer.Option(help="Tokens per window of them: 128,512,2048.")] = "2048",
    generation: Annotated[bool, typer.Option("--generation", help="How they write: repetition and distinct-n, greedily.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Documents per task, the same for every model.", show_default="all")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=2, help="Windows per text, evenly spread over it.", show_default="all")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File of the results; the same call goes on.")] = None,
    data: Annotated[Path | None, typer.Option(envvar="SELFPRUNER_DATA", help="Folder with local task files and texts.")] = None,
    text: Text = None,
    against: Annotated[
        str | None,
        typer.Option(help="What to compare with: with --text the dense model to measure KL from, else by default the first."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, max=65_536, help="Of the held-out text.")] = 32,
    length: Annotated[int, typer.Option(min=16, max=32_768, help="Tokens per sequence of it.")] = 512,
    device: options.Device = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")] = "auto",
    cache: Cache = None,
    as_json: Json = False,
) -> int:
    """Quality: zero-shot tasks, perplexity and writing of several models; or one model's perplexity and KL on held-out text."""
    wanted = _split(tasks), _split(perplexity)
    if not any(wanted) and not generation:
        return _held_out(model, text, sequences, length, against, device, cache, as_json)
    if text:
        raise ConfigError("--text is a measurement of its own; leave out --tasks, --perplexity and --generation.", param="text")
    if output is None:
        raise ConfigError("Name a file for the results: -o quality.json. The same call goes on where it stopped.", param="output")
    from rich.console import Console
    from rich.table import Table

    from selfpruner import api
    from selfpruner.evaluation import quality

    found = api.quality(
        model,
        output,
        tasks=wanted[0],
        perplexity=wanted[1],
        seqlen=_lengths(seqlen),
        generation=generation,
        limit=limit,
        windows=windows,
        against=against,
        data=data,
        device=device or "auto",
        dtype=dtype,
        cache=cache,
        progress=_tell,
    )
    _tell("")
    if as_json:
        print(json.dumps(quality.plain(found)))
        return 0
    heading, *rows = quality.cells(found)
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for index, column in enumerate(heading):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(f"± one standard error; in brackets the difference from {found.against} on the same documents.")
    console.print("Percent, but for perplexities and distinct-n. A mean of acc_norm takes acc of tasks that have no acc_norm.")
    return 0


def _held_out(
    model: Sequence[str],
    text: Sequence[str] | None,
    sequences: int,
    length: int,
    against: str | None,
    device: str | None,
    cache: Path | None,
    as_json: bool,
) -> int:
    from dataclasses import asdict

    from selfpruner import api

    if len(model) > 1:
        raise ConfigError("Say what to measure on several models: --tasks, --perplexity or --generation.", param="tasks")
    found = api.evaluate(
        model[0],
        text=tuple(text or ("auto",)),
        sequences=sequences,
        length=length,
        against=against,
        device=device or "auto",
        cache=cache,
        progress=_tell,
    )
    _tell("")
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        kl = "" if found.kl is None else f"  kl {found.kl:.4f} nats/token"
        print(f"{found.model}  {found.parameters:,} parameters  perplexity {found.perplexity:.2f}{kl}  ({found.tokens:,} tokens)")
    return 0


def _lengths(value: str) -> list[int]:
    try:
        return [int(part) for part in _split(value)]
    except ValueError:
        raise ConfigError("seqlen must be whole numbers, such as 128,512,2048.", param="seqlen") from None


def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="The dense model first, then checkpoints: names, folders, or GGUF files.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file for all figures.")],
    backend: Annotated[str, typer.Option(help=f"What runs them: {', '.join(names.BACKENDS)}.")] = "transformers",
    url: Annotated[
        list[str] | None,
        typer.Option(help="Address of a running server up to /v1, for vllm; repeat for each model. A key comes from VLLM_API_KEY."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to write after them.")] = 64,
    repetitions: Annotated[int, typer.Option(help="Rounds in which every model is timed.")] = 7,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Decode by torch.compile with a cache of fixed size (transformers; compiles for minutes)."),
    ] = False,
    device: options.Device = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    cache: Cache = None,
    as_json: Json = False,
) -> int:
    """Speed, memory and their bounds, dense and pruned in turn in one run."""
    from selfpruner import api

    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(f"{output} cannot be written: name a file in a folder that exists.", param="output")
    report = api.benchmark(
        models,
        backend=backend,
        urls=tuple(url or ()),
        key=os.environ.get("VLLM_API_KEY") or None,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        compiled=compiled,
        device=device or "auto",
        dtype=dtype,
        cache=cache,
        progress=_tell,
    )
    _tell("")
    body = report.to_dict()
    with disk_errors(output):
        output.write_text(json.dumps(body, indent=1) + "\n", "utf-8")
    print(json.dumps(body) if as_json else report.markdown(), end="\n" if as_json else "")
    return 0


def export(
    source: Annotated[
        str, typer.Argument(help="A checkpoint; a job on a server; the folder of a search (or of a server), or its database.")
    ],
    output: Output,
    format: Annotated[str, typer.Option("--format", "-f", help=f"One of {', '.join(names.FORMATS)}.")] = "transformers",
    quantize: Annotated[str | None, typer.Option(help="For formats that quantize.", show_default="none")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Refuse what does not divide among so many ranks.")] = 1,
    job: Annotated[str | None, typer.Option(help="Which job of a database.", show_default="the newest")] = None,
    plan: Annotated[str | None, typer.Option(help="Hash of any candidate of it.", show_default="the best")] = None,
    cache: Cache = None,
    as_json: Json = False,
    url: options.Url = options.DEFAULT_URL,
) -> int:
    """Write a checkpoint, or any plan of a search, in the format of a runtime; loaded again in a fresh process and compared."""
    from selfpruner import api

    names.check("export format", format, names.FORMATS, param="format")
    with ExitStack() as stack:
        place: Path | str = source
        if source.startswith("job_") and not Path(source).exists():
            place = stack.enter_context(_of_job(source, output, url))
        result = api.export(
            place,
            output,
            format=format,
            quantize=quantize,
            tensor_parallel=tensor_parallel,
            job=job,
            plan=plan,
            cache=cache,
            progress=_tell,
        )
    return _print_pruned(result, as_json)


def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, or an export of one.")],
    device: Annotated[str, typer.Option(help="Where it is loaded.")] = "cpu",
    memory: Annotated[str | None, typer.Option(help="Stream it in so much, 2GiB say.", show_default="load it whole")] = None,
    as_json: Json = False,
) -> int:
    """Prove an export again: every file's sha256, and in a fresh process that it loads and computes what it did."""
    from selfpruner.config import Bytes
    from selfpruner.export import formats

    ceiling = None if memory is None else TypeAdapter(Bytes).validate_python(memory)
    result = formats.verify(folder, device=device, memory=ceiling)
    if as_json:
        print(json.dumps(result))
    else:
        found = result["verification"]
        if "allowed_error" in found:
            difference = f"{found['error']:.2g} of their spread (allowed {found['allowed_error']:.2g})"
        else:
            difference = f"at most {found['max_difference']:.2g} (allowed {found['allowed_difference']:.2g})"
        print(f"{folder}  {result['format']}, {result['parameters']:,} parameters, {result['files']} files unchanged")
        print(f"loaded in a fresh process: logits differ by {difference}")
    return 0


# -- parts -------------------------------------------------------------------------------------------------------------
@contextmanager
def _of_job(job: str, output: Path, url: str) -> Iterator[Path]:
    """The folder of a job's checkpoint: the server's own where that is this machine's, else fetched for as long as it is needed."""
    from selfpruner import manifest
    from selfpruner.export.folder import aside

    with options.client(url) as client:
        found = list(client.checkpoints(job))
        if not found:
            raise NotFoundError(f"Job {job} has no checkpoint: it is {client.get(job)['status']}.")
        here = Path(found[-1]["path"])
        listed = here / manifest.NAME
        if listed.is_file() and manifest.sha256(listed) == found[-1]["manifest_sha256"]:
            yield here
        else:
            with aside(output.absolute()) as scratch:
                yield client.download(job, found[-1]["id"], scratch / "checkpoint")


def _plan_file(path: Path) -> dict[str, Any]:
    body = options.read_object(path, "plan", '{"levels": [...]}')
    for key in ("levels", "rates"):
        if isinstance(body.get(key), list) and body[key]:
            if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in body[key]):
                raise ConfigError(f"{path}: {key} must be numbers.", param="plan")
            return {key: body[key]}
    raise ConfigError(f'{path} must hold {{"levels": [...]}} or {{"rates": [...]}}.', param="plan")


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _print_pruned(result: Pruned, as_json: bool) -> int:
    _tell("")
    if as_json:
        rates = [round(rate, 6) for rate in result.layer_rates]
        print(
            json.dumps(
                {
                    "path": str(result.path),
                    "parameters": result.parameters,
                    "plan": result.plan.hash,
                    "levels": list(result.plan.levels),
                    "layer_rates": rates,
                    "verification": dict(result.verification),
                }
            )
        )
    else:
        print(f"{result.path}  {result.parameters:,} parameters  plan {result.plan.hash}, verified in a fresh process")
    return 0


def criteria(as_json: Json = False) -> int:
    """What can decide what stays: every criterion with its patterns, what it needs beyond the weights, and its source."""
    from selfpruner import criteria as registry

    known = [registry.create(name) for name in (*names.CRITERIA, *sorted(names.plugins(names.CRITERION_PLUGINS)))]
    rows: list[dict[str, Any]] = [
        {
            "name": criterion.name,
            "patterns": list(criterion.patterns),
            "needs": sorted(criterion.needs),
            "source": criterion.source,
            "what": names.CRITERIA.get(criterion.name, "from a plug-in"),
        }
        for criterion in known
    ]
    if as_json:
        print(json.dumps(rows))
        return 0
    width = max(len(row["name"]) for row in rows)
    for row in rows:  # two lines each: five columns are more than a terminal is wide
        needs = f"; needs {', '.join(row['needs'])}" if row["needs"] else ""
        print(f"{row['name']:{width}}  {', '.join(row['patterns'])}{needs}")
        print(f"{'':{width}}  {row['what']}. {row['source']}")
    return 0


def compare(
    output: Output,
    more: Annotated[list[str] | None, typer.Argument(metavar="[RATE]...", help="Further rates.", show_default=False)] = None,
    rates: Annotated[str, typer.Option(help="Uniform rates: 0.2,0.3,0.5.")] = "0.2,0.3,0.5",
    model: options.Model = None,
    patterns: Annotated[str, typer.Option(help=f"Which of {', '.join(names.PATTERNS)}.")] = "structured",
    criteria: Annotated[str | None, typer.Option(help="Which criteria, by commas.", show_default="all of the patterns")] = None,
    compensations: Annotated[str | None, typer.Option(help="Which compensations, by commas.", show_default="all")] = None,
    calibration: options.Calibration = None,
    text: Text = None,
    sequences: Annotated[int, typer.Option(min=1, max=65_536, help="Sequences of the held-out text.")] = 32,
    length: Annotated[int, typer.Option(min=16, max=32_768, help="Tokens per sequence of it.")] = 512,
    device: options.Device = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    cache: Cache = None,
    as_json: Json = False,
) -> int:
    """Every criterion with every compensation at uniform rates, on held-out text. The same call again goes on where it stopped."""
    import asyncio

    from rich.console import Console
    from rich.table import Table

    from selfpruner import api, plots
    from selfpruner import compare as side_by_side

    wanted = _numbers([*rates.split(","), *(more or [])])
    methods = side_by_side.methods_of(_split(patterns), _split(criteria) or None, _split(compensations) or None)
    body = options.read_config(config, settings, calibration=calibration, model=model, device=device)
    report: dict[str, Any] = {"sequences": sequences, "length": length}
    if text:
        report["sources"] = [{"source": name} for name in text]
    checked = api.config_of({"preset": "evolution", "report_text": report, **body, "rate": wanted[0]})
    results = side_by_side.Results(output, checked.model_dump(mode="json", include=side_by_side.SETTINGS))
    place, where = cache or api.default_cache(), checked.device
    asyncio.run(side_by_side.measure(checked, methods, wanted, results, cache=place, device=where, progress=_tell))
    _tell("")
    (output / "compare.md").write_text(side_by_side.markdown(results), "utf-8")
    plots.save(side_by_side.chart(results), output / "compare.svg")
    if as_json:
        print(json.dumps({"settings": results.settings, "dense": results.dense, "rows": results.rows}))
    else:
        console = Console(markup=False, highlight=False)
        for heading, rows in side_by_side.sections(results):
            table = Table(title=heading, box=None, padding=(0, 2), header_style="bold")
            for column in side_by_side.COLUMNS:
                table.add_column(column, justify="left" if column in ("criterion", "compensation") else "right")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        console.print(f"Written: compare.json, compare.md and compare.svg in {output}")
    return 1 if any(row["error"] is not None for row in results.rows) else 0


def _split(value: str | None) -> list[str]:
    return [part.strip() for part in (value or "").split(",") if part.strip()]


def _numbers(values: Sequence[str]) -> list[float]:
    """Rates, ascending, each once. Raises ConfigError for what is none."""
    try:
        found = sorted({float(value) for value in values if value.strip()})
    except ValueError:
        found = []
    if not found or not all(0 < rate < 1 for rate in found):
        raise ConfigError("rates must be numbers between 0 and 1, such as 0.2,0.3,0.5.", param="rates")
    return found


ROWS = {
    "dense": "dense",
    "uniform_flap_bias": "uniform, flap + bias",
    "uniform_magnitude": "uniform, magnitude",
    "uniform": "uniform",
    "ramp": "best ramp",
    "best": "best found",
}


def _table(report: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    console.print(comparison(report))
    if report.get("front"):
        console.print(front(report["front"]))


def comparison(report: Mapping[str, Any]) -> Any:
    """The figures of a job's report side by side, as a rich table."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("", no_wrap=True)
    for name in ("parameters", "KL", "perplexity", "prefill tok/s", "decode tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, title in ROWS.items():
        if row := report.get(key):
            speeds = [f"{row[name]:,.0f}" if name in row else "" for name in ("prefill_tps", "decode_tps")]
            table.add_row(title, f"{row['parameters']:,}", f"{row['kl']:.4f}", f"{row['perplexity']:.2f}", *speeds)
    return table


def front(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The members of a front side by side, best quality first, as a rich table."""
    from rich.table import Table

    timed = "latency_us" in rows[0]
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("front", no_wrap=True)
    for name in ("rate", "parameters", "KL", "perplexity", *(("block times", "prefill", "speedup") if timed else ()), "made by"):
        table.add_column(name, justify="left" if name == "made by" else "right", no_wrap=True)
    for row in rows:
        speeds = [f"{row['latency_us'] / 1000:,.1f} ms"] if timed else []
        if timed:
            speeds += [f"{row['prefill_tps']:,.0f} tok/s", f"{row['speedup']:.2f}x"] if "speedup" in row else ["", ""]
        figures = [f"{row['rate']:g}", f"{row['parameters']:,}", f"{row['kl']:.4f}", f"{row['perplexity']:.2f}"]
        table.add_row(row["plan"], *figures, *speeds, row["operator"] + (" (best)" if row["best"] else ""))
    return table


class _Watched:
    """A recorder that also tells a live view; everything is stored before it is shown."""

    def __init__(self, inner: Recorder, view: LiveView) -> None:
        self._inner = inner
        self._view = view

    def find_evaluation(self, plan_hash: str, window: str) -> Evaluation | None:
        return self._inner.find_evaluation(plan_hash, window)

    def save_evaluations(self, rows: Sequence[Evaluation]) -> None:
        self._inner.save_evaluations(rows)

    def find_llm_call(self, sequence: int) -> LlmCall | None:
        return self._inner.find_llm_call(sequence)

    def save_llm_call(self, call: LlmCall) -> None:
        self._inner.save_llm_call(call)

    def save_candidates(self, rows: Sequence[Candidate]) -> None:
        self._inner.save_candidates(rows)

    def event(self, key: str, type: str, message: str, *, level: Level = "info", data: Mapping[str, Any] | None = None) -> None:
        self._inner.event(key, type, message, level=level, data=data)
        self._view.event({"level": level, "message": message})

    def progress(self, progress: Progress) -> None:
        from dataclasses import asdict

        self._inner.progress(progress)
        self._view.progress(asdict(progress))
