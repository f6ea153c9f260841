"""The generation probe: what repetition is, what a worker answers, whom the final then takes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selfpruner.config import SearchConfig
from selfpruner.errors import CancelledTaskError, ConfigError, OutOfMemoryError, SelfprunerError, WorkerError
from selfpruner.evolution.generation_probe import choose
from selfpruner.evolution.outcome import Outcome
from selfpruner.export.build import build
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import session_of
from selfpruner.judging.repetition import continuations, repeated, repetition
from selfpruner.planning.space import Plan
from selfpruner.records import Candidate
from selfpruner.testing.spaces import space_of
from selfpruner.testing.tiny_models import FAMILIES, load_tiny, sample_text, tiny_model, tokens_of
from selfpruner.workers.tasks import GenerateRequest, PrepareRequest
from tests.helpers.searching import AnalyticPool, MemoryRecorder, Run, config_of


# -- the rate ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4], 0.0),
        ([7] * 13, 0.9),  # one run of ten is new
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),  # 1234 comes twice among five
        (list(range(48)), 0.0),
    ],
)
def test_the_share_of_runs_seen_before(tokens: list[int], rate: float) -> None:
    assert repeated(tokens) == pytest.approx(rate)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_transformers_writes(family: str) -> None:
    model, prompts = load_tiny(family), tokens_of(3, 9)
    model.generation_config.eos_token_id = None
    theirs = model.generate(prompts, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompts))
    written = continuations(model, prompts, 12)
    assert written == theirs[:, 9:].tolist()
    alone = [continuations(model, prompts[row : row + 1], 12)[0] for row in range(3)]
    assert written == alone, "sequences of a batch do not see each other"
    assert repetition(model, prompts, new_tokens=12) == pytest.approx(sum(map(repeated, written)) / 3)


def test_what_follows_an_end_of_text_does_not_count() -> None:
    model, prompts = load_tiny("llama"), tokens_of(2, 9)
    model.generation_config.eos_token_id = None
    whole = continuations(model, prompts, 16)
    end = whole[0][5]
    for ends in (end, [end, 1]):
        model.generation_config.eos_token_id = ends
        assert continuations(model, prompts, 16)[0] == whole[0][: whole[0].index(end)]


def test_it_stops_between_tokens() -> None:
    answers = iter([False, False, True])
    with pytest.raises(CancelledTaskError):
        repetition(load_tiny("llama"), tokens_of(1, 4), cancelled=lambda: next(answers))


# -- the worker's task -----------------------------------------------------------------------------------------------------
def job_config(folder: Path, **changes: Any) -> SearchConfig:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(sample_text(12_000, seed=3))
        tiny_model(folder / "model", "llama", layers=3, ffn=96)
    words = {"sources": [{"source": str(text)}], "sequences": 8, "length": 64}
    small = {"model": str(folder / "model"), "rate": 0.3, "preset": "evolution", "ffn_step": 8, "device": "cpu", "dtype": "float32"}
    texts = {"calibration": words, "fitness_text": words, "report_text": words}
    return SearchConfig.model_validate({**small, **texts, **changes})


def written_by(handler: SessionHandler, config: SearchConfig, folder: Path, request: GenerateRequest) -> dict[str, float]:
    return handler.handle(session_of(config, folder / "cache"), request, lambda _: None, lambda: False).repetition


def test_a_worker_writes_with_every_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    handler, config = SessionHandler("cpu"), job_config(tmp_path)
    session = session_of(config, tmp_path / "cache")
    space = handler.handle(session, PrepareRequest(), lambda _: None, lambda: False).space
    uniform = space.project([0.3] * space.layers)
    alive: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        import gc
        import weakref

        gc.collect()
        alive.append(sum(reference() is not None for reference in made))
        model = build(*arguments, **options)
        made.append(weakref.ref(model))
        return model

    made: list[Any] = []
    monkeypatch.setattr("selfpruner.jobs.handler.build", counted)
    largest = Plan(tuple(len(block.options) - 1 for block in space.blocks))
    plans = {"dense": space.dense, "uniform": uniform, "again": uniform, "largest": largest}
    named = {name: plan.levels for name, plan in plans.items()}
    asked = GenerateRequest(plans=named, text="fitness", sequences=(0, 3, 5), prompt=16, new_tokens=24)
    rates = written_by(handler, config, tmp_path, asked)
    assert alive == [0, 0, 0], "one pruned model at a time"
    assert list(rates) == list(plans)
    assert rates["uniform"] == rates["again"]
    assert written_by(handler, config, tmp_path, asked) == rates
    held = handler._prepared
    assert held is not None
    prompts = held[1].tokens("fitness", [0, 3, 5])[:, :16]
    assert rates["dense"] == repetition(held[1].loaded.model, prompts, new_tokens=24)
    assert all(0 <= rate <= 1 for rate in rates.values())


def test_a_worker_without_room_says_so(tmp_path: Path) -> None:
    """The model is streamed, or is whole and leaves no room for another beside it."""
    handler, config = SessionHandler("cpu"), job_config(tmp_path)
    handler.handle(session_of(config, tmp_path / "cache"), PrepareRequest(), lambda _: None, lambda: False)
    held = handler._prepared
    assert held is not None
    key, prepared = held
    payload = GenerateRequest(plans={"dense": (0,) * 6}, text="fitness", sequences=(0,), prompt=8, new_tokens=8)
    handler._prepared = key, replace(prepared, loaded=replace(prepared.loaded, streamed=True, memory=1 << 20))
    with pytest.raises(ConfigError, match="Set generation_probe to false") as caught:
        written_by(handler, config, tmp_path, payload)
    assert caught.value.param == "generation_probe"
    handler._prepared = key, replace(prepared, loaded=replace(prepared.loaded, memory=1000))
    with pytest.raises(OutOfMemoryError, match="does not fit beside the dense one"):
        written_by(handler, config, tmp_path, payload)


# -- the final -------------------------------------------------------------------------------------------------------------
def entrants(*hashes: str) -> list[Candidate]:
    return [Candidate(name, (0,), (0.0,), 0, "x", status="evaluated", fitness=1.0) for name in hashes]


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({"dense": 0.3, "a": 0.39, "b": 0.0, "c": 0.0}, "a"),  # no more than a tenth above the dense model
        ({"dense": 0.3, "a": 0.5, "b": 0.44, "c": 0.2}, "b"),  # the first that is clearly better, not the best writer
        ({"dense": 0.3, "a": 0.5, "b": 0.46, "c": 0.2}, "c"),
        ({"dense": 0.3, "a": 0.5, "b": 0.46, "c": 0.6}, "a"),  # nobody does better
    ],
)
def test_who_is_taken(rates: dict[str, float], chosen: str) -> None:
    assert choose(entrants("a", "b", "c"), rates).plan_hash == chosen


def search(repetition: dict[str, float] | Exception, recorder: MemoryRecorder | None = None, **changes: Any) -> tuple[Outcome, Run]:
    config = config_of("evolution", **changes)
    space = space_of(layers=6, rate=config.rate, bias=True)
    pool = AnalyticPool(space)
    pool.repetition = repetition
    run = Run(config, space, recorder or MemoryRecorder(), pool=pool)
    return asyncio.run(run.go()), run


def near(outcome: Outcome) -> list[Candidate]:
    """The first three finalists that are within 2 % of the best."""
    lowest = outcome.finalists[0].fitness
    assert lowest is not None
    return [c for c in outcome.finalists[:3] if c.fitness is not None and c.fitness <= 1.02 * lowest]


def test_the_best_writes_well_and_stays() -> None:
    outcome, run = search({})
    assert outcome.best is outcome.finalists[0]
    names = [c.plan_hash for c in near(outcome)]
    assert run.pool.wrote == [["dense", *names]]
    assert outcome.repetition == dict.fromkeys(["dense", *names], 0.3)
    type_, message, data = run.recorder.events["repetition"]
    assert (type_, data) == ("search.generation_probe", {"repetition": outcome.repetition, "chosen": outcome.best.plan_hash})
    assert "30 % of itself" in message


def test_a_best_that_runs_in_circles_gives_way() -> None:
    first, _ = search({})
    close = near(first)
    assert len(close) >= 2, "the case this test is about"
    outcome, run = search({first.best.plan_hash: 0.9})
    assert outcome.best.plan_hash == close[1].plan_hash
    assert outcome.finalists[0].plan_hash == first.best.plan_hash
    assert "is taken instead" in run.recorder.events["repetition"][1]
    assert run.recorder.events["final"][2]["best"] == outcome.best.plan_hash
    assert outcome.repetition[first.best.plan_hash] == 0.9


def test_one_that_is_not_close_takes_nobodys_place() -> None:
    first, _ = search({})
    rates = {c.plan_hash: 0.9 for c in near(first)}
    outcome, run = search(rates)
    assert outcome.best.plan_hash == first.best.plan_hash
    assert set(run.pool.wrote[0]) == {"dense", *rates} < {"dense", *(c.plan_hash for c in first.finalists)}


@pytest.mark.parametrize(
    "error", [ConfigError("it is streamed"), OutOfMemoryError("no room"), WorkerError("the worker died three times")]
)
def test_a_worker_that_cannot_write_ends_no_search(error: SelfprunerError) -> None:
    expected, _ = search({})
    outcome, run = search(error)
    assert outcome.best.plan_hash == expected.best.plan_hash
    assert outcome.repetition == {}
    type_, message, data = run.recorder.events["repetition"]
    assert (type_, data) == ("search.generation_probe", {"reason": error.message})
    assert error.message in message


def test_cancelling_while_it_writes_ends_the_search() -> None:
    with pytest.raises(CancelledTaskError):
        search(CancelledTaskError("stop"))


def test_it_can_be_switched_off() -> None:
    outcome, run = search({}, generation_probe=False)
    assert run.pool.wrote == []
    assert outcome.repetition == {}
    assert "repetition" not in run.recorder.events
    assert not config_of("self-pruner").generation_probe


def test_going_on_asks_once_more_and_says_the_same() -> None:
    recorder = MemoryRecorder()
    first, _ = search({}, recorder)
    events = dict(recorder.events)
    again, run = search({}, recorder)
    assert run.pool.tasks == []
    assert len(run.pool.wrote) == 1
    assert (again.best, again.repetition, recorder.events) == (first.best, first.repetition, events)
