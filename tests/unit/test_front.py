"""Pareto fronts: what is on them, what they cost, what a job says about them, and that a resumed one repeats nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from benchmarks.front import Subject, compare, table
from selfpruner import api
from selfpruner.cli import app as cli
from selfpruner.cli import shared_options
from selfpruner.cli.plots import front_chart, result_chart
from selfpruner.cli.show import front
from selfpruner.config import SearchConfig
from selfpruner.errors import BudgetError, ConfigError
from selfpruner.evaluation.latency import time_blocks
from selfpruner.evaluation.session import prepare
from selfpruner.evolution.front import ALIKE, NAME, Front, Latencies, Member, front_tokens
from selfpruner.evolution.outcome import Outcome
from selfpruner.jobs.front_report import latencies_of
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.lifecycle import JobResult
from selfpruner.jobs.run import session_of
from selfpruner.models import load, resolve
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.progress import OnProgress
from selfpruner.store.store import Store
from selfpruner.testing.spaces import space_of
from selfpruner.testing.tiny_models import sample_text, tiny_model
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import MeasureRequest, MeasureResult, MeasureRow, PrepareRequest, TaskRequest, TimeBlocksRequest
from server.schemas import JobRequest
from tests.helpers.searching import SESSION, AnalyticPool, DiedError, Interruptions, MemoryRecorder, Run, config_of, prepared_of
from tests.helpers.small_jobs import Place
from tests.helpers.small_jobs import config_of as job_config

OBJECTIVES = ("quality,parameters", "quality,latency", "quality,parameters,latency")


def space_for(config: SearchConfig) -> SearchSpace:
    return space_of(layers=6, rate=config.rate, granularity=config.granularity, bias=True)


class Fronted:
    """A search and its front, over a recorder that may be another's."""

    def __init__(
        self, objective: str, *, recorder: MemoryRecorder | None = None, interruptions: Interruptions | None = None, **changes: Any
    ) -> None:
        self.config = config_of(changes.pop("preset", "evolution"), objective=objective, **changes)
        self.space = space_for(self.config)
        self.pool = AnalyticPool(self.space, interruptions)
        self.run = Run(self.config, self.space, recorder or MemoryRecorder(), pool=self.pool)
        self.front = Front(self.config, self.space, self.run.evaluator, self.run.recorder, self.run.windows)
        self.latencies: Latencies | None = None
        self.searched: Outcome | None = None

    async def make(self) -> tuple[Outcome, list[Member]]:
        if "latency" in self.config.objective:
            self.latencies = await latencies_of(self.pool, SESSION, 64, lambda _: None)
        self.searched = await self.run.go()
        return await self.front.make(self.run.search.state, self.searched, self.latencies)

    def go(self) -> tuple[Outcome, list[Member]]:
        return asyncio.run(self.make())


def beaten(members: list[Member], metric: str = "kl") -> list[tuple[Member, Member]]:
    def better(one: Member, other: Member) -> bool:
        pairs = list(zip(one.values(metric), other.values(metric), strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return [(one, other) for one in members for other in members if better(one, other)]


# -- what a request may ask for ------------------------------------------------------------------------------------------
def test_objectives_as_a_command_line_has_them() -> None:
    config = SearchConfig(rate=0.2, objective="quality, parameters", rates="0.3,0.1")
    assert config.objective == ("quality", "parameters")
    assert config.front_rates == (0.1, 0.2, 0.3)
    assert SearchConfig(rate=0.2).front_rates == (0.2,)
    assert SearchConfig(rate=0.2, objective=("quality", "parameters")).front_rates == (0.1, 0.125, 0.15, 0.175, 0.2)


def test_objectives_over_http_and_on_the_command_line() -> None:
    asked = JobRequest.model_validate({"rate": 0.2, "objective": "quality,parameters", "rates": [0.1], "metadata": {"who": "me"}})
    assert asked.config().front_rates == (0.1, 0.2)
    stored = json.loads(json.dumps(asked.config().model_dump(mode="json")))
    assert SearchConfig.model_validate(stored) == asked.config()
    body = shared_options.read_config(None, None, rate=0.2, objective="quality,latency", rates=None)
    assert api.config_of(body).objective == ("quality", "latency")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "latency"}, "start with quality"),
        ({"objective": "quality,latency,latency"}, "each once"),
        ({"objective": "quality,speed"}, "'latency' or 'parameters'"),
        ({"rates": [0.1]}, "quality,parameters"),
        ({"objective": "quality,parameters", "rates": [1.5]}, "between 0 and 1"),
    ],
)
def test_objectives_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SearchConfig.model_validate({"rate": 0.2, **changes})


def test_a_rate_out_of_reach_is_found_before_the_search() -> None:
    with pytest.raises(BudgetError) as caught:
        Fronted("quality,parameters", rates=(0.1, 0.99))
    assert caught.value.param == "rates"


# -- what is on a front --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("preset", ["evolution", "self-pruner"])
def test_no_member_beats_another(objective: str, preset: str) -> None:
    fronted = Fronted(objective, preset=preset)
    outcome, members = fronted.go()
    metric = fronted.config.fitness
    assert len(members) >= 2
    assert not beaten(members, metric)
    values = [member.fitness.value(metric) for member in members]
    assert values == sorted(values)
    assert outcome.best.plan_hash in {member.candidate.plan_hash for member in members}
    assert len({member.candidate.plan_hash for member in members}) == len(members)
    for member in members:
        space = fronted.front.spaces[member.rate]
        assert space.meets_budget(member.plan)
        assert member.fitness.tokens == 128, "members are compared on the final's tokens"
        if fronted.latencies is not None:
            assert member.latency == pytest.approx(fronted.latencies.of(member.plan))


def test_one_plan_per_rate() -> None:
    _, members = Fronted("quality,parameters", rates=(0.1, 0.15, 0.3)).go()
    assert [member.rate for member in members] == [0.1, 0.15, 0.2, 0.3]


def test_members_differ_in_latency_by_what_matters() -> None:
    fronted = Fronted("quality,latency")
    _, members = fronted.go()
    assert fronted.latencies is not None
    dense = fronted.latencies.of(fronted.space.dense)
    times = sorted(fronted.latencies.of(member.plan) for member in members)
    assert all(after - before > 0 for before, after in pairwise(times))
    assert len({round(time / (ALIKE * dense)) for time in times}) == len(times)
    assert times[0] < 0.97 * times[-1], "something faster was found at the same size"


def test_a_front_is_at_least_as_good_as_the_search_and_uniform_rates() -> None:
    fronted = Fronted("quality,parameters")
    outcome, members = fronted.go()
    assert fronted.searched is not None
    assert outcome.best is fronted.searched.best
    for member in members:
        space = fronted.front.spaces[member.rate]
        uniform = space.project([member.rate] * space.layers)
        assert fronted.pool.kl(member.plan) < fronted.pool.kl(uniform)


def test_a_plan_that_is_better_in_everything_takes_the_best_ones_place() -> None:
    fronted = Fronted("quality,latency", operators=["level_switch"], generations=0, initial=["uniform"])
    fronted.pool.slow_attention = 0.1  # nothing is gained by the heads that the uniform plan gives up
    outcome, members = fronted.go()
    assert fronted.searched is not None
    assert fronted.searched.best.operator == "uniform"
    assert outcome.best.operator == NAME
    assert outcome.best.plan_hash in {member.candidate.plan_hash for member in members}
    assert fronted.space.meets_budget(Plan(outcome.best.levels))


def test_one_objective_is_no_front_and_costs_nothing() -> None:
    run = Run(config_of(), space_for(config_of()), MemoryRecorder())
    assert front_tokens(run.search.config, run.windows) == 0
    assert front_tokens(config_of(objective="quality,parameters"), run.windows) > 0


# -- what it costs and keeps ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_front_costs_no_more_than_it_says(objective: str) -> None:
    fronted = Fronted(objective)
    outcome, _ = fronted.go()
    assert fronted.searched is not None
    assert 0 < outcome.tokens - fronted.searched.tokens <= front_tokens(fronted.config, fronted.run.windows)
    assert outcome.tokens == fronted.pool.tokens["fitness"]


def test_a_budget_leaves_room_for_the_front() -> None:
    outcome, members = Fronted("quality,parameters", budget_tokens=8000, generations=50, patience=0).go()
    assert outcome.tokens <= 8000
    assert "budget" in outcome.stopped
    assert len(members) == 5


def test_several_rates_in_one_run_cost_less_than_separate_runs() -> None:
    rates = (0.1, 0.15, 0.2, 0.25)
    fronted = Fronted("quality,parameters", rates=rates)
    outcome, members = fronted.go()
    separate = 0
    for rate, member in zip(rates, members, strict=True):
        config = config_of(rate=rate)
        run = Run(config, space_for(config), MemoryRecorder())
        alone = asyncio.run(run.go())
        separate += alone.tokens
        assert fronted.pool.kl(member.plan) < 1.15 * run.pool.kl(Plan(alone.best.levels))
    assert outcome.tokens < 0.6 * separate


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_plans_of_other_rates_are_candidates_without_a_standing(objective: str) -> None:
    fronted = Fronted(objective)
    outcome, members = fronted.go()
    recorder = fronted.run.recorder
    made = [row for row in recorder.candidates.values() if row.operator == NAME]
    assert outcome.made[NAME] == len(made)
    assert made or "latency" in objective, "a faster plan may have been tried already, one of another rate cannot"
    assert len(recorder.candidates) == sum(outcome.made.values())
    for row in made:
        assert row.status == "evaluated"
        assert row.fitness is not None
        assert row.parents == (fronted.searched.best.plan_hash,)  # type: ignore[union-attr]
        assert (row.relative is not None) == fronted.space.meets_budget(Plan(row.levels))
    _, _, data = recorder.events[NAME]
    assert [row["plan"] for row in data["members"]] == [member.candidate.plan_hash for member in members]
    assert {member.candidate.plan_hash for member in members} <= set(recorder.candidates)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_front_repeats_nothing(objective: str) -> None:
    counter = Interruptions()
    whole = Fronted(objective, interruptions=counter)
    outcome, members = whole.go()
    for at in (counter.points - 1, counter.points):
        recorder = MemoryRecorder()
        with pytest.raises(DiedError):
            Fronted(objective, recorder=recorder, interruptions=Interruptions(at)).go()
        second = Fronted(objective, recorder=recorder)
        again, same = second.go()
        assert [m.candidate.plan_hash for m in same] == [m.candidate.plan_hash for m in members]
        assert (again.best.plan_hash, again.made, again.tokens) == (outcome.best.plan_hash, outcome.made, outcome.tokens)
        assert recorder.candidates == whole.run.recorder.candidates
        assert recorder.events == whole.run.recorder.events
        assert max(second.pool.seen.values(), default=1) == 1
        third = Fronted(objective, recorder=recorder)
        third.go()
        assert not third.pool.seen


# -- a whole job ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Done:
    place: Place
    config: SearchConfig
    job_id: str
    result: JobResult


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("front")
    text = folder / "text.txt"
    text.write_text(sample_text(30_000, seed=3))
    model = tiny_model(folder / "model", "llama", layers=3, ffn=96)
    config = job_config(model, text, objective="quality,parameters,latency", rates=[0.1, 0.3], generations=1)
    with Store(folder / "selfpruner.db") as store:
        place = Place(folder, model, text, store)
        job_id = place.job(config)
        store.transition(job_id, "running")
        result, _ = place.run(config, job_id)
        store.set_result(job_id, result.report)
        store.transition(job_id, "succeeded")
        yield Done(place, config, job_id, result)


def test_the_report_of_a_front(done: Done) -> None:
    report = done.result.report
    json.dumps(report, allow_nan=False)
    rows = report["front"]
    assert {row["rate"] for row in rows} == {0.1, 0.2, 0.3}
    assert [row["plan"] for row in rows if row["best"]] == [report["best_plan"]]
    assert report["plans"] == sum(row["made"] for row in report["operators"].values())
    for row in rows:
        removed = report["model"]["parameters"] - row["parameters"]
        assert removed / report["model"]["decoder_parameters"] >= row["rate"]
        assert row["kl"] > 0
        assert row["perplexity"] > 1
        assert 0 < row["latency_us"] < 2 * report["latency"]["dense_us"]
        assert row["prefill_tps"] > 0
        assert row["speedup"] > 0
        if row["best"]:
            assert (row["kl"], row["parameters"]) == (report["best"]["kl"], report["best"]["parameters"])
    stored = {row.plan_hash: row for row in done.place.store.candidates(done.job_id, limit=1000).data}
    assert {row["plan"] for row in rows} <= set(stored)


def test_plans_of_other_rates_do_not_rank_among_the_jobs_own(done: Done) -> None:
    ranked = done.place.store.candidates(done.job_id, limit=1000, order="fitness").data
    places = [index for index, row in enumerate(ranked) if row.operator == NAME and row.relative is None]
    compared = [index for index, row in enumerate(ranked) if row.relative is not None and row.reason is None]
    assert places
    assert min(places) > max(compared)
    assert ranked[0].plan_hash == done.result.report["best_plan"]


def test_any_member_can_be_exported(done: Done) -> None:
    member = next(row for row in done.result.report["front"] if row["rate"] == 0.1)
    folder = done.place.folder
    cut = api.export(folder, folder / "cut", job=done.job_id, plan=member["plan"], cache=folder / "cache")
    assert cut.parameters == member["parameters"]
    card = json.loads((folder / "cut" / "plan.json").read_text())
    assert card["rate"] == pytest.approx(0.1, abs=0.02)


def test_times_of_blocks(done: Done) -> None:
    handler = SessionHandler("cpu")
    session = session_of(done.config, done.place.folder / "cache")
    first = handler.handle(session, TimeBlocksRequest(tokens=32), lambda _: None, lambda: False)
    space = handler.handle(session, PrepareRequest(), lambda _: None, lambda: False).space
    assert [len(times) for times in first.blocks] == [len(block.options) for block in space.blocks]
    assert all(time > 0 for times in first.blocks for time in times)
    assert first.rest > 0
    assert handler.handle(session, TimeBlocksRequest(tokens=32), lambda _: None, lambda: False) == first, "measured once"
    # A shape takes the same time in every layer.
    by_width = {tuple(times) for block, times in zip(space.blocks, first.blocks, strict=True) if block.kind == "ffn"}
    assert len(by_width) == 1


def test_a_streamed_model_has_no_latency_worth_a_plan(done: Done) -> None:
    cache = done.place.folder / "cache"
    loaded = load(resolve(str(done.place.model), cache), "cpu", "float32")
    held = prepare(done.config, replace(loaded, streamed=True), cache, (), lambda _: None, lambda: False)
    with pytest.raises(ConfigError, match="streamed") as caught:
        time_blocks(held, 32)
    assert caught.value.param == "objective"


# -- the benchmark -------------------------------------------------------------------------------------------------------
class TimingPool(AnalyticPool):
    """Also builds and times models: their prefill takes what their blocks take."""

    async def run(self, session: Session, request: TaskRequest[Any], on_progress: OnProgress | None = None) -> Any:
        if not isinstance(request, MeasureRequest):
            return await super().run(session, request, on_progress)
        assert request.decode is False
        assert 2 <= len(request.plans) <= 4
        times = await super().run(session, TimeBlocksRequest(tokens=64))
        latencies = Latencies(64, times.blocks, times.rest)
        speeds = {name: 64e6 / latencies.of(Plan(levels)) for name, levels in request.plans.items()}
        return MeasureResult(rows={name: MeasureRow(parameters=0, prefill_tps=speed) for name, speed in speeds.items()})


def test_the_benchmark_of_fronts(tmp_path: Path) -> None:
    config = config_of(objective="quality,parameters,latency", rates=[0.1, 0.15])
    space = space_for(config)
    prepared = prepared_of(space)
    console = Console(file=StringIO())

    async def go(pool: AnalyticPool) -> dict[str, Any]:
        return await compare(Subject(pool, SESSION, prepared, store, held_out=8), config, True, console)

    with Store(tmp_path / "front.db") as store:
        found = asyncio.run(go(TimingPool(space)))
        again = TimingPool(space)
        assert asyncio.run(go(again)) == found
        assert not again.seen
    assert set(found["rates"]) == {"0.1", "0.15", "0.2"}
    for row in found["rates"].values():
        assert row["front"] < row["uniform"]
        assert found["front_tokens"] < row["alone_tokens"] * 3
    assert found["latency"]["pearson"] == pytest.approx(1, abs=0.01)
    assert found["latency"]["mean_error"] == pytest.approx(0, abs=0.01)
    console.print(table(found))


# -- showing it ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("timed", [False, True])
def test_the_table_and_the_picture(done: Done, timed: bool) -> None:
    hidden = () if timed else ("latency_us", "prefill_tps", "speedup")
    rows = [{key: value for key, value in row.items() if key not in hidden} for row in done.result.report["front"]]
    console = Console(width=160, record=True, file=StringIO())
    console.print(front(rows))
    text = console.export_text()
    assert all(row["plan"] in text for row in rows)
    assert ("speedup" in text) == timed
    chart = front_chart(rows).to_dict()
    assert chart["encoding"]["x"]["field"] == ("ms" if timed else "parameters")
    events = [{"type": event.type, "data": event.data} for event in done.place.store.events(done.job_id).data]
    assert len(result_chart({**done.result.report, "front": rows}, events).to_dict()["hconcat"]) == 3


def test_a_finished_job_is_shown_with_its_front(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    class Quiet:
        def candidates(self, *_: object) -> Iterator[Any]:
            return iter(())

        checkpoints = candidates

    job = {"id": done.job_id, "status": "succeeded", "model": "tiny", "config": {"rate": 0.2}, "error": None, "progress": None}
    cli._report(Quiet(), {**job, "result": done.result.report})  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert all(row["plan"] in shown for row in done.result.report["front"])
