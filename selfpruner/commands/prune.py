"""Search, or apply one plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfpruner import options
from selfpruner.commands.show import print_pruned, print_report, tell
from selfpruner.errors import ConfigError

if TYPE_CHECKING:
    from selfpruner.evolution.records import Candidate, Evaluation, Level, LlmCall, Progress, Recorder
    from selfpruner.live import LiveView


def search(
    output: options.Output,
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
    cache: options.Cache = None,
    again: Annotated[bool, typer.Option("--again", help="Search once more in a folder that has a search, beside it.")] = False,
    as_json: options.Json = False,
) -> int:
    """Search in this process, without a server. The same call again goes on where it was interrupted, or shows what was found."""
    from selfpruner import api
    from selfpruner.live import LiveView, account
    from selfpruner.proposers.settings import from_environment

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
    proposers = from_environment() if checked.uses_llm else {}
    with LiveView(f"{checked.model} rate {checked.rate:g}") as view:
        result = api.search(
            checked.rate,
            output,
            cache=cache,
            proposers=proposers,
            again=again,
            watch=lambda recorder: _Watched(recorder, view),
            **{key: value for key, value in body.items() if key != "rate"},
        )
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
    output: options.Output,
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
    cache: options.Cache = None,
    as_json: options.Json = False,
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
    result = api.prune(output, rate=wanted, **given, cache=cache, progress=tell, **body)
    return print_pruned(result, as_json)


def _plan_file(path: Path) -> dict[str, Any]:
    body = options.read_object(path, "plan", '{"levels": [...]}')
    for key in ("levels", "rates"):
        if isinstance(body.get(key), list) and body[key]:
            if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in body[key]):
                raise ConfigError(f"{path}: {key} must be numbers.", param="plan")
            return {key: body[key]}
    raise ConfigError(f'{path} must hold {{"levels": [...]}} or {{"rates": [...]}}.', param="plan")


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

    def find_event(self, key: str) -> Mapping[str, Any] | None:
        return self._inner.find_event(key)

    def progress(self, progress: Progress) -> None:
        from dataclasses import asdict

        self._inner.progress(progress)
        self._view.progress(asdict(progress))
