"""``evaluate``, ``benchmark``, ``criteria`` and ``compare``: how good, how fast, and which criterion."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer
from pydantic import TypeAdapter, ValidationError

from selfpruner import catalogue, models
from selfpruner.calibration import files
from selfpruner.cli import shared_options
from selfpruner.config import Share
from selfpruner.errors import ConfigError
from selfpruner.files import atomic, places
from selfpruner.progress import shown

if TYPE_CHECKING:
    from selfpruner.api import ModelScore

Text = Annotated[
    list[str] | None, typer.Option("--text", "-t", help="Held-out text: auto, pydoc, hub:DATASET, or a file; repeat to mix.")
]


def evaluate(
    model: Annotated[list[str], typer.Argument(help="Checkpoints, or models by name, folder or hub id.", show_default=False)],
    tasks: Annotated[
        str | None,
        typer.Option(help=f"Zero-shot tasks, by commas: {','.join(catalogue.ZERO_SHOT_TASKS)}, or others of the harness."),
    ] = None,
    perplexity: Annotated[str | None, typer.Option(help=f"Customary texts: {','.join(catalogue.PERPLEXITY_TEXTS)}.")] = None,
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
    device: shared_options.Device = None,
    devices: shared_options.Devices = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")] = "auto",
    memory: shared_options.Memory = None,
    cache: shared_options.Cache = None,
    as_json: shared_options.Json = False,
) -> int:
    """Quality: zero-shot tasks, perplexity and writing of several models; or one model's perplexity and KL on held-out text."""
    wanted = _split(tasks), _split(perplexity)
    if not any(wanted) and not generation:
        from selfpruner import api

        if len(model) > 1:
            raise ConfigError("Say what to measure on several models: --tasks, --perplexity or --generation.", param="tasks")
        score = api.evaluate(
            model[0],
            text=tuple(text or ("auto",)),
            sequences=sequences,
            length=length,
            against=against,
            device=device or "auto",
            devices=devices,
            memory=memory,
            cache=cache,
        )
        return _print_score(score, as_json)
    if text:
        raise ConfigError("--text is a measurement of its own; leave out --tasks, --perplexity and --generation.", param="text")
    if output is None:
        raise ConfigError("Name a file for the results: -o quality.json. The same call goes on where it stopped.", param="output")
    from selfpruner import api
    from selfpruner.judging import quality
    from selfpruner.tables import Screen, Table

    quality_report = api.quality(
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
        devices=devices,
        dtype=dtype,
        memory=memory,
        cache=cache,
    )
    if as_json:
        print(json.dumps(quality.plain(quality_report)))
        return 0
    heading, *rows = quality.cells(quality_report)
    table = Table(*heading, words=heading[:1])
    for row in rows:
        table.add_row(*row)
    console = Screen()
    console.print(table)
    console.print(f"± one standard error; in brackets the difference from {quality_report.against} on the same documents.")
    console.print("Percent, but for perplexities and distinct-n. A mean of acc_norm takes acc of tasks that have no acc_norm.")
    return 0


def _print_score(score: ModelScore, as_json: bool) -> int:
    from dataclasses import asdict

    if as_json:
        print(json.dumps(asdict(score)))
    else:
        kl = "" if score.kl is None else f"  kl {score.kl:.4f} nats/token"
        print(f"{score.model}  {score.parameters:,} parameters  perplexity {score.perplexity:.2f}{kl}  ({score.tokens:,} tokens)")
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
    backend: Annotated[str, typer.Option(help=f"What runs them: {', '.join(catalogue.BACKENDS)}.")] = "transformers",
    url: Annotated[
        list[str] | None,
        typer.Option(help="Address of a running server up to /v1, for vllm; repeat for each model. A key comes from VLLM_API_KEY."),
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens to read.", show_default="512, or what fits all models")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to write after them.")] = 64,
    repetitions: Annotated[int, typer.Option(help="Rounds in which every model is timed.")] = 7,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Decode by torch.compile with a cache of fixed size (transformers; compiles for minutes)."),
    ] = False,
    device: shared_options.Device = None,
    devices: shared_options.Devices = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    memory: Annotated[
        str | None, typer.Option(help="Ceiling for all models together, 2GiB say; larger ones are refused.", show_default="none")
    ] = None,
    cache: shared_options.Cache = None,
    as_json: shared_options.Json = False,
) -> int:
    """Speed, memory and their bounds, dense and pruned in turn in one run."""
    from selfpruner import api

    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output} cannot be written: name a file in a folder that exists.", param="output")
    places.writable_file(output)
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
        devices=devices,
        dtype=dtype,
        memory=memory,
        cache=cache,
    )
    body = report.to_dict()
    atomic.write_text(output, json.dumps(body, indent=1) + "\n")
    print(json.dumps(body) if as_json else report.markdown(), end="\n" if as_json else "")
    return 0


class CriterionRow(TypedDict):
    name: str
    patterns: list[str]
    needs: list[str]
    source: str
    what: str


def criteria(as_json: shared_options.Json = False) -> int:
    """What can decide what stays: every criterion with its patterns, what it needs beyond the weights, and its source."""
    from selfpruner import criteria as registry

    known = [registry.create(name) for name in (*catalogue.CRITERIA, *sorted(catalogue.plugins(catalogue.CRITERION_PLUGINS)))]
    rows: list[CriterionRow] = [
        {
            "name": criterion.name,
            "patterns": list(criterion.patterns),
            "needs": sorted(criterion.needs),
            "source": criterion.source,
            "what": entry.text if (entry := catalogue.CRITERIA.get(criterion.name)) else "from a plug-in",
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


@shared_options.spread
def compare(
    output: shared_options.Output,
    options: shared_options.ModelOptions,
    more: Annotated[list[str] | None, typer.Argument(metavar="[RATE]...", help="Further rates.", show_default=False)] = None,
    rates: Annotated[str, typer.Option(help="Uniform rates: 0.2,0.3,0.5.")] = "0.2,0.3,0.5",
    patterns: Annotated[str, typer.Option(help=f"Which of {', '.join(catalogue.PATTERNS)}.")] = "structured",
    criteria: Annotated[str | None, typer.Option(help="Which criteria, by commas.", show_default="all of the patterns")] = None,
    compensations: Annotated[str | None, typer.Option(help="Which compensations, by commas.", show_default="all")] = None,
    text: Text = None,
    sequences: Annotated[int, typer.Option(min=1, max=65_536, help="Sequences of the held-out text.")] = 32,
    length: Annotated[int, typer.Option(min=16, max=32_768, help="Tokens per sequence of it.")] = 512,
    devices: shared_options.Devices = None,
    cache: shared_options.Cache = None,
    as_json: shared_options.Json = False,
) -> int:
    """Every criterion with every compensation at uniform rates, on held-out text. The same call again goes on where it stopped."""
    import asyncio

    from selfpruner import api
    from selfpruner.cli import plots
    from selfpruner.jobs import comparison as side_by_side
    from selfpruner.tables import Screen, Table

    wanted = _numbers([*rates.split(","), *(more or [])])
    methods = side_by_side.methods_of(_split(patterns), _split(criteria) or None, _split(compensations) or None)
    report: dict[str, object] = {"sequences": sequences, "length": length}
    if text:
        report["sources"] = [{"source": name} for name in text]
    checked = api.config_of({"preset": "evolution", "report_text": report, **options.body(), "rate": wanted[0]})
    workers = api.placed(devices, checked.device) or (checked.device,)
    places.writable_folder(output)
    files.look_at(checked, ("report",))
    results = side_by_side.ComparisonFile(output, checked.model_dump(mode="json", include=side_by_side.SETTINGS))
    if not results.rows:
        models.precheck(checked.model)  # otherwise every method would find out on its own
    cache_dir = cache or api.default_cache()
    with shown(True) as tell:
        asyncio.run(side_by_side.measure(checked, methods, wanted, results, cache=cache_dir, devices=workers, progress=tell))
    atomic.write_text(output / "compare.md", side_by_side.markdown(results))
    no_picture = plots.draw(lambda: side_by_side.chart(results), output / "compare.svg")
    if as_json:
        print(json.dumps({"settings": results.settings, "dense": results.dense, "rows": results.rows}))
    else:
        console = Screen()
        for heading, rows, failures in side_by_side.sections(results):
            table = Table(*side_by_side.COLUMNS, title=heading, words=("criterion", "compensation"))
            for row in rows:
                table.add_row(*row)
            console.print(table)
            for failure in failures:
                console.print(failure)
        console.print(
            f"Written: compare.json, compare.md and compare.svg in {output}" + (f" - but {no_picture}" if no_picture else "")
        )
    return 1 if any(row["error"] is not None for row in results.rows) else 0


def _split(value: str | None) -> list[str]:
    return [part.strip() for part in (value or "").split(",") if part.strip()]


def _numbers(values: Sequence[str]) -> list[float]:
    """Rates, ascending, each once. Raises ConfigError for what is none."""
    try:
        shares = sorted({TypeAdapter(Share).validate_python(value) for value in values if value.strip()})
    except ValidationError as error:
        raise ConfigError(f"rates: {error.errors()[0]['msg'].removeprefix('Value error, ')}", param="rates") from None
    if not shares:
        raise ConfigError("Give rates between 0 and 1, such as 0.2,0.3,0.5.", param="rates")
    return shares
