"""A whole job in one process on a tiny model: its report, its checkpoint, its second run, and the errors of bad requests."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from selfpruner.architectures import describe
from selfpruner.architectures.cost import decoder_parameters, model_parameters
from selfpruner.config import SearchConfig
from selfpruner.errors import BudgetError, ConfigError, ContractError, SelfprunerError, TextError, UnknownNameError
from selfpruner.evaluation.session import Prepared, prepare
from selfpruner.export import checkpoint
from selfpruner.export.build import build, count_parameters
from selfpruner.export.pruned import pruned_tensors
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.lifecycle import JobResult
from selfpruner.jobs.run import run_job, session_of
from selfpruner.models import load, resolve
from selfpruner.planning.space import Plan
from selfpruner.proposers import ProposerSettings
from selfpruner.stages import STAGES
from selfpruner.store.store import Store
from selfpruner.testing.tiny_models import sample_text, tiny_model
from selfpruner.workers.base import perform
from selfpruner.workers.tasks import PrepareRequest
from tests.helpers.pruned import random_plans
from tests.helpers.small_jobs import RATE, Place, Recording, config_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("job")
    text = folder / "text.txt"
    text.write_text(sample_text(30_000, seed=3))
    model = tiny_model(folder / "model", "llama", layers=4, ffn=96)
    with Store(folder / "store.sqlite3") as store:
        yield Place(folder, model, text, store)


@dataclass(frozen=True)
class Done:
    config: SearchConfig
    job_id: str
    result: JobResult
    tasks: Counter[str]


@pytest.fixture(scope="module")
def done(place: Place) -> Done:
    config = config_of(place.model, place.text)
    job_id = place.job(config)
    return Done(config, job_id, *place.run(config, job_id))


@pytest.fixture(scope="module")
def prepared(place: Place, done: Done) -> Prepared:
    """What the worker held, made again from the cache."""
    source = resolve(str(place.model), place.folder / "cache")
    loaded = load(source, "cpu", "float32")
    roles = ("calibration", "fitness", "report")
    return prepare(done.config, loaded, place.folder / "cache", roles, lambda _: None, lambda: False)


# -- the report ----------------------------------------------------------------------------------------------------------
def test_the_report(done: Done, prepared: Prepared) -> None:
    report = done.result.report
    arch = prepared.arch
    assert {"evaluations", "plans", "seconds", "peak_worker_mib", "operators", "texts", "model", "plan", "checkpoint"} <= set(
        report
    )
    json.dumps(report, allow_nan=False)
    for name in ("dense", "uniform", "ramp", "best"):
        assert {"parameters", "kl", "perplexity", "prefill_tps", "decode_tps", "tokens"} <= set(report[name])
        assert report[name]["tokens"] == 8 * 64
        assert report[name]["prefill_tps"] > 0
        assert report[name]["decode_tps"] > 0
    assert {"parameters", "kl", "perplexity", "tokens"} == set(report["uniform_flap_bias"])
    assert report["dense"]["kl"] == 0
    assert report["dense"]["parameters"] == model_parameters(arch)
    assert report["dense"]["perplexity"] > 1

    space = prepared.space
    whole = decoder_parameters(arch)
    for name in ("uniform", "ramp", "best", "uniform_flap_bias"):
        removed = model_parameters(arch) - report[name]["parameters"]
        assert RATE <= removed / whole < RATE + space.step / whole
        assert report[name]["kl"] > 0
    assert report["plan"]["removed"] == model_parameters(arch) - report["best"]["parameters"]
    assert report["plan"]["hash"] == report["best_plan"] == Plan(tuple(report["plan"]["levels"])).hash
    assert report["target"] == {"rate": RATE, "of": "decoder", "parameters_to_remove": space.target}
    assert report["method"] == {"pattern": "structured", "criterion": "obs", "compensation": "least_squares", "preset": "evolution"}
    assert report["model"]["parameters"] == model_parameters(arch)
    assert report["texts"]["report"]["sequences"] == 8
    assert report["plans"] == sum(row["made"] for row in report["operators"].values())
    assert report["evaluations"] > report["plans"]
    assert report["peak_worker_mib"] > 0
    assert (report["stopped"], report["tokens_saved"]) == ("all 2 generations were made", 0)
    assert -1 <= report["rank_correlation"] <= 1
    assert all(0 <= report[name]["repetition"] <= 1 for name in ("dense", "best"))


def test_where_the_time_went(place: Place, done: Done) -> None:
    report = done.result.report
    rows = {row["stage"]: row for row in report["stages"]}
    assert list(rows) == [name for name in STAGES if name in rows], "in the order of a job"
    assert rows.keys() >= {
        *("loading", "texts", "statistics", "ordering", "factors", "probes", "scoring", "waiting", "final", "writing"),
        *("report", "timing", "export", "verification", "baseline", "other"),
    }
    assert sum(row["seconds"] for row in rows.values()) == pytest.approx(report["seconds"], abs=0.5)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.01)
    assert rows["verification"]["seconds"] == pytest.approx(done.result.checkpoint["verify_seconds"], abs=0.1)
    searched = ("probes", "scoring", "surveys", "final")
    assert sum(rows[name]["tokens"] for name in searched if name in rows) == report["tokens"]
    texts = done.config.calibration, done.config.fitness_text, done.config.report_text
    assert rows["texts"]["tokens"] == sum(text.sequences * text.length for text in texts)
    assert rows["statistics"]["tokens"] == done.config.calibration.sequences * done.config.calibration.length
    assert {rows[name]["workers"] for name in ("loading", "statistics", "scoring", "export", "baseline")} == {1}
    assert report["peak_worker_mib"] == max(row["peak_mib"] for row in rows.values()) > 0
    with closing(sqlite3.connect(place.store.path)) as connection:
        query = "SELECT stage, tokens, workers, seconds, sum(share) OVER () FROM stages WHERE job_id = ?"
        stored = connection.execute(query, (done.job_id,)).fetchall()
    assert {name: row[:2] for name, *row in stored} == {name: [row["tokens"], row["workers"]] for name, row in rows.items()}
    assert all(seconds >= rows[name]["seconds"] - 0.001 for name, *_, seconds, _ in stored)
    assert stored[0][-1] == pytest.approx(1)


def test_the_best_is_at_least_as_good_as_uniform_where_it_was_chosen(place: Place, done: Done, prepared: Prepared) -> None:
    rows = {row.plan_hash: row for row in place.store.evaluations(done.job_id) if row.window == "final"}
    uniform = prepared.space.project([RATE] * prepared.space.layers)
    best = done.result.report["best_plan"]
    # A plan that repeats itself gives way to one that is within 2 %.
    assert rows[best].kl <= 1.02 * min(row.kl for row in rows.values() if row.kl is not None)  # type: ignore[operator]
    assert rows[best].kl <= rows[uniform.hash].kl  # type: ignore[operator]
    assert rows[best].tokens == 256
    charged = [row.tokens for row in place.store.evaluations(done.job_id) if not row.window.startswith("report")]
    assert done.result.report["tokens"] == sum(charged)


def test_every_candidate_is_in_the_store(place: Place, done: Done, prepared: Prepared) -> None:
    page = place.store.candidates(done.job_id, limit=100)
    assert len(page.data) == done.result.report["plans"]
    for row in page.data:
        assert prepared.space.meets_budget(Plan(tuple(row.levels)))
        assert row.status == "evaluated"
    types = {event.type for event in place.store.events(done.job_id).data}
    assert {
        "search.foreseen",
        "search.prepared",
        "search.probed",
        "search.generation",
        "search.finished",
        "checkpoint.exported",
    } <= types
    progress = place.store.job(done.job_id).progress
    assert progress is not None
    assert progress["stage"] == "done"


# -- the checkpoint --------------------------------------------------------------------------------------------------------
def test_the_checkpoint_is_the_plan_that_was_scored(place: Place, done: Done, prepared: Prepared) -> None:
    result = done.result.checkpoint
    assert result["plan_hash"] == done.result.report["best_plan"]
    assert Path(result["path"]) == place.folder / "checkpoint"
    model = checkpoint.load(result["path"])
    best = done.result.report["best"]
    assert count_parameters(model) == result["parameters"] == best["parameters"]
    tokens = prepared.texts["report"].tokens
    with torch.no_grad():
        dense = prepared.loaded.model(tokens).logits.double().log_softmax(-1)
        out = model(tokens, labels=tokens)
    pruned = out.logits.double().log_softmax(-1)
    assert float((dense.exp() * (dense - pruned)).sum(-1).mean()) == pytest.approx(best["kl"], abs=1e-4)
    assert float(out.loss.exp()) == pytest.approx(best["perplexity"], rel=1e-4)


@pytest.mark.parametrize("drop", [False, True])
def test_any_built_plan_scores_what_the_engine_says(place: Place, done: Done, prepared: Prepared, drop: bool) -> None:
    if drop:
        config = SearchConfig.model_validate({**done.config.model_dump(), "drop_blocks": True, "rate": 0.4})
        prepared = prepare(config, prepared.loaded, place.folder / "cache", (), lambda _: None, lambda: False)
    tokens = prepared.tokens("fitness", range(4))
    plans = [*random_plans(prepared.space, 6), Plan(tuple(len(block.options) - 1 for block in prepared.space.blocks))]
    with torch.no_grad():
        dense = prepared.loaded.model(tokens).logits.double().log_softmax(-1)
        for plan, score in zip(plans, prepared.engine.evaluate(plans, tokens), strict=True):
            model = build(prepared.loaded.model, *pruned_tensors(prepared, plan))
            assert count_parameters(model) == model_parameters(prepared.arch) - prepared.space.removed(plan)
            out = model(tokens, labels=tokens)
            pruned = out.logits.double().log_softmax(-1)
            assert score.kl == pytest.approx(float((dense.exp() * (dense - pruned)).sum(-1).mean()), abs=1e-5, rel=1e-4)
            assert score.nll == pytest.approx(float(out.loss), abs=1e-5, rel=1e-4)


def test_plans_of_another_space_are_not_built(prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match="levels"):
        pruned_tensors(prepared, Plan((0, 0)))


# -- once more -------------------------------------------------------------------------------------------------------------
def test_running_it_again_repeats_nothing(place: Place, done: Done) -> None:
    before = (place.store.evaluations(done.job_id), place.store.events(done.job_id).data)
    manifest = (place.folder / "checkpoint" / "manifest.json").read_bytes()
    spent = {row.name: row for row in place.store.recorder(done.job_id).find_stages()}
    again, tasks = place.run(done.config, done.job_id)
    assert tasks["evaluate"] == 0
    assert (place.store.evaluations(done.job_id), place.store.events(done.job_id).data) == before
    assert (place.folder / "checkpoint" / "manifest.json").read_bytes() == manifest
    assert again.checkpoint["manifest_sha256"] == done.result.checkpoint["manifest_sha256"]
    now = {row["stage"]: row for row in again.report["stages"]}
    assert all(now[name]["tokens"] == row.tokens for name, row in spent.items() if name not in ("writing", "baseline"))
    assert sum(row["seconds"] for row in now.values()) == pytest.approx(
        sum(row.seconds for row in spent.values()) + again.report["seconds"], abs=0.5
    ), "what it took is added to what there is"
    same = (
        "best_plan",
        "plan",
        "evaluations",
        "plans",
        "operators",
        "texts",
        "model",
        "verification",
        "tokens",
        "rank_correlation",
    )
    assert {key: again.report[key] for key in same} == {key: done.result.report[key] for key in same}
    for name in ("dense", "uniform", "best"):
        assert again.report[name]["kl"] == done.result.report[name]["kl"]


def test_sessions_are_shared_by_searches_that_only_search_differently(place: Place, done: Done) -> None:
    cache = place.folder / "cache"
    session = session_of(done.config, cache)

    def other(**changes: Any) -> str:
        return session_of(config_of(place.model, place.text, **changes), cache).key

    assert other(generations=5, population=9, preset="default") == session.key
    assert session.cache == str(cache)
    for changes in ({"rate": 0.3}, {"criterion": "flap"}, {"attention": "none"}, {"seed": 1}, {"ffn_step": 16}, {"of": "model"}):
        assert other(**changes) != session.key


# -- bad requests ----------------------------------------------------------------------------------------------------------
def fails(place: Place, **changes: Any) -> SelfprunerError:
    config = config_of(changes.pop("model", place.model), place.text, **changes)
    with pytest.raises(SelfprunerError) as caught:
        place.run(config, place.job(config), "never")
    assert not (place.folder / "never").exists()
    assert not list(place.folder.glob(".tmp-*"))
    return caught.value


@pytest.mark.parametrize(
    ("field", "param"), [("calibration", "calibration"), ("fitness_text", "fitness_text"), ("report_text", "report_text")]
)
def test_a_text_shorter_than_asked_for(place: Place, field: str, param: str) -> None:
    short = place.folder / "short.txt"
    short.write_text("Too short to be cut.")
    error = fails(place, **{field: {"sources": [{"source": str(short)}], "sequences": 4, "length": 64}})
    assert isinstance(error, TextError)
    assert error.param == param
    assert "Give a longer text" in error.message


def test_an_empty_text(place: Place) -> None:
    empty = place.folder / "empty.txt"
    empty.write_text(" \n\n")
    error = fails(place, calibration={"sources": [{"source": str(empty)}], "sequences": 4, "length": 64})
    assert isinstance(error, TextError)
    assert error.param == "calibration"
    assert "is empty" in error.message


def test_a_text_that_is_not_there(place: Place) -> None:
    error = fails(place, report_text={"sources": [{"source": str(place.folder / "nowhere.txt")}], "sequences": 4, "length": 64})
    assert (error.param, error.code) == ("report_text", "text_unusable")


def test_a_fitness_text_too_short_for_the_stages(place: Place) -> None:
    # Found before the model is even looked for.
    error = fails(place, stages=[{"tokens": 64 * 55, "keep": 2}], model=place.folder / "no-model")
    assert isinstance(error, ConfigError)
    assert error.param == "fitness_text"


@pytest.mark.parametrize(
    "changes", [{"rate": 0.95}, {"rate": 0.5, "attention": "none", "ffn_step": 64}, {"rate": 0.9, "of": "model"}]
)
def test_a_rate_out_of_reach(place: Place, changes: dict[str, Any]) -> None:
    error = fails(place, **changes)
    assert isinstance(error, BudgetError)
    assert error.param == "rate"
    [failed] = place.store.jobs(limit=1).data
    assert place.store.recorder(failed.id).find_stages()[0].name == "loading", "what it took is kept"
    assert "can remove at most" in error.message


def test_a_step_wider_than_the_ffn(place: Place) -> None:
    assert fails(place, ffn_step=96).param == "ffn_step"


def test_an_unknown_proposer_fails_before_any_work(place: Place) -> None:
    config = config_of(place.model, place.text, preset="default", proposer="gpt")
    pool = Recording()

    async def go() -> None:
        try:
            await run_job(
                config,
                job_id="job_x",
                pool=pool,
                proposer_settings={"local": ProposerSettings()},
                recorder=place.store.recorder(place.job(config)),
                cache=place.folder / "cache",
                checkpoint_dir=place.folder / "never",
            )
        finally:
            await pool.close()

    with pytest.raises(UnknownNameError, match="Known: local") as caught:
        asyncio.run(go())
    assert caught.value.param == "proposer"
    assert not pool.tasks


def test_a_model_that_is_not_there(place: Place) -> None:
    error = fails(place, model=place.folder / "no-model")
    assert error.param == "model"


def test_an_unknown_task(place: Place, done: Done) -> None:
    session = session_of(done.config, place.folder)
    with pytest.raises(ConfigError, match=r"Unknown task 'train'. Known: begin, statistics, make, prepare, expect, evaluate"):
        perform(SessionHandler("cpu"), session, "train", {}, lambda _: None, lambda: False)
    with pytest.raises(ContractError, match=r"EvaluateRequest\.plans") as caught:
        perform(SessionHandler("cpu"), session, "evaluate", {"text": "fitness", "sequences": [0]}, lambda _: None, lambda: False)
    assert caught.value.param == "plans"


def test_the_worker_says_what_it_holds(place: Place, done: Done) -> None:
    handler = SessionHandler("cpu")
    session = session_of(done.config, place.folder / "cache")
    said: list[str] = []
    first = handler.handle(session, PrepareRequest(), said.append, lambda: False)
    assert any(text.startswith("reading factors") for text in said)
    assert first.model.family == "llama"
    said.clear()
    assert handler.handle(session, PrepareRequest(), said.append, lambda: False) == first
    assert not said, "what is held is not made again"
    held = handler._loaded
    assert held is not None
    other = session_of(config_of(place.model, place.text, criterion="flap", compensation="bias"), place.folder / "cache")
    handler.handle(other, PrepareRequest(), said.append, lambda: False)
    assert handler._loaded is held, "the model is shared by sessions"
    assert describe(held[1].model).layers == 4
