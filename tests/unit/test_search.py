"""The loop: what it scores, what it keeps, what it believes, and that going on after a crash changes nothing."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selfpruner.config import LlmLimits, SearchConfig
from selfpruner.errors import ConfigError, OutOfMemoryError, SelfprunerError
from selfpruner.evaluation.session import Prepared
from selfpruner.evolution.evaluator import Evaluator
from selfpruner.evolution.outcome import Outcome
from selfpruner.evolution.survey import weighed
from selfpruner.evolution.windows import PIECE, Windows, report_windows
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.records import Evaluation
from selfpruner.testing.spaces import space_of
from tests.helpers.searching import (
    SESSION,
    AnalyticPool,
    DiedError,
    Interruptions,
    MemoryRecorder,
    Run,
    ScriptedProposer,
    config_of,
    window,
)

PRESETS = ("evolution", "default", "self-pruner")


def space_for(config: SearchConfig) -> SearchSpace:
    return space_of(layers=6, rate=config.rate, granularity=config.granularity, bias=True)


def run(preset: str = "evolution", **changes: Any) -> tuple[Outcome, Run]:
    config = config_of(preset, **changes)
    search = Run(config, space_for(config), MemoryRecorder())
    return asyncio.run(search.go()), search


# -- windows -------------------------------------------------------------------------------------------------------------
def windows_of(sequences: int = 60, **changes: Any) -> Windows:
    return Windows(sequences, 16, **{"seed": 1, "probe": 32, "final": 128, "stages": [32, 96], **changes})


def test_windows_never_overlap_within_an_epoch() -> None:
    windows = windows_of()
    probe, final = set(windows.probe.sequences), set(windows.final.sequences)
    assert (len(probe), len(final)) == (2, 8)
    assert not probe & final
    seen: set[int] = set()
    for number in range(8):  # 50 free sequences, 6 a generation
        first, second = windows.generation(number)
        assert (len(first.sequences), len(second.sequences)) == (2, 4)
        fresh = {*first.sequences, *second.sequences}
        assert len(fresh) == 6
        assert not fresh & (seen | probe | final)
        seen |= fresh


def test_a_used_up_text_starts_over_in_another_order() -> None:
    windows = windows_of()
    first, ninth = windows.generation(0), windows.generation(8)
    assert first[0].name != ninth[0].name
    assert [w.sequences for w in first] != [w.sequences for w in ninth]
    assert not set(ninth[1].sequences) & set(windows.final.sequences)


def test_only_probes_are_also_asked_on_short_pieces() -> None:
    asked = []

    class Watched(AnalyticPool):
        async def run(self, session: Any, request: Any, on_progress: Any = None) -> Any:
            asked.append((request.kind, request.sequences, getattr(request, "piece", None)))
            return await super().run(session, request, on_progress)

    config = config_of(generations=2)
    space = space_for(config)
    search = Run(config, space, MemoryRecorder(), pool=Watched(space))
    asyncio.run(search.go())
    assert asked[0] == ("evaluate", search.windows.probe.sequences, None)
    assert asked[1] == ("evaluate", search.windows.probe.sequences[:1], PIECE)
    assert len(asked) > 4
    assert all(piece is None for _, _, piece in asked[2:])


def test_what_ruins_sequences_weighs_more() -> None:
    whole = [0.01, 0.02, 0.04, 0.01, 0.0]
    assert weighed(whole, [0.011, 0.022, 0.044, 0.044, 0.0]) == pytest.approx([0.01, 0.02, 0.04, 0.04, 0.0])
    assert weighed(whole, [0.02, 0.04, 0.08, 0.03, 0.0]) == whole, "others are dearer on starts, too"


def test_sequences_are_cut_into_whole_pieces() -> None:
    tokens = torch.arange(24).view(2, 12)
    prepared: Any = SimpleNamespace(text=lambda _: SimpleNamespace(tokens=tokens))
    assert Prepared.tokens(prepared, "fitness", [1], 5).tolist() == [[12, 13, 14, 15, 16], [17, 18, 19, 20, 21]]
    assert Prepared.tokens(prepared, "fitness", [1, 0], 6).shape == (4, 6)
    for piece in (None, 12, 32):
        assert torch.equal(Prepared.tokens(prepared, "fitness", [1, 0], piece), tokens[[1, 0]])


def test_surveys_look_at_other_tokens_while_there_are_any() -> None:
    windows = windows_of(60, survey=320)  # 20 of the 50 sequences that neither probes nor the final have
    first, second, third = (windows.survey(number) for number in range(3))
    assert [len(set(window.sequences)) for window in (first, second, third)] == [20, 20, 20]
    assert not set(first.sequences) & set(second.sequences)
    assert set(third.sequences) & {*first.sequences, *second.sequences}, "a new epoch"
    assert not {*first.sequences, *second.sequences} & {*windows.probe.sequences, *windows.final.sequences}
    part = windows.survey(1, 0.25)
    assert len(part.sequences) == 5
    assert set(part.sequences) < set(second.sequences)
    assert len({window.name for window in (first, second, third, part)}) == 4


def test_windows_follow_from_the_seed() -> None:
    assert windows_of().generation(3) == windows_of().generation(3)
    assert windows_of(seed=2).generation(3) != windows_of().generation(3)
    names = [w.name for number in range(20) for w in windows_of().generation(number)]
    assert len(set(names)) == 40


def test_a_text_too_short_for_a_generation_says_how_long_it_must_be() -> None:
    with pytest.raises(ConfigError, match=r"a generation needs 6 .* at least 18") as caught:
        windows_of(10, probe=1600, final=1600)
    assert caught.value.param == "fitness_text"
    for number in (18, 19, 20):
        windows_of(number, probe=1600, final=1600)


@pytest.mark.parametrize("stages", [[64, 64], [64, 32]])
def test_stages_must_rise(stages: list[int]) -> None:
    with pytest.raises(ConfigError, match="rising") as caught:
        windows_of(stages=stages)
    assert caught.value.param == "stages"


def test_report_windows_cover_the_text_once() -> None:
    windows = report_windows(19)
    assert [index for w in windows for index in w.sequences] == list(range(19))
    assert [len(w.sequences) for w in windows] == [8, 8, 3]
    assert {w.text for w in windows} == {"report"}


# -- the evaluator -------------------------------------------------------------------------------------------------------
def evaluator_of(space: SearchSpace) -> tuple[Evaluator, AnalyticPool, MemoryRecorder]:
    pool, recorder = AnalyticPool(space), MemoryRecorder()
    return Evaluator(pool, SESSION, recorder), pool, recorder


def plans_of(space: SearchSpace, count: int) -> list[Plan]:
    rng = random.Random(0)
    plans = list(dict.fromkeys(space.project([rng.random() for _ in space.dials]) for _ in range(50)))
    assert len(plans) >= count
    return plans[:count]


def test_what_is_recorded_is_not_evaluated_again() -> None:
    space = space_of()
    evaluator, pool, recorder = evaluator_of(space)
    plans = plans_of(space, 6)
    first = asyncio.run(evaluator.score([*plans[:4], plans[0]], [window()]))
    assert pool.tasks == [4]
    second = asyncio.run(evaluator.score(plans, [window(), window("v", 5)]))
    assert pool.tasks == [4, 2, 6]
    assert max(pool.seen.values()) == 1
    assert all(first[plan.hash].kl == recorder.evaluations[plan.hash, "w"].kl for plan in plans[:4])
    third = asyncio.run(Evaluator(pool, SESSION, recorder).score(plans, [window(), window("v", 5)]))
    assert third == second
    assert pool.tasks == [4, 2, 6]


def test_windows_are_weighted_by_their_tokens() -> None:
    space = space_of()
    evaluator, _, recorder = evaluator_of(space)
    (plan,) = plans_of(space, 1)
    score = asyncio.run(evaluator.score([plan], [window("a", 1), window("b", 2, 3, 4)]))[plan.hash]
    a, b = recorder.evaluations[plan.hash, "a"], recorder.evaluations[plan.hash, "b"]
    assert a.kl is not None
    assert b.kl is not None
    assert score.kl == pytest.approx((a.kl + 3 * b.kl) / 4)
    assert score.tokens == 64
    assert score.perplexity == pytest.approx(math.exp(score.nll))
    assert score.value("kl") == score.kl
    assert score.value("nll") == score.nll


def test_a_full_device_halves_the_batch() -> None:
    space = space_of()
    evaluator, pool, recorder = evaluator_of(space)
    pool.memory = 2
    plans = plans_of(space, 8)
    scores = asyncio.run(evaluator.score(plans, [window()]))
    assert pool.tasks == [8, 4, 2, 2, 4, 2, 2]
    assert all(score.reason is None and score.kl == pytest.approx(scores[plan].kl) for plan, score in scores.items())
    assert len(recorder.evaluations) == 8


def test_a_plan_that_fits_nowhere_is_recorded_as_such() -> None:
    space = space_of()
    evaluator, pool, recorder = evaluator_of(space)
    plans = plans_of(space, 8)
    pool.too_large = {plans[5].hash}
    scores = asyncio.run(evaluator.score(plans, [window()]))
    assert [plan.hash for plan in plans if scores[plan.hash].reason] == [plans[5].hash]
    assert scores[plans[5].hash].reason == "out of memory: no room"
    assert math.isnan(scores[plans[5].hash].kl)
    assert recorder.evaluations[plans[5].hash, "w"].tokens == 0
    before = len(pool.tasks)
    asyncio.run(evaluator.score(plans, [window()]))
    assert len(pool.tasks) == before, "not tried again"


def test_a_device_with_no_memory_at_all_fails_every_plan_once() -> None:
    space = space_of()
    evaluator, pool, _ = evaluator_of(space)
    pool.memory = 0
    scores = asyncio.run(evaluator.score(plans_of(space, 16), [window()]))
    assert sorted(pool.tasks, reverse=True) == [16, 8, 8] + [4] * 4 + [2] * 8 + [1] * 16
    assert all(score.reason is not None for score in scores.values())


def test_other_errors_pass_through() -> None:
    class Broken(AnalyticPool):
        async def run(self, *_: Any, **__: Any) -> Any:
            raise SelfprunerError("the worker is gone", code="worker_failed")

    space = space_of()
    recorder = MemoryRecorder()
    with pytest.raises(SelfprunerError, match="worker is gone"):
        asyncio.run(Evaluator(Broken(space), SESSION, recorder).score(plans_of(space, 2), [window()]))
    assert not recorder.evaluations


def test_every_plan_on_every_window_is_an_evaluation() -> None:
    space = space_of()
    evaluator, _, _ = evaluator_of(space)
    asyncio.run(evaluator.score(plans_of(space, 3), [window("a"), window("b", 7)]))
    assert evaluator.evaluations == 6


# -- whole searches ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", PRESETS)
def test_a_search(preset: str) -> None:
    outcome, search = run(preset)
    space, recorder = search.search.space, search.recorder
    uniform = search.search.uniform
    for candidate in recorder.candidates.values():
        plan = Plan(candidate.levels)
        assert plan.hash == candidate.plan_hash
        assert space.meets_budget(plan)
        assert candidate.status == "evaluated"
        assert candidate.rates == tuple(round(rate, 6) for rate in space.rates(plan))
        assert set(candidate.parents) <= set(recorder.candidates)
    assert max(search.pool.seen.values()) == 1, "no plan is scored twice on the same tokens"
    windows = {name for _, name in recorder.evaluations}
    assert all(
        (uniform.hash, name) in recorder.evaluations for name in windows if not name.startswith(("probe", "starts", "survey"))
    ), "uniform is the reference of all"

    assert outcome.uniform.plan_hash == uniform.hash
    assert outcome.best.fitness == min(c.fitness for c in outcome.finalists if c.fitness is not None)
    assert outcome.best.relative is not None
    assert outcome.best.relative < 0.97
    assert search.pool.kl(Plan(outcome.best.levels)) < search.pool.kl(uniform)
    assert all(candidate.window == "final" for candidate in outcome.finalists)
    assert sum(outcome.made.values()) == len(recorder.candidates)
    assert set(outcome.improved) <= set(outcome.made)
    assert f"generation-{outcome.generations}" in recorder.events
    assert "final" in recorder.events


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_seeds_equal_searches(preset: str) -> None:
    (a, first), (b, second) = run(preset), run(preset)
    assert first.recorder.candidates == second.recorder.candidates
    assert a.best == b.best
    assert first.pool.seen == second.pool.seen
    assert run(preset, seed=4)[1].recorder.candidates != first.recorder.candidates


def test_the_best_never_gets_worse() -> None:
    _, search = run("evolution", generations=8, patience=0)
    best = [data["relative"] for key, (_, _, data) in search.recorder.events.items() if key.startswith("generation-")]
    assert len(best) == 9
    # The pool's noise is common to all plans of a window, so relative fitness is exact.
    assert all(after <= before + 1e-12 for before, after in pairwise(best))
    assert best[-1] < best[0]


def test_evolution_comes_close_to_the_optimum() -> None:
    outcome, search = run("evolution", generations=25, crossover_offspring=8, mutation_offspring=16)
    pool, space = search.pool, search.search.space
    from selfpruner.planning.allocation import cheapest

    losses = [
        [weight * (block.rate(level) + 4 * block.rate(level) ** 3) for level in range(len(block.options))]
        for weight, block in zip(pool.weights, space.blocks, strict=True)
    ]
    assert pool.kl(Plan(outcome.best.levels)) <= 1.05 * pool.kl(cheapest(space, losses))


@pytest.mark.parametrize("preset", ["default", "self-pruner"])
def test_llm_operators_make_their_share(preset: str) -> None:
    outcome, search = run(preset)
    assert {"initialize", "crossover", "mutate"} <= set(outcome.made)
    asked = {call.operator for call in search.recorder.calls.values()}
    assert asked - {"reflect"} == {"initialize", "select", "crossover", "mutate"}
    if preset == "self-pruner":
        assert set(outcome.made) <= {"uniform", "initialize", "crossover", "mutate"}
    else:
        assert {"ramp", "sensitivity", "level_switch", "recombine"} <= set(outcome.made)
    chosen = [c for c in search.recorder.candidates.values() if c.operator == "crossover"]
    assert all(len(c.parents) == 2 for c in chosen)


def test_generations_of_none_still_decide() -> None:
    outcome, search = run("evolution", generations=0)
    assert outcome.generations == 0
    assert outcome.best.relative is not None
    assert outcome.best.relative <= 1
    assert {c.generation for c in search.recorder.candidates.values()} == {0}


def test_likelihood_as_the_fitness() -> None:
    outcome, search = run("evolution", fitness="nll")
    row = search.recorder.evaluations[outcome.best.plan_hash, "final"]
    assert outcome.best.fitness == row.nll


def test_a_plan_without_a_finite_fitness_never_wins() -> None:
    config = config_of("evolution")
    space = space_for(config)
    first = Run(config, space, MemoryRecorder())
    best = asyncio.run(first.go()).best
    again = Run(config, space, MemoryRecorder())
    again.pool.broken = {best.plan_hash}
    outcome = asyncio.run(again.go())
    assert outcome.best.plan_hash != best.plan_hash
    bad = again.recorder.candidates[best.plan_hash]
    assert (bad.status, bad.fitness, bad.relative, bad.survived) == ("infeasible", None, None, False)
    assert "not finite" in str(bad.reason)
    assert best.plan_hash not in {c.plan_hash for c in outcome.finalists}


def test_a_plan_too_large_for_the_device_is_failed_not_infeasible() -> None:
    config = config_of("evolution")
    space = space_for(config)
    best = asyncio.run(Run(config, space, MemoryRecorder()).go()).best
    again = Run(config, space, MemoryRecorder())
    again.pool.too_large = {best.plan_hash}
    outcome = asyncio.run(again.go())
    assert outcome.best.plan_hash != best.plan_hash
    assert again.recorder.candidates[best.plan_hash].status == "failed"


def test_when_nothing_can_be_scored_the_error_says_so() -> None:
    config = config_of("evolution")
    search = Run(config, space_for(config), MemoryRecorder())
    search.pool.memory = 0
    with pytest.raises(SelfprunerError, match="candidates' reasons") as caught:
        asyncio.run(search.go())
    assert caught.value.code == "no_feasible_plan"
    assert not isinstance(caught.value, OutOfMemoryError)


# -- the LLM may fail ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["default", "self-pruner"])
@pytest.mark.parametrize("outcome", ["timeout", "unreachable", "not_json"])
def test_a_proposer_that_is_down_does_not_end_the_search(preset: str, outcome: str) -> None:
    config = config_of(preset)
    proposer = ScriptedProposer(failures=dict.fromkeys(range(1, 500), outcome))
    search = Run(config, space_for(config), MemoryRecorder(), proposer=proposer)
    found = asyncio.run(search.go())
    assert len(search.recorder.candidates) >= config.population
    assert not {"initialize", "crossover", "mutate"} & set(found.made)
    # Three failures in a row a generation, each with its repair turn where the reply could be repaired.
    assert len(proposer.made) <= (config.generations + 1) * 3 * (2 if outcome == "not_json" else 1)
    assert {call.outcome for call in search.recorder.calls.values()} == {outcome}


def test_a_cap_on_calls_is_kept() -> None:
    config = config_of("self-pruner")
    search = Run(config, space_for(config), MemoryRecorder(), limits=LlmLimits(calls=4))
    asyncio.run(search.go())
    assert len(search.recorder.calls) == 4
    assert "llm-limit" in search.recorder.events


# -- going on after a crash ------------------------------------------------------------------------------------------------
def state(recorder: MemoryRecorder) -> Mapping[str, Any]:
    return {
        "candidates": {key: asdict(value) for key, value in recorder.candidates.items()},
        "evaluations": recorder.evaluations,
        "calls": {key: asdict(value) for key, value in recorder.calls.items()},
        "events": recorder.events,
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(preset: str) -> None:
    """The process dies at every await point there is, one run each, and starts again over the same records."""
    config = config_of(preset, generations=2)
    space = space_for(config)
    failures = {5: "timeout", 7: "not_json"}

    def start(recorder: MemoryRecorder, at: int | None) -> Run:
        stop = Interruptions(at)
        return Run(config, space, recorder, pool=AnalyticPool(space, stop), proposer=ScriptedProposer(stop, failures))

    undisturbed = start(MemoryRecorder(), None)
    expected = asyncio.run(undisturbed.go())
    points = undisturbed.pool.interruptions.points
    assert points >= 8
    for at in range(1, points + 1):
        recorder = MemoryRecorder()
        first = start(recorder, at)
        with pytest.raises(DiedError):
            asyncio.run(first.go())
        second = start(recorder, None)
        found = asyncio.run(second.go())
        assert found.best == expected.best
        assert (found.made, found.improved) == (expected.made, expected.improved)
        assert state(recorder) == state(undisturbed.recorder)
        assert first.pool.seen + second.pool.seen == undisturbed.pool.seen, "nothing is evaluated twice"
        assert sorted(first.proposer.made + second.proposer.made) == undisturbed.proposer.made, "nothing is asked twice"
        assert second.evaluator.evaluations == undisturbed.evaluator.evaluations


def test_a_finished_search_run_again_asks_nobody() -> None:
    config = config_of("default")
    space, recorder = space_for(config), MemoryRecorder()
    first = asyncio.run(Run(config, space, recorder).go())
    again = Run(config, space, recorder)
    assert asyncio.run(again.go()).best == first.best
    assert not again.pool.tasks
    assert not again.proposer.made


def test_evaluations_are_saved_before_they_are_used() -> None:
    """A batch whose result never came back is scored again; what came back is not."""
    space = space_of()
    evaluator, pool, recorder = evaluator_of(space)
    pool.interruptions.at = 2
    plans = plans_of(space, 3)
    with pytest.raises(DiedError):
        asyncio.run(evaluator.score(plans, [window("a"), window("b", 9)]))
    assert {name for _, name in recorder.evaluations} == {"a"}
    assert all(isinstance(row, Evaluation) for row in recorder.evaluations.values())
