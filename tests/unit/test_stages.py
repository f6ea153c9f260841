"""Where the time of a job goes: every moment belongs to one stage, whoever measures it and however many workers there are."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from selfpruner.stages import Stage, Stages, Task, at, collecting, count_tokens
from selfpruner.testing.spaces import space_of
from selfpruner.workers.base import perform
from selfpruner.workers.staged_pool import StagedPool
from selfpruner.workers.tasks import EvaluateRequest
from tests.helpers import searching
from tests.helpers.fake_handler import Echo, FakeHandler


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def figures(stages: Stages) -> dict[str, tuple[float, int, int, float]]:
    return {row.name: (round(row.seconds, 6), row.tokens, row.workers, row.peak_mib) for row in stages.rows()}


def test_a_moment_belongs_to_the_innermost_stage() -> None:
    clock = Clock()
    stages = Stages(clock=clock)
    clock.now = 1.0
    with stages.at("final"):
        clock.now = 3.0
        stages.count(100)
        with suppress(ValueError), stages.at("writing"):
            clock.now = 7.0
            stages.count(5)
            raise ValueError
        clock.now = 7.5
    clock.now = 8.0
    with stages.at("final"):
        clock.now = 9.0
    stages.count(11, "thinking")
    assert figures(stages) == {
        "thinking": (0, 11, 0, 0),
        "final": (3.5, 100, 0, 0),
        "writing": (4, 5, 0, 0),
        "other": (1.5, 0, 0, 0),
    }
    assert [row.name for row in stages.rows()] == ["thinking", "final", "writing", "other"], "in the order of a job"


def test_waiting_is_what_no_worker_worked() -> None:
    clock = Clock()
    stages = Stages(clock=clock)
    with stages.at("scoring"):
        # Two at once, the second of which waited for the first one's worker, and a third on another.
        stages.did(Task(0.0, 1.0, 4.0, "a", 100.0))
        stages.did(Task(0.0, 4.5, 6.0, "a", 300.0))
        stages.did(Task(0.0, 2.0, 4.0, "b", 200.0))
        clock.now = 7.0
    assert figures(stages) == {"scoring": (5.5, 0, 2, 300.0), "waiting": (1.5, 0, 0, 0)}


def test_the_parts_of_a_task_are_stages_of_the_job() -> None:
    clock = Clock()
    parts = (Stage("texts", 2.0, 640, 0, 50.0), Stage("statistics", 3.0, 320, 0, 90.0), Stage("other", 1.0, 0, 0, 70.0))
    stages = Stages(clock=clock)
    with stages.at("loading"):
        stages.did(Task(0.0, 0.5, 6.5, "a", 90.0, parts))
        clock.now = 7.0
    with stages.at("scoring"):  # a worker that was replaced makes itself ready again
        stages.did(Task(7.0, 7.0, 13.0, "b", 90.0, parts))
        clock.now = 13.0
    assert figures(stages) == {
        "loading": (1.5, 0, 1, 70.0),
        "texts": (2.0, 640, 1, 50.0),
        "statistics": (3.0, 320, 1, 90.0),
        "scoring": (6.0, 0, 1, 90.0),
        "waiting": (0.5, 0, 0, 0),
    }


def test_tasks_side_by_side_take_the_time_of_one() -> None:
    clock = Clock()
    stages = Stages(clock=clock)
    with stages.at("loading"):
        for worker in "abc":
            stages.did(Task(0.0, 0.0, 6.0, worker, 90.0, (Stage("statistics", 4.0, 10), Stage("other", 2.0))))
        clock.now = 6.0
    assert figures(stages) == {"statistics": (4.0, 30, 3, 0), "loading": (2.0, 0, 3, 0)}


def test_a_job_that_goes_on_adds_to_what_there_is() -> None:
    clock = Clock()
    stages = Stages([Stage("final", 2.0, 100, 4, 500.0), Stage("other", 1.0)], clock=clock)
    with stages.at("final"):
        stages.did(Task(0.0, 0.0, 3.0, "a", 900.0))
        clock.now = 3.0
        stages.count(50)
    assert figures(stages) == {"final": (5.0, 150, 4, 900.0), "other": (1.0, 0, 0, 0)}


def test_peaks_are_those_of_each_stage() -> None:
    peaks = iter([900.0, 10.0, 70.0, 20.0, 30.0, 5.0])
    clock = Clock()
    stages = Stages(clock=clock, peak=lambda: next(peaks))
    clock.now = 1.0
    with stages.at("texts"):
        clock.now = 2.0
    with stages.at("factors"):
        clock.now = 3.0
    assert {row.name: row.peak_mib for row in stages.rows()} == {"texts": 70.0, "factors": 30.0, "other": 20.0}


def test_parts_of_the_work_name_themselves_where_somebody_wants_to_know() -> None:
    with at("texts"):
        count_tokens(3)
    clock = Clock()
    stages = Stages(clock=clock)
    with collecting(stages):
        with at("texts"):
            clock.now = 2.0
            count_tokens(3)
        clock.now = 3.0
    with at("factors"):
        clock.now = 9.0
    assert figures(stages)["texts"] == (2.0, 3, 0, 0)
    assert "factors" not in figures(stages)


def test_a_task_says_what_it_took() -> None:
    class Handler(FakeHandler):
        def handle(self, *args: Any) -> Any:
            with at("statistics"):
                count_tokens(7)
                block = bytearray(64 << 20)
                block[::4096] = b"x" * len(block[::4096])
            return super().handle(*args)

    body = perform(Handler("cpu"), searching.SESSION, "echo", {}, lambda _: None, lambda: False)
    result = Echo.result_type().read(body)
    parts = {part.name: part for part in result.parts}
    assert parts["statistics"].tokens == 7
    assert 0 < result.busy == pytest.approx(sum(part.seconds for part in result.parts))
    assert parts["statistics"].peak_mib == result.peak_mib >= parts["other"].peak_mib
    assert str(result.pid) in result.worker


def test_tokens_that_a_search_asks_for_count_once() -> None:
    """In the stage that asked; one that goes on repeats nothing."""
    config, space = searching.config_of("default"), space_of(layers=3)
    recorder = searching.MemoryRecorder()
    first = searching.Run(config, space, recorder)
    asyncio.run(first.go())
    tokens = {row.name: row.tokens for row in first.evaluator.stages.rows()}
    written = 8 * 48 * len(first.pool.wrote[0])
    assert tokens["writing"] == written
    assert sum(tokens.values()) - written == first.pool.tokens["fitness"]
    assert min(tokens[name] for name in ("probes", "scoring", "surveys", "final")) > 0
    assert recorder.stages["scoring"].tokens == tokens["scoring"], "kept with every generation"
    again = searching.Run(config, space, recorder)
    asyncio.run(again.go())
    # Writing is not recorded: the same question has the same answer.
    assert [row.name for row in again.evaluator.stages.rows() if row.tokens] == ["writing"]


def test_the_llm_is_waited_for_where_it_is_not_hidden() -> None:
    config, space = searching.config_of("default"), space_of(layers=3)
    run = searching.Run(config, space, searching.MemoryRecorder())
    asyncio.run(run.go())
    assert run.search.channel is not None
    [thinking] = [row for row in run.evaluator.stages.rows() if row.name == "thinking"]
    assert thinking.seconds > 0


def test_a_pool_tells_the_stages_what_its_tasks_took() -> None:
    space = space_of(layers=3)
    stages = Stages()
    pool = StagedPool(searching.AnalyticPool(space), stages)
    plan = space.project([space.rate] * space.layers)

    async def go() -> None:
        with stages.at("final"):
            await pool.run(searching.SESSION, EvaluateRequest(plans=(plan.levels,), text="fitness", sequences=(1,)))
            stages.count(16)
        await pool.close()

    asyncio.run(go())
    assert figures(stages)["final"][1:] == (16, 0, 101.0)
