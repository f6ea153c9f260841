"""Search, or apply one plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from selfpruner.cli import shared_options
from selfpruner.cli.show import print_pruned, print_report
from selfpruner.errors import ConfigError


def search(
    output: shared_options.Output,
    model: shared_options.Model = None,
    rate: shared_options.Rate = None,
    objective: shared_options.Objective = None,
    rates: shared_options.Rates = None,
    preset: shared_options.Preset = None,
    pattern: shared_options.Pattern = None,
    criterion: shared_options.Criterion = None,
    compensation: shared_options.Compensation = None,
    calibration: shared_options.Calibration = None,
    generations: shared_options.Generations = None,
    population: shared_options.Population = None,
    proposer: shared_options.Proposer = None,
    seed: shared_options.Seed = None,
    device: shared_options.Device = None,
    memory: shared_options.Memory = None,
    config: shared_options.ConfigFile = None,
    settings: shared_options.Settings = None,
    cache: shared_options.Cache = None,
    again: Annotated[bool, typer.Option("--again", help="Search once more in a folder that has a search, beside it.")] = False,
    as_json: shared_options.Json = False,
) -> int:
    """Search in this process, without a server. The same call again goes on where it was interrupted, or shows what was found."""
    from selfpruner import api
    from selfpruner.jobs.live_view import account
    from selfpruner.proposers.settings import from_environment

    body = shared_options.read_config(
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
    proposers = from_environment() if "llm" in checked.needs else {}
    rest = {key: value for key, value in body.items() if key != "rate"}
    result = api.search(checked.rate, output, cache=cache, proposers=proposers, again=again, **rest)
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


def prune(
    output: shared_options.Output,
    model: shared_options.Model = None,
    rate: shared_options.Rate = None,
    plan: Annotated[
        Path | None, typer.Option(help='JSON with "levels", or "rates" per layer or block; a checkpoint\'s plan.json will do.')
    ] = None,
    pattern: shared_options.Pattern = None,
    criterion: shared_options.Criterion = None,
    compensation: shared_options.Compensation = None,
    calibration: shared_options.Calibration = None,
    seed: shared_options.Seed = None,
    device: shared_options.Device = None,
    memory: shared_options.Memory = None,
    config: shared_options.ConfigFile = None,
    settings: shared_options.Settings = None,
    cache: shared_options.Cache = None,
    as_json: shared_options.Json = False,
) -> int:
    """Apply one plan without a search: a uniform rate, or the levels or rates of a file."""
    from selfpruner import api

    body = shared_options.read_config(
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
    result = api.prune(output, rate=wanted, **given, cache=cache, **body)
    return print_pruned(result, as_json)


def _plan_file(path: Path) -> dict[str, Any]:
    body = shared_options.read_object(path, "plan", '{"levels": [...]}')
    for key in ("levels", "rates"):
        if isinstance(body.get(key), list) and body[key]:
            if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in body[key]):
                raise ConfigError(f"{path}: {key} must be numbers.", param="plan")
            return {key: body[key]}
    raise ConfigError(f'{path} must hold {{"levels": [...]}} or {{"rates": [...]}}.', param="plan")
