"""What the search spends its tokens on: stop rules, the budget, races, the landscape's picks, an LLM asked ahead of time."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from statistics import fmean
from typing import Any

import pytest

from selfpruner.evolution.outcome import Outcome
from selfpruner.planning.space import Plan
from selfpruner.progress import OnProgress
from selfpruner.proposers.base import Reply, Request
from selfpruner.testing.spaces import space_of
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import EvaluateRequest, TaskRequest
from tests.helpers.searching import AnalyticPool, MemoryRecorder, Run, ScriptedProposer, config_of


class WatchedPool(AnalyticPool):
    """Keeps every request of an evaluation."""

    asked: list[EvaluateRequest]

    async def run(self, session: Session, request: TaskRequest[Any], on_progress: OnProgress | None = None) -> Any:
        if isinstance(request, EvaluateRequest):
            self.asked.append(request)
        return await super().run(session, request, on_progress)


def run(
    preset: str = "evolution", proposer: ScriptedProposer | None = None, *, foresees: bool = True, **changes: Any
) -> tuple[Outcome, Run, WatchedPool]:
    config = config_of(preset, **changes)
    space = space_of(layers=6, rate=config.rate, granularity=config.granularity, bias=True)
    pool = WatchedPool(space)
    pool.asked = []
    pool.foresees = foresees
    search = Run(config, space, MemoryRecorder(), pool=pool, proposer=proposer)
    return asyncio.run(search.go()), search, pool


# -- when to stop ----------------------------------------------------------------------------------------------------------
def test_a_search_that_finds_nothing_better_stops_and_says_what_that_saved() -> None:
    outcome, search, _ = run(generations=40, patience=2, operators=["random"], initial=["uniform", "sensitivity"])
    assert outcome.generations < 40
    assert "in 2 generations" in outcome.stopped or "last 2 generations" in outcome.stopped
    type_, message, data = search.recorder.events["stopped"]
    assert type_ == "search.stopped"
    assert outcome.stopped in message
    assert (data["generation"], data["reason"]) == (outcome.generations, outcome.stopped)
    assert data["tokens_saved"] == outcome.tokens_saved > 0
    # What a generation costs at most: all children and the leader and the uniform plan on 32 tokens, five and those two on 64 more.
    assert outcome.tokens_saved == (40 - outcome.generations) * (32 * (8 + 2) + 64 * (5 + 2))
    assert f"generation-{outcome.generations + 1}" not in search.recorder.events


def test_gains_too_small_to_matter_end_it_too() -> None:
    outcome, _, _ = run(generations=40, patience=3, least_gain=0.5, initial=["uniform"], operators=["level_switch"])
    assert 3 <= outcome.generations < 8
    assert "generations gained" in outcome.stopped


def test_no_patience_means_all_generations() -> None:
    outcome, search, _ = run(generations=12, patience=0, operators=["random"])
    assert (outcome.generations, outcome.stopped, outcome.tokens_saved) == (12, "all 12 generations were made", 0)
    assert "stopped" not in search.recorder.events


@pytest.mark.parametrize("preset", ["evolution", "default"])
@pytest.mark.parametrize("budget", [4000, 5000, 6500, 9000, 20_000])
def test_a_budget_covers_probes_generations_and_the_final(preset: str, budget: int) -> None:
    outcome, search, pool = run(preset, generations=30, patience=0, budget_tokens=budget)
    assert outcome.tokens == pool.tokens["fitness"] <= budget
    assert all((candidate.plan_hash, "final") in search.recorder.evaluations for candidate in outcome.finalists)
    if outcome.generations < 30:
        assert f"budget of {budget:,} tokens" in outcome.stopped
        assert search.recorder.events["stopped"][2]["tokens_spent"] < budget


def test_more_budget_more_generations() -> None:
    made = [run(generations=30, patience=0, budget_tokens=budget)[0].generations for budget in (4000, 8000, 16_000)]
    assert made == sorted(set(made))


# -- races -----------------------------------------------------------------------------------------------------------------
def test_a_race_spares_tokens_and_keeps_the_quality() -> None:
    raced, search, pool = run(generations=5)
    plain, unraced, all_tokens = run(generations=5, early_rejection=False)
    assert not any(request.race for request in all_tokens.asked)
    assert not any(c.rejected for c in unraced.recorder.candidates.values())
    assert pool.tokens["fitness"] < all_tokens.tokens["fitness"]
    assert pool.kl(Plan(raced.best.levels)) <= 1.02 * pool.kl(Plan(plain.best.levels))
    out = [c for c in search.recorder.candidates.values() if c.rejected]
    assert out
    for candidate in out:
        assert (candidate.status, candidate.survived) == ("evaluated", False)
        assert candidate.reason == f"rejected early after {candidate.tokens} tokens"
        assert candidate.tokens < 96
        assert candidate.fitness is not None
        assert candidate.relative is not None
    assert not {c.plan_hash for c in out} & {c.plan_hash for c in search.search.state.population}


def test_leader_and_uniform_plan_run_in_no_race() -> None:
    _, search, pool = run(generations=5)
    uniform = search.search.uniform.levels
    races = [request for request in pool.asked if request.race is not None]
    assert races
    for request in races:
        assert request.race is not None
        assert request.race.keep in (5, 3)
        assert len(request.race.contenders) > request.race.keep
        assert uniform not in [request.plans[index] for index in request.race.contenders]
    uniform_rows = [row for (name, _), row in search.recorder.evaluations.items() if name == search.search.uniform.hash]
    assert all(row.reason is None for row in uniform_rows)
    names = {c.plan_hash: c for c in search.recorder.candidates.values()}
    for (name, window), row in search.recorder.evaluations.items():
        if window.startswith("g") and row.reason is not None:
            assert names[name].generation == int(window[1:].split(".")[0]), "only newcomers are rejected early"


def test_a_plan_rejected_early_gets_no_further_stage() -> None:
    _, search, _ = run(generations=5)
    for (name, window), row in search.recorder.evaluations.items():
        if row.reason is not None and window.startswith("g") and window.endswith(".0"):
            assert (name, window.replace(".0", ".1")) not in search.recorder.evaluations


# -- the landscape picks -----------------------------------------------------------------------------------------------------
def test_of_more_proposals_the_more_promising_are_scored() -> None:
    def promised(oversample: int) -> float:
        _, search, _ = run(generations=1, operators=["level_switch"], oversample=oversample)
        children = [c for c in search.recorder.candidates.values() if c.generation == 1]
        assert len(children) == 8
        return fmean(c.predicted for c in children if c.predicted is not None)

    assert promised(16) < promised(4) < promised(1)


@pytest.mark.parametrize("foresees", [True, False])
def test_a_survey_shows_what_changes_of_the_leader_do(foresees: bool) -> None:
    """Where the worker gives no slopes, plans around the leader are evaluated instead, within the same budget."""
    outcome, search, pool = run("default", foresees=foresees, generations=30, patience=0, budget_tokens=20_000)
    told = [data for key, (_, _, data) in search.recorder.events.items() if key.startswith("survey-")]
    assert told
    assert all(data["foreseen"] is foresees for data in told)
    assert any(text == "slopes" for _, text, _ in pool.seen) is foresees
    looked = [window for _, window in search.recorder.evaluations if window == "survey.0"]
    assert len(looked) == (told[0]["changes"] + 1 if foresees else 0)
    assert search.recorder.candidates[outcome.best.plan_hash].operator == outcome.best.operator
    assert outcome.tokens == pool.tokens["fitness"] <= 20_000
    assert outcome.best.relative is not None
    assert outcome.best.relative < 0.9


def test_what_was_foreseen_is_recorded_and_compared() -> None:
    outcome, search, _ = run(generations=6, patience=0, early_rejection=False, stages=[{"tokens": 32, "keep": 9}])
    for candidate in search.recorder.candidates.values():
        assert (candidate.predicted is None) == (candidate.generation == 0)
    assert outcome.rank_correlation is not None
    assert 0.4 < outcome.rank_correlation <= 1, "this landscape is a sum over blocks"
    told = [data["rank_correlation"] for key, (_, _, data) in search.recorder.events.items() if key.startswith("generation-")]
    assert told[0] is None
    assert outcome.rank_correlation == pytest.approx(fmean(told[1:]), abs=1e-3)


def test_credit_is_what_the_bandit_believed() -> None:
    _, search, _ = run("default", generations=4)
    for candidate in search.recorder.candidates.values():
        assert (candidate.credit is None) == (candidate.operator not in search.search.breeder.bandit.arms)
        assert candidate.credit is None or candidate.credit > 0


# -- an LLM ahead of time ----------------------------------------------------------------------------------------------------
def test_children_in_flight_say_which_scores_they_knew() -> None:
    """Asked while the generation before is scored, so they know the one before that; nothing while the first is scored."""
    _, search, _ = run("default", Thinker(0.001), generations=6, patience=0)
    asked = [c for c in search.recorder.candidates.values() if c.operator in ("crossover", "mutate")]
    assert {c.generation for c in asked} >= {2, 3, 4}
    for candidate in asked:
        assert candidate.informed_by == (candidate.generation - 2 if candidate.generation > 1 else None)
    others = [c for c in search.recorder.candidates.values() if c.operator in ("level_switch", "recombine", "reallocate")]
    assert all(c.informed_by is None for c in others)


def test_the_papers_loop_waits_for_the_scores() -> None:
    _, search, _ = run("self-pruner")
    asked = [c for c in search.recorder.candidates.values() if c.operator in ("crossover", "mutate")]
    assert asked
    assert all(candidate.informed_by == candidate.generation - 1 for candidate in asked)


class Thinker(ScriptedProposer):
    """Says that it took ``seconds``; with ``rubbish`` no answer is a plan."""

    def __init__(self, seconds: float, *, rubbish: bool = False) -> None:
        super().__init__()
        self.seconds = seconds
        self.rubbish = rubbish

    async def complete(self, request: Request) -> Reply:
        reply = await super().complete(request)
        text = '{"plans": "more of everything"}' if self.rubbish else reply.text
        return Reply(text, reply.model, reply.prompt_tokens, reply.completion_tokens, self.seconds)


def children_by(search: Run) -> Counter[str]:
    return Counter(c.operator for c in search.recorder.candidates.values() if c.generation > 0)


def test_a_slow_llm_is_asked_rarely() -> None:
    """Its latency is paid for by what it brings: here nothing, since its plans are drawn at random."""
    quick, fast, _ = run("default", Thinker(0.001), generations=16, patience=0)
    slow, search, _ = run("default", Thinker(600.0), generations=16, patience=0)
    asked = {call.generation for call in search.recorder.calls.values() if call.operator in ("crossover", "mutate")}
    assert len(asked) <= 2 + 16 / 4 * 2
    assert len(search.recorder.calls) < 0.75 * len(fast.recorder.calls)
    # Others make its children, but for a slot now and then for which nobody finds a new plan.
    assert all(0.95 * 16 * 8 <= sum(children_by(one).values()) <= 16 * 8 for one in (search, fast))
    assert slow.best.fitness is not None
    assert quick.best.fitness is not None
    assert slow.best.fitness <= 1.03 * quick.best.fitness


def test_an_llm_that_answers_rubbish_costs_no_children() -> None:
    without, _, _ = run("evolution", generations=8, patience=0)
    outcome, search, _ = run("default", Thinker(20.0, rubbish=True), generations=8, patience=0)
    made = children_by(search)
    assert not {"crossover", "mutate"} & made.keys()
    assert 0.95 * 8 * 8 <= sum(made.values()) <= 8 * 8
    assert outcome.best.fitness is not None
    assert without.best.fitness is not None
    assert outcome.best.fitness <= 1.03 * without.best.fitness
    assert math.isfinite(outcome.best.fitness)
