"""Every form of a pruned model through the whole product: text written by the model, a search, a verified checkpoint, streaming."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import AutoConfig

from selfpruner.architectures.cost import model_parameters
from selfpruner.config import SearchConfig
from selfpruner.evaluation.session import Prepared, prepare
from selfpruner.export import checkpoint
from selfpruner.export.build import build, count_parameters
from selfpruner.export.pruned import pruned_tensors, streamed_export
from selfpruner.files.card_info import CardInfo
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import run_job
from selfpruner.models import LoadedModel, checks, load, resolve, streaming
from selfpruner.planning.space import Plan
from selfpruner.store.store import Store
from selfpruner.testing.tiny_models import sample_text, tiny_model
from selfpruner.workers.thread_pool import InProcessPool
from tests.helpers.exports import OWN_FORMS
from tests.helpers.pruned import random_plans
from tests.helpers.small_jobs import TIGHT, config_of


def config_for(folder: Path, family: str, **changes: Any) -> SearchConfig:
    if not (folder / "model").exists():
        tiny_model(folder / "model", family, ffn=96)
        (folder / "text.txt").write_text(sample_text(30_000, seed=3))
    return config_of(folder / "model", folder / "text.txt", **{"drop_blocks": True, **changes})


def prepared_of(config: SearchConfig, folder: Path, loaded: LoadedModel | None = None) -> Prepared:
    loaded = loaded or load(resolve(str(folder / "model"), folder), "cpu", "float32")
    return prepare(config, loaded, folder / "cache", ["fitness"], lambda _: None, lambda: False)


def plans_of(prepared: Prepared) -> list[Plan]:
    """Random ones, and one that drops every other block."""
    last = [len(block.options) - 1 for block in prepared.space.blocks]
    return [*random_plans(prepared.space, 4), Plan(tuple(level * (index % 3 != 1) for index, level in enumerate(last)))]


@pytest.mark.parametrize("family", OWN_FORMS)
def test_a_whole_job(family: str, tmp_path: Path) -> None:
    written = {"sources": [{"source": "self"}], "sequences": 16, "length": 64}
    config = config_for(tmp_path, family, calibration=written, generations=1)

    async def run() -> Any:
        pool = InProcessPool(lambda: SessionHandler("cpu"))
        try:
            with Store(tmp_path / "db") as store:
                job, _ = store.create_job(config)
                store.transition(job.id, "running")
                return await run_job(
                    config,
                    job_id=job.id,
                    pool=pool,
                    proposer_settings={},
                    recorder=store.recorder(job.id),
                    cache=tmp_path / "cache",
                    checkpoint_dir=tmp_path / "checkpoint",
                )
        finally:
            await pool.close()

    report = asyncio.run(run()).report
    assert report["best"]["kl"] <= report["uniform"]["kl"]
    assert report["model"]["family"] == family
    model = checkpoint.load(tmp_path / "checkpoint")
    assert count_parameters(model) == report["best"]["parameters"] == report["dense"]["parameters"] - report["plan"]["removed"]
    prepared = prepared_of(config, tmp_path)
    (score,) = prepared.engine.evaluate([Plan(tuple(report["plan"]["levels"]))], prepared.tokens("report", range(8)))
    assert score.kl == pytest.approx(report["best"]["kl"], rel=1e-4)
    assert score.kl == pytest.approx(kl_of(prepared, model, prepared.tokens("report", range(8))), rel=1e-4, abs=1e-6)


@torch.inference_mode()
def kl_of(prepared: Prepared, model: Any, tokens: torch.Tensor) -> float:
    dense, pruned = (each(tokens).logits.double().log_softmax(-1) for each in (prepared.loaded.model, model))
    return float((dense.exp() * (dense - pruned)).sum(-1).mean())


@pytest.mark.parametrize("method", ["none", "bias", "least_squares"])
@pytest.mark.parametrize("family", OWN_FORMS)
def test_any_built_plan_scores_what_the_engine_says(family: str, method: str, tmp_path: Path) -> None:
    prepared = prepared_of(config_for(tmp_path, family, compensation=method, criterion="flap"), tmp_path)
    tokens = prepared.tokens("fitness", range(3))
    plans = plans_of(prepared)
    for plan, score in zip(plans, prepared.engine.evaluate(plans, tokens), strict=True):
        model = build(prepared.loaded.model, *pruned_tensors(prepared, plan))
        assert count_parameters(model) == model_parameters(prepared.arch) - prepared.space.removed(plan)
        assert score.kl == pytest.approx(kl_of(prepared, model, tokens), abs=1e-5, rel=1e-4)


@pytest.mark.parametrize("family", OWN_FORMS)
def test_a_streamed_model_scores_and_exports_the_same(family: str, tmp_path: Path) -> None:
    config = config_for(tmp_path, family)
    resident = prepared_of(config, tmp_path)
    source = resident.loaded.source
    files = checks.weight_files(source.folder)
    model = streaming.stream(AutoConfig.from_pretrained(source.folder), files, torch.device("cpu"), torch.float32, TIGHT)
    loaded = LoadedModel(model, resident.loaded.tokenizer, source, torch.float32, 64 << 20, True)
    streamed = prepared_of(config, tmp_path, loaded)
    assert streamed.arch.head_pieces() is not None
    plans, tokens = plans_of(resident), resident.tokens("fitness", range(3))
    for one, other in zip(scores(resident, plans, tokens), scores(streamed, plans, tokens), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    outline, tensors = streamed_export(streamed, plans[-1])
    card = CardInfo(base_model="tiny", rate=0.3, criterion="obs", compensation="least_squares")
    result = checkpoint.write(outline, loaded.tokenizer, None, tmp_path / "checkpoint", card, source=tensors)
    assert result.verification["streamed"]
    expected = build(resident.loaded.model, *pruned_tensors(resident, plans[-1]))
    with torch.inference_mode():
        found = checkpoint.load(tmp_path / "checkpoint")(tokens).logits
        torch.testing.assert_close(found, expected(tokens).logits, rtol=1e-3, atol=1e-3)


def scores(prepared: Prepared, plans: Sequence[Plan], tokens: torch.Tensor) -> list[float]:
    return [number for score in prepared.engine.evaluate(plans, tokens) for number in (score.kl, score.nll)]
