"""The store's contract: jobs and their states, idempotency keys, pages, recorder."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from selfpruner.config import SearchConfig
from selfpruner.errors import AmbiguousNameError, ConfigError, ConflictError, NotFoundError, StoreError
from selfpruner.files.report import ModelUsed, TextUsed
from selfpruner.records import Candidate, CheckpointFacts, Evaluation, JobStatus, LlmCall, Progress, StoredProgress
from selfpruner.store.store import Store
from selfpruner.store.tables import TERMINAL, TRANSITIONS
from selfpruner.workers.tasks import ModelFacts, TextFacts

CONFIG = SearchConfig(rate=0.2)
ERROR = {"message": "the worker died", "type": "server_error", "param": None, "code": "worker_failed"}


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with Store(tmp_path / "store.db", clock=clock) as opened:
        yield opened


def started(store: Store) -> str:
    job, _ = store.create_job(CONFIG)
    store.transition(job.id, "running")
    return job.id


def candidate(plan: str, **changes: Any) -> Candidate:
    return replace(Candidate(plan, (0, 3), (0.0, 0.4), 0, "uniform"), **changes)


def call(sequence: int = 1, **changes: Any) -> LlmCall:
    messages = ({"role": "user", "content": "halve it"},)
    return replace(LlmCall(sequence, 1, "mutate", "local", "smollm2", messages, '{"rates":[]}', "ok", 10, 5, 0.5, 0.25), **changes)


def dump(store: Store) -> list[str]:
    connection = sqlite3.connect(store.path)
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


# Jobs


def test_what_cannot_be_is_refused_by_its_name(tmp_path: Path) -> None:
    with Store(tmp_path / "store.db") as store:
        job = store.create_job(CONFIG)[0].id
        store.transition(job, "running")
        store.request_cancel(job)
        assert store.transition(job, "queued").status == "cancelled"
        with pytest.raises(ConflictError, match="is cancelled and cannot become queued"):
            store.transition(job, "queued")


def test_a_database_on_a_disk_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.db"
    with Store(path) as store:
        job = store.create_job(CONFIG)[0].id
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("selfpruner.store.database.os.access", lambda *_: False)
    with Store(path, read_only=True) as store:
        assert store.job(job).status == "queued"
        assert sorted(tmp_path.iterdir()) == before, "SQLite writes nothing beside it"


def test_a_new_job_is_queued_and_comes_back_as_given(store: Store, clock: Clock) -> None:
    job, created = store.create_job(CONFIG, metadata={"team": "naïve 🦙 \u202e"}, owner="ada")
    found = store.job(job.id)
    assert created
    assert found == job
    assert found.id.startswith("job_")
    assert len(found.id) == 28
    assert (found.status, found.owner, found.created_at) == ("queued", "ada", int(clock.now))
    assert found.user_metadata == {"team": "naïve 🦙 \u202e"}
    assert SearchConfig.model_validate(found.config) == CONFIG
    assert (found.started_at, found.finished_at, found.error, found.result, found.progress) == (None,) * 5


def test_another_owners_job_is_not_found(store: Store) -> None:
    job, _ = store.create_job(CONFIG, owner="ada")
    assert store.job(job.id, owner="ada").id == job.id
    for wrong in (
        lambda: store.job(job.id, owner="bob"),
        lambda: store.job("job_x"),
        lambda: store.request_cancel(job.id, owner="bob"),
    ):
        with pytest.raises(NotFoundError, match="`selfpruner jobs` lists"):
            wrong()
    assert store.job(job.id).status == "queued"


def test_jobs_are_listed_newest_first_in_pages(store: Store) -> None:
    ids = [store.create_job(CONFIG, owner="ada" if i % 2 else "bob")[0].id for i in range(5)]
    first = store.jobs(limit=2)
    assert ([job.id for job in first.data], first.has_more) == (ids[:2:-1], True)
    rest = store.jobs(after=first.data[-1].id, limit=3)
    assert ([job.id for job in rest.data], rest.has_more) == (ids[2::-1], False)
    assert [job.id for job in store.jobs(owner="ada").data] == [ids[3], ids[1]]
    store.transition(ids[0], "running")
    assert [job.id for job in store.jobs(status="running").data] == [ids[0]]
    assert store.next_queued() == store.job(ids[1])
    for wrong in ({"after": "job_unknown"}, {"after": ids[0], "owner": "ada"}):
        with pytest.raises(NotFoundError) as error:
            store.jobs(**wrong)
        assert error.value.param == "after"
    with pytest.raises(ConfigError) as bound:
        store.jobs(limit=0)
    assert bound.value.param == "limit"


def test_times_and_events_of_a_whole_life(store: Store, clock: Clock) -> None:
    heard: list[tuple[str, int]] = []
    store.on_event = lambda job_id, sequence: heard.append((job_id, sequence))
    job_id = store.create_job(CONFIG)[0].id
    start = int(clock.now)
    for status in ("running", "paused", "queued", "running"):
        clock.now += 10
        store.transition(job_id, status)
    clock.now += 10
    job = store.transition(job_id, "failed", error=ERROR)
    assert (job.started_at, job.finished_at, job.error) == (start + 10, start + 50, ERROR)
    assert job == store.job(job_id)
    events = store.events(job_id).data
    names = ["job.queued", "job.running", "job.paused", "job.queued", "job.running", "job.failed"]
    assert [event.type for event in events] == names
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
    assert (events[-1].level, events[-1].data) == ("error", ERROR)
    assert heard == [(job_id, sequence) for sequence in range(1, 7)]
    page = store.events(job_id, after=2, limit=3)
    assert ([event.sequence for event in page.data], page.has_more) == ([3, 4, 5], True)


def test_cancel_is_immediate_unless_the_job_runs(store: Store) -> None:
    queued, paused, running, finished = (store.create_job(CONFIG)[0].id for _ in range(4))
    for job_id in (paused, running, finished):
        store.transition(job_id, "running")
    store.transition(paused, "paused")
    store.transition(finished, "succeeded")
    assert store.request_cancel(queued).status == "cancelled"
    assert store.request_cancel(paused).status == "cancelled"
    assert store.next_queued() is None
    for _ in range(2):
        job = store.request_cancel(running)
        assert (job.status, job.cancel_requested) == ("running", True)
    assert [event.type for event in store.events(running).data].count("job.cancel_requested") == 1
    with pytest.raises(ConflictError, match="is succeeded and cannot become cancelled") as error:
        store.request_cancel(finished)
    assert error.value.code == "job_succeeded"


@pytest.mark.parametrize("to", ["paused", "queued"])
def test_a_job_asked_to_cancel_never_waits_again(store: Store, to: JobStatus) -> None:
    job_id = started(store)
    store.request_cancel(job_id)
    assert store.transition(job_id, to).status == "cancelled"


def test_a_restarted_server_finds_its_jobs_queued(store: Store) -> None:
    first, second, stopping, waiting = (store.create_job(CONFIG)[0].id for _ in range(4))
    for job_id in (stopping, second, first):
        store.transition(job_id, "running")
    store.request_cancel(stopping)
    assert [job.id for job in store.requeue_running()] == [first, second]
    assert [store.job(job_id).status for job_id in (first, second, stopping, waiting)] == ["queued"] * 2 + ["cancelled", "queued"]
    assert store.requeue_running() == []


def test_only_a_failed_job_has_an_error(store: Store) -> None:
    job_id = started(store)
    with pytest.raises(StoreError, match="an error belongs to a failed job"):
        store.transition(job_id, "failed")
    with pytest.raises(StoreError, match="an error belongs to a failed job"):
        store.transition(job_id, "succeeded", error=ERROR)
    assert store.job(job_id).status == "running"


class JobStates(RuleBasedStateMachine):
    """Any sequence of calls: legal moves happen, illegal ones change nothing and say so."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store(self.folder / "store.db")
        self.states: dict[str, JobStatus] = {}
        self.stopping: set[str] = set()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def pick(self, number: int) -> str | None:
        return sorted(self.states)[number % len(self.states)] if self.states else None

    @rule()
    def create(self) -> None:
        job, created = self.store.create_job(CONFIG)
        assert created
        assert job.id not in self.states
        self.states[job.id] = "queued"

    @rule(number=st.integers(0, 99), to=st.sampled_from(get_args(JobStatus)))
    def move(self, number: int, to: JobStatus) -> None:
        job_id = self.pick(number)
        if job_id is None:
            return
        error = ERROR if to == "failed" else None
        expected: JobStatus = "cancelled" if job_id in self.stopping and to in ("queued", "paused") else to
        if expected in TRANSITIONS[self.states[job_id]]:
            assert self.store.transition(job_id, to, error=error).status == expected
            self.states[job_id] = expected
        else:
            with pytest.raises(ConflictError, match=f"is {self.states[job_id]} and"):
                self.store.transition(job_id, to, error=error)

    @rule(number=st.integers(0, 99))
    def cancel(self, number: int) -> None:
        job_id = self.pick(number)
        if job_id is None:
            return
        if self.states[job_id] in TERMINAL:
            with pytest.raises(ConflictError):
                self.store.request_cancel(job_id)
        elif self.states[job_id] == "running":
            assert self.store.request_cancel(job_id).cancel_requested
            self.stopping.add(job_id)
        else:
            assert self.store.request_cancel(job_id).status == "cancelled"
            self.states[job_id] = "cancelled"

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store(self.folder / "store.db")
        self.store.requeue_running()
        for job_id, status in self.states.items():
            if status == "running":
                self.states[job_id] = "cancelled" if job_id in self.stopping else "queued"

    @invariant()
    def rows_agree(self) -> None:
        rows = {job.id: job for job in self.store.jobs(limit=1000).data}
        assert {job_id: job.status for job_id, job in rows.items()} == self.states
        for job in rows.values():
            assert job.finished == (job.finished_at is not None) == (job.status in TERMINAL)
            events = self.store.events(job.id, limit=1000).data
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            assert sum(event.type in ("job.succeeded", "job.failed", "job.cancelled") for event in events) == job.finished


def test_job_states_under_any_calls() -> None:
    slow_disk = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        JobStates, settings=settings(max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=slow_disk)
    )


def together(actions: list[Callable[[], Any]]) -> list[Any]:
    """Run the actions in threads that start at the same moment; an exception is returned in its place."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return action()
        except StoreError as error:
            return error

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run, actions))


def test_a_job_ends_once_whoever_races(store: Store) -> None:
    for _ in range(20):
        job_id = started(store)
        results = together(
            [
                lambda job_id=job_id: store.transition(job_id, "succeeded"),
                lambda job_id=job_id: store.transition(job_id, "failed", error=ERROR),
                lambda job_id=job_id: store.transition(job_id, "cancelled"),
                lambda job_id=job_id: store.transition(job_id, "queued"),
            ]
        )
        won = [result for result in results if not isinstance(result, ConflictError)]
        ends = [event for event in store.events(job_id).data if event.type.removeprefix("job.") in TERMINAL]
        assert len([job for job in won if job.status in TERMINAL]) == len(ends) <= 1
        assert (store.job(job_id).status in TERMINAL) == bool(ends)


# Idempotency keys


def test_the_same_key_gives_the_first_job(store: Store, clock: Clock) -> None:
    first, created = store.create_job(CONFIG, idempotency_key="k")
    store.transition(first.id, "running")
    again, recreated = store.create_job(CONFIG, idempotency_key="k")
    assert (created, recreated, again.id, again.status) == (True, False, first.id, "running")
    assert store.create_job(CONFIG, idempotency_key="k", owner="bob")[1]
    for other in (lambda: store.create_job(SearchConfig(rate=0.3), idempotency_key="k"),
                  lambda: store.create_job(CONFIG, metadata={"a": "b"}, idempotency_key="k"),
                  lambda: store.create_job(CONFIG, idempotency_key="k", body_hash="f00")):  # fmt: skip
        with pytest.raises(ConflictError) as error:
            other()
        assert (error.value.code, error.value.param) == ("idempotency_conflict", "Idempotency-Key")
    clock.now += 24 * 3600 - 1
    assert not store.create_job(CONFIG, idempotency_key="k")[1]
    clock.now += 1
    assert store.create_job(SearchConfig(rate=0.3), idempotency_key="k")[1]
    assert len(store.jobs().data) == 3


def test_concurrent_requests_with_one_key_make_one_job(store: Store) -> None:
    results = together([lambda: store.create_job(CONFIG, idempotency_key="k")] * 16)
    assert len({job.id for job, _ in results}) == 1
    assert sum(created for _, created in results) == 1
    assert len(store.jobs().data) == 1


# Recorder


def test_a_replayed_history_changes_nothing(store: Store) -> None:
    job_id = started(store)

    def history() -> None:
        recorder = store.recorder(job_id)
        recorder.event("start", "search.started", "Searching", data={"plans": 3})
        recorder.save_candidates([candidate("a"), candidate("b", operator="mutate", parents=("a",), generation=1)])
        recorder.save_evaluations(
            [Evaluation("a", "w0", 64, 0.5, 3.1, 0.1), Evaluation("b", "w0", 64, None, None, 0.1, "no heads", outcome="not_finite")]
        )
        recorder.save_candidates(
            [
                candidate("a", status="evaluated", fitness=0.5, relative=1.0, window="w0", tokens=64, survived=True),
                candidate("b", generation=1, status="infeasible", reason="no heads"),
            ]
        )
        recorder.save_llm_call(call(1))
        recorder.save_llm_call(call(2, outcome="timeout", reply="", cost=0.0))
        recorder.progress(Progress("searching", generation=1, best_plan="a", data={"seconds": 1.5}))
        recorder.event("done", "search.finished", "Done", level="warn")

    history()
    before = dump(store)
    heard: list[int] = []
    store.on_event = lambda _, sequence: heard.append(sequence)
    history()
    assert dump(store) == before
    assert heard == []

    recorder = store.recorder(job_id)
    assert recorder.find_evaluation("a", "w0") == Evaluation("a", "w0", 64, 0.5, 3.1, 0.1)
    assert recorder.find_evaluation("b", "w0") == Evaluation("b", "w0", 64, None, None, 0.1, "no heads", outcome="not_finite")
    assert recorder.find_evaluation("a", "w1") is None
    assert recorder.find_llm_call(1) == call(1)
    assert recorder.find_llm_call(3) is None
    assert store.job(job_id).progress == {**asdict(Progress("searching", 1, best_plan="a")), "data": {"seconds": 1.5}}
    assert [row.plan_hash for row in store.evaluations(job_id)] == ["a", "b"]
    assert [row.tokens for row in store.evaluations(job_id, "b")] == [64]
    assert [row.sequence for row in store.llm_calls(job_id)] == [1, 2]
    totals = store.totals(job_id)
    assert (totals.calls, totals.tokens, totals.cost, totals.seconds) == (2, 30, 0.25, 1.0)


def test_what_was_written_first_stays(store: Store) -> None:
    recorder = store.recorder(started(store))
    recorder.save_evaluations([Evaluation("a", "w0", 64, 0.5, 3.1, 0.1)])
    recorder.save_evaluations([Evaluation("a", "w0", 64, 9.9, 9.9, 0.9), Evaluation("a", "w1", 64, 0.4, 3.0, 0.1)])
    assert recorder.find_evaluation("a", "w0") == Evaluation("a", "w0", 64, 0.5, 3.1, 0.1)
    recorder.save_llm_call(call(1))
    recorder.save_llm_call(call(1, reply="other"))
    assert recorder.find_llm_call(1) == call(1)
    recorder.save_candidates([candidate("a", operator="ramp", parents=("p",), generation=2)])
    recorder.save_candidates([candidate("a", operator="mutate", generation=5, status="evaluated", fitness=0.5, survived=True)])
    row = store.candidate(recorder.job_id, "a")
    assert (row.operator, row.parents, row.generation, row.status, row.fitness) == ("ramp", ["p"], 2, "evaluated", 0.5)
    assert (row.levels, row.rates, row.sequence, row.survived) == ([0, 3], [0.0, 0.4], 1, True)


def test_beliefs_stay_and_an_early_rejection_is_kept(store: Store) -> None:
    recorder = store.recorder(started(store))
    new = candidate("a", generation=2, predicted=0.9, credit=0.001, informed_by=1)
    recorder.save_candidates([new])
    early = "rejected early after 64 tokens"
    judged = replace(
        new, status="evaluated", fitness=0.5, relative=1.1, tokens=64, rejected=True, reason=early, predicted=0.1, credit=0.2
    )
    recorder.save_candidates([judged])
    recorder.save_evaluations([Evaluation("a", "w0", 64, 0.5, 3.1, 0.1, early, "raced")])
    row = store.candidate(recorder.job_id, "a")
    assert (row.predicted, row.credit, row.informed_by) == (0.9, 0.001, 1)
    assert (row.status, row.relative, row.rejected, row.reason) == ("evaluated", 1.1, True, early)
    assert recorder.find_evaluation("a", "w0") == Evaluation("a", "w0", 64, 0.5, 3.1, 0.1, early, "raced")
    recorder.save_candidates([replace(judged, rejected=False, reason=None, fitness=0.45, tokens=256, window="final")])
    row = store.candidate(recorder.job_id, "a")
    assert (row.rejected, row.reason, row.fitness, row.window) == (False, None, 0.45, "final")


def test_recorders_of_two_jobs_do_not_meet(store: Store) -> None:
    one, two = store.recorder(started(store)), store.recorder(started(store))
    for recorder, kl in ((one, 0.1), (two, 0.2)):
        recorder.event("start", "search.started", "go")
        recorder.save_candidates([candidate("a")])
        recorder.save_evaluations([Evaluation("a", "w0", 64, kl, 3.0, 0.1)])
    for recorder, kl in ((one, 0.1), (two, 0.2)):
        found = recorder.find_evaluation("a", "w0")
        assert found is not None
        assert found.kl == kl
        assert [event.sequence for event in store.events(recorder.job_id).data] == [1, 2, 3]
        assert len(store.evaluations(recorder.job_id)) == 1
    with pytest.raises(NotFoundError):
        store.recorder("job_unknown")


@pytest.mark.parametrize(
    "write",
    [
        lambda recorder: recorder.save_evaluations([Evaluation("a", "w", 1, float("nan"), 1.0, 0.1)]),
        lambda recorder: recorder.save_evaluations([Evaluation("a", "w", 1, float("inf"), 1.0, 0.1)]),
        lambda recorder: recorder.save_evaluations([Evaluation("a", "w", 1, None, None, 0.1)]),
        lambda recorder: recorder.save_evaluations([Evaluation("a", "w", 1, None, None, 0.1, outcome="not_finite")]),
        lambda recorder: recorder.save_evaluations([Evaluation("a", "w", 1, 1.0, 1.0, 0.1, "why", outcome="out_of_memory")]),
        lambda recorder: recorder.save_evaluations([Evaluation("a", "w", 1, 1.0, 1.0, 0.1, kind="guessed")]),
        lambda recorder: recorder.save_candidates([candidate("a", status="pending", rejected=True)]),
        lambda recorder: recorder.save_evaluations([Evaluation("b", "w", 1, 1.0, 1.0, 0), Evaluation("a", "w", -1, 1.0, 1.0, 0)]),
        lambda recorder: recorder.save_candidates([candidate("a", status="evaluated")]),
        lambda recorder: recorder.save_candidates([candidate("a", status="evaluated", fitness=float("-inf"))]),
        lambda recorder: recorder.save_candidates([candidate("a", status="evaluated", fitness=0.1, relative=float("nan"))]),
        lambda recorder: recorder.save_candidates([candidate("a", status="infeasible")]),
        lambda recorder: recorder.save_candidates([candidate("a", predicted=float("nan"))]),
        lambda recorder: recorder.save_candidates([candidate("a", predicted=float("inf"))]),
        lambda recorder: recorder.save_candidates([candidate("a", credit=float("-inf"))]),
        lambda recorder: recorder.save_candidates([candidate("a", generation=2, informed_by=3)]),
        lambda recorder: recorder.save_candidates([candidate("b"), candidate("a", status="great")]),
        lambda recorder: recorder.save_candidates([candidate("a", rates=(float("nan"),))]),
        lambda recorder: recorder.save_llm_call(call(outcome="lovely")),
        lambda recorder: recorder.save_llm_call(call(cost=-1.0)),
        lambda recorder: recorder.save_llm_call(call(prompt_tokens=2**70)),
        lambda recorder: recorder.event("k", "t", "m", level="fatal"),
        lambda recorder: recorder.event("k", "t", "m", data={"kl": float("inf")}),
        lambda recorder: recorder.progress(Progress("searching", best_fitness=float("nan"))),
    ],
)  # fmt: skip
def test_impossible_rows_are_refused_whole(store: Store, write: Callable[[Any], None]) -> None:
    recorder = store.recorder(started(store))
    before = dump(store)
    with pytest.raises(StoreError):
        write(recorder)
    assert dump(store) == before
    recorder.event("next", "search.started", "the store goes on")


def test_broken_text_from_an_llm_is_stored(store: Store) -> None:
    recorder = store.recorder(started(store))
    recorder.save_llm_call(
        call(1, reply="\ud800 nul \x00 🦙", messages=({"role": "user", "content": "\udfff\x00"},), detail="\ud800")
    )
    found = recorder.find_llm_call(1)
    assert found is not None
    assert (found.reply, found.messages[0]["content"], found.detail) == ("? nul \x00 🦙", "?\x00", "?")
    recorder.event("k", "t", "half \ud83d pair", data={"text": "\ud83d"})
    assert store.events(recorder.job_id).data[-1].message == "half ? pair"


def test_candidates_come_in_pages_of_either_order(store: Store) -> None:
    job_id = started(store)
    scores = {"a": 1.0, "b": 0.7, "c": None, "d": 0.9, "e": 0.7}
    rows = [
        candidate(
            plan, generation=i % 2, status="evaluated" if score else "infeasible", fitness=score, relative=score, reason="no heads"
        )
        for i, (plan, score) in enumerate(scores.items())
    ]
    store.recorder(job_id).save_candidates(rows)
    orders = {"generation": "acebd", "fitness": "bedac"}
    for order, expected in orders.items():
        plans, after, more = "", None, True
        while more:
            page = store.candidates(job_id, after, 2, order=order)
            plans += "".join(row.plan_hash for row in page.data)
            after, more = page.data[-1].plan_hash, page.has_more
        assert plans == expected
    with pytest.raises(NotFoundError) as error:
        store.candidates(job_id, "unknown")
    assert error.value.param == "after"
    with pytest.raises(NotFoundError):
        store.candidate(job_id, "unknown")


def test_a_plan_may_be_given_by_the_beginning_of_its_hash(store: Store) -> None:
    job_id = started(store)
    plans = ("abc1", "abc", "b%d2", "bcd3", *(f"c{n}" for n in range(9)))
    store.recorder(job_id).save_candidates([candidate(plan) for plan in plans])
    assert [store.candidate(job_id, plan).plan_hash for plan in ("abc1", "abc", "b%", "bc")] == ["abc1", "abc", "b%d2", "bcd3"]
    with pytest.raises(AmbiguousNameError, match=r"'b' is the beginning of more than one plan: b%d2, bcd3\. Give more") as error:
        store.candidate(job_id, "b", param="plan")
    assert (error.value.code, error.value.param) == ("ambiguous_name", "plan")
    with pytest.raises(AmbiguousNameError, match="c0, c1, c2, c3, c4 and others"):
        store.candidate(job_id, "c")
    for nothing in ("", "%", "_bc", "abcd"):
        with pytest.raises(NotFoundError, match="selfpruner show"):
            store.candidate(job_id, nothing)


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        (StoredProgress, {field.name for field in fields(Progress)}),
        (ModelUsed, set(ModelFacts.model_fields)),
        (TextUsed, set(TextFacts.model_fields)),
    ],
)
def test_what_is_stored_is_typed_with_all_its_fields(stored: Any, now: set[str]) -> None:
    """These have two types, because an earlier version may have stored less than what is said now."""
    assert set(stored.__annotations__) == now


# Results and checkpoints


def test_result_and_checkpoints(store: Store, clock: Clock) -> None:
    job_id = store.create_job(CONFIG, owner="ada")[0].id
    facts: CheckpointFacts = {
        "plan_hash": "a",
        "path": "/c/1",
        "parameters": 10,
        "bytes": 40,
        "manifest_sha256": "0" * 64,
        "verification": {"max": 0.1},
        "metrics": {},
    }
    first = store.add_checkpoint(job_id, facts)
    clock.now += 5
    assert store.add_checkpoint(job_id, facts) == first
    newer = store.add_checkpoint(job_id, {**facts, "manifest_sha256": "1" * 64, "metrics": {"kl": 0.2}})
    assert (newer.id, newer.created_at) == (first.id, first.created_at)
    other = store.add_checkpoint(job_id, {**facts, "plan_hash": "b"})
    assert store.checkpoints(job_id) == [newer, other]
    assert first.id.startswith("ckpt_")
    assert store.checkpoint(first.id, owner="ada") == newer
    for wrong in (lambda: store.checkpoint(first.id, owner="bob"), lambda: store.checkpoint("ckpt_x")):
        with pytest.raises(NotFoundError, match="No checkpoint"):
            wrong()
    with pytest.raises(NotFoundError):
        store.add_checkpoint("job_x", facts)
    with pytest.raises(StoreError):
        store.add_checkpoint(job_id, {**facts, "plan_hash": "c", "manifest_sha256": "short"})
    store.set_result(job_id, {"best_plan": "a", "best": {"kl": 0.2}})
    assert store.job(job_id).result == {"best_plan": "a", "best": {"kl": 0.2}}


def test_rows_are_plain_values(tmp_path: Path) -> None:
    with Store(tmp_path / "store.db") as store:
        job = store.create_job(CONFIG)[0]
        job.status = "succeeded"
        assert store.job(job.id).status == "queued"
        events = store.events(job.id)
    assert events.data[0].message == "Job queued."
    assert job.config["rate"] == 0.2


def test_a_reader_sees_what_the_writer_commits(store: Store) -> None:
    job_id = store.create_job(CONFIG)[0].id
    with Store(store.path, read_only=True) as reader:
        assert reader.job(job_id).status == "queued"
        store.transition(job_id, "running")
        assert reader.job(job_id).status == "running"
        with pytest.raises(StoreError, match="opened for reading"):
            reader.transition(job_id, "paused")


def test_importing_the_store_imports_neither_torch_nor_alembic(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom selfpruner.store.store import Store\n"
        f"Store({str(tmp_path / 'store.db')!r}).close()\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'alembic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
