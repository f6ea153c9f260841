"""What commands print on stdout: results and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from selfpruner.cli import shared_options
from selfpruner.files.report import FrontRow, Report, StageShare, Subject

if TYPE_CHECKING:
    from selfpruner.api import Pruned
    from selfpruner.tables import Table


def print_pruned(result: Pruned, as_json: bool) -> int:
    if as_json:
        rates = [round(rate, 6) for rate in result.layer_rates]
        print(
            json.dumps(
                {
                    "path": str(result.path),
                    "parameters": result.parameters,
                    "plan": result.plan.hash if result.plan.levels else None,
                    "levels": list(result.plan.levels),
                    "layer_rates": rates,
                    "verification": dict(result.verification),
                }
            )
        )
    else:
        plan = f"plan {result.plan.hash}, " if result.plan.levels else ""  # of a model that was saved later it is not known
        print(f"{result.path}  {result.parameters:,} parameters  {plan}verified in a fresh process")
    return 0


def fields(as_json: shared_options.Json = False) -> int:
    """Every field of a search, for --set, --config, JSON requests and Python; with --json the JSON Schema."""
    from pydantic import BaseModel
    from pydantic_core import to_json

    from selfpruner.config import SearchConfig, field_names

    if as_json:
        print(json.dumps(SearchConfig.model_json_schema()))
        return 0
    for name in field_names():
        *path, last = name.split(".")
        model, given = SearchConfig, None
        for part in path:
            given = model.model_fields[part].default  # may name other values than its own class
            model = type(given)
        field = model.model_fields[last]
        default = field.default if given is None else getattr(given, last)
        if not isinstance(default, BaseModel):  # else its own fields follow
            choices = [str(choice) for choice in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []
            parts = [f"one of {', '.join(choices)}" if choices else "", field.description or ""]
            shown = "required" if field.is_required() else to_json(default).decode()
            print(f"{name}  ({shown})  {'; '.join(part for part in parts if part)}".rstrip())
    return 0


ROWS: Mapping[Subject, str] = {
    "dense": "dense",
    "uniform_flap_bias": "uniform, flap + bias",
    "uniform_magnitude": "uniform, magnitude",
    "uniform": "uniform",
    "ramp": "best ramp",
    "best": "best found",
}


def print_report(report: Report) -> None:
    from selfpruner.tables import Screen

    console = Screen()
    console.print(comparison(report))
    if report.get("front"):
        console.print(front(report["front"]))


def comparison(report: Report) -> Table:
    """The figures of a job's report side by side."""
    from selfpruner.tables import Table

    table = Table("", "parameters", "KL", "perplexity", "prefill tok/s", "decode tok/s", words=("",))
    for key, title in ROWS.items():
        if row := report.get(key):
            speeds = [f"{row[name]:,.0f}" if name in row else "" for name in ("prefill_tps", "decode_tps")]
            table.add_row(
                title, f"{row['parameters']:,}", _figure(row.get("kl"), ".4f"), _figure(row.get("perplexity"), ".2f"), *speeds
            )
    return table


def _figure(value: float | None, form: str) -> str:
    """A figure, or nothing where it could not be had."""
    return "" if value is None else format(value, form)


# Where a stage's name alone would not say what it is.
STAGE_TITLES = {
    "loading": "loading the model",
    "scoring": "generations: scoring",
    "thinking": "generations: thinking",
    "waiting": "waiting for a worker",
    "writing": "writing probe",
}


def stages(rows: Sequence[StageShare]) -> Table:
    """Where the time of a job went: ``stages`` of its report."""
    from selfpruner.tables import Table

    table = Table("stage", "seconds", "share", "tokens", "workers", "peak MiB", words=("stage",))
    for row in rows:
        counts = [f"{count:,}" if count else "" for count in (row["tokens"], row["workers"], row["peak_mib"])]
        name = STAGE_TITLES.get(row["stage"], row["stage"])
        table.add_row(name, f"{row['seconds']:,.1f}", f"{100 * row['share']:.1f} %", *counts)
    whole = sum(row["seconds"] for row in rows)
    table.add_row("together", f"{whole:,.1f}", "100.0 %", f"{sum(row['tokens'] for row in rows):,}")
    return table


def front(rows: Sequence[FrontRow]) -> Table:
    """The members of a front side by side, best quality first."""
    from selfpruner.tables import Table

    timed = "latency_us" in rows[0]
    speed = ("block times", "prefill", "speedup") if timed else ()
    table = Table("front", "rate", "parameters", "KL", "perplexity", *speed, "made by", words=("front", "made by"))
    for row in rows:
        speeds = [f"{row['latency_us'] / 1000:,.1f} ms"] if timed else []
        if timed:
            speeds += [f"{row['prefill_tps']:,.0f} tok/s", f"{row['speedup']:.2f}x"] if "speedup" in row else ["", ""]
        figures = [f"{row['rate']:g}", f"{row['parameters']:,}", _figure(row["kl"], ".4f"), _figure(row["perplexity"], ".2f")]
        table.add_row(row["plan"], *figures, *speeds, row["operator"] + (" (best)" if row["best"] else ""))
    return table
