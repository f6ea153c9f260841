"""``search`` and ``prune``: find the best plan, or apply one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import typer

from selfpruner.cli import shared_options
from selfpruner.cli.show import print_pruned, print_report
from selfpruner.config import SearchConfig
from selfpruner.errors import ConfigError


@shared_options.spread
def search(
    output: shared_options.Output,
    options: shared_options.SearchOptions,
    devices: shared_options.Devices = None,
    ray: shared_options.Ray = None,
    cache: shared_options.Cache = None,
    again: Annotated[bool, typer.Option("--again", help="Search once more with the same settings.")] = False,
    as_json: shared_options.Json = False,
) -> int:
    """Search in this process, without a server. The same call again goes on where it was interrupted, or shows what was found."""
    return run_search(options.body(), output, cache, devices=devices, ray=ray, again=again, as_json=as_json)


def run_search(
    body: Mapping[str, object],
    output: Path,
    cache: Path | None,
    *,
    devices: str | None = None,
    ray: str | None = None,
    again: bool = False,
    as_json: bool = False,
) -> int:
    """Run the search that ``body`` asks for, and print what it found."""
    from selfpruner import api
    from selfpruner.jobs.live_view import account
    from selfpruner.proposers.settings import from_environment

    checked = api.config_of(body)
    proposers = from_environment() if "llm" in checked.needs else {}
    fields: dict[str, Any] = {key: value for key, value in body.items() if key != "rate"}
    result = api.search(checked.rate, output, cache=cache, proposers=proposers, again=again, devices=devices, ray=ray, **fields)
    if result.reused:
        print(f"{output} holds this search already, finished; nothing was computed. --again searches once more.", file=sys.stderr)
    if as_json:
        print(json.dumps(result.report))
    else:
        print_report(result.report)
        for line in account(result.report):
            print(line)
        print(f"checkpoint {result.checkpoint['path']}")
    return 0


class GivenPlan(TypedDict, total=False):
    """A plan as a file gives it, see :func:`selfpruner.api.prune`."""

    levels: list[int]
    rates: list[float]


@shared_options.spread
def prune(
    output: shared_options.Output,
    options: shared_options.PruneOptions,
    plan: Annotated[
        Path | None, typer.Option(help='JSON with "levels", or "rates" per layer or block; a checkpoint\'s plan.json will do.')
    ] = None,
    devices: shared_options.Devices = None,
    ray: shared_options.Ray = None,
    cache: shared_options.Cache = None,
    as_json: shared_options.Json = False,
) -> int:
    """Apply one plan without a search: a uniform rate, or the levels or rates of a file."""
    from selfpruner import api

    body: dict[str, Any] = options.body()
    given = _plan_file(plan) if plan is not None else {}
    wanted = body.pop("rate", None)
    known = {*SearchConfig.model_fields, *GivenPlan.__annotations__}
    if unknown := {key: value for key, value in body.items() if key not in known}:
        api.config_of({"rate": 0.5, **unknown})
    if both := given.keys() & body.keys():
        raise ConfigError(f"{plan} has {', '.join(both)}: leave out --set {', '.join(both)}.", param="plan")
    result = api.prune(output, rate=wanted, **given, cache=cache, devices=devices, ray=ray, **body)
    return print_pruned(result, as_json)


def _plan_file(path: Path) -> GivenPlan:
    body = shared_options.read_object(path, "plan", '{"levels": [...]}')
    for key in ("levels", "rates"):
        numbers = body.get(key)
        if isinstance(numbers, list) and numbers:
            if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in numbers):
                raise ConfigError(f"{path}: {key} must be numbers.", param="plan")
            return {"levels": numbers} if key == "levels" else {"rates": numbers}
    raise ConfigError(f'{path} must hold {{"levels": [...]}} or {{"rates": [...]}}.', param="plan")
