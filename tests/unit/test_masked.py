"""N:M and unstructured: levels in the engine, whole jobs, checkpoints, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import selfpruner
from selfpruner import api, criteria
from selfpruner.config import SearchConfig
from selfpruner.errors import ConfigError
from selfpruner.evaluation.session import Prepared, prepare
from selfpruner.export.build import build
from selfpruner.export.pruned import pruned_tensors, zeros
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import run_job
from selfpruner.models import load, resolve
from selfpruner.pruning.patterns import PrunableMasked
from selfpruner.pruning.patterns.masked import database_bytes, packed, unpacked
from selfpruner.pruning.patterns.n_m import NM
from selfpruner.store.store import Store
from selfpruner.testing.tiny_models import sample_text, tiny_model
from selfpruner.workers.thread_pool import InProcessPool
from tests.helpers.pruned import random_plans
from tests.helpers.small_jobs import config_of

MATRICES = [f"self_attn.{name}_proj.weight" for name in "qkvo"] + [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(sample_text(30_000))
    return file


def prepared_of(folder: Path, text: Path, family: str = "llama", **changes: Any) -> Prepared:
    model = folder / family
    if not model.exists():
        tiny_model(model, family)
    config = config_of(model, text, **changes)
    return prepare(
        config, load(resolve(str(model), folder), "cpu", "float32"), folder / "cache", ["fitness"], lambda _: None, lambda: False
    )


@pytest.mark.parametrize("compensation", ["none", "least_squares"])
@pytest.mark.parametrize(("pattern", "criterion"), [("n_m", "wanda"), ("unstructured", "gblm"), ("n_m", "sparsegpt")])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gemma2", "phi3"])
def test_the_engine_scores_what_is_exported(
    family: str, pattern: str, criterion: str, compensation: str, tmp_path: Path, text: Path
) -> None:
    """Plans of all levels, whose children share their first blocks: each one's KL is that of the model built from its tensors."""
    prepared = prepared_of(tmp_path, text, family, pattern=pattern, criterion=criterion, compensation=compensation, rate=0.4)
    tokens = prepared.tokens("fitness", [0, 1])
    plans = random_plans(prepared.space, 4)
    scores = prepared.engine.evaluate(plans, tokens)
    dense = prepared.loaded.model
    with torch.no_grad():
        reference = dense(tokens).logits.log_softmax(-1)
        for plan, score in zip(plans, scores, strict=True):
            model = build(dense, *pruned_tensors(prepared, plan))
            found = model(tokens).logits.log_softmax(-1)
            assert score.kl == pytest.approx(float((reference.exp() * (reference - found)).sum(-1).mean()), rel=1e-3, abs=1e-6)
            # A channel or an input that is never there has no weights to speak of, whatever the level; otherwise it is exact.
            assert zeros(prepared, plan) >= prepared.space.removed(plan)
    uniform = prepared.space.project([0.4] * prepared.space.layers)
    again = prepared.engine.evaluate([uniform, plans[0]], tokens)
    assert again[1].kl == pytest.approx(scores[0].kl, rel=1e-4), "levels from the cache are the same"


def test_levels_are_worse_the_thinner_and_better_repaired(tmp_path: Path, text: Path) -> None:
    plain = prepared_of(tmp_path, text, pattern="unstructured", criterion="ria", compensation="none")
    errors = [[option.error for option in block.options] for block in plain.space.blocks]
    assert all(one[0] == 0 and sorted(one) == one for one in errors)
    fixed = prepared_of(tmp_path, text, pattern="unstructured", criterion="ria", compensation="least_squares")
    for before, block in zip(errors, fixed.space.blocks, strict=True):
        after = [option.error for option in block.options]
        assert sum(after) < sum(before)
    sizes = [[option.parameters for option in block.options] for block in fixed.space.blocks]
    assert sizes == [[option.parameters for option in block.options] for block in plain.space.blocks]


def test_two_four_everywhere_is_a_rate_of_a_half(tmp_path: Path, text: Path) -> None:
    prepared = prepared_of(tmp_path, text, pattern="n_m", criterion="magnitude", compensation="none", rate=0.5)
    plan = prepared.space.project([0.5] * prepared.space.layers)
    assert set(plan.levels) == {2}
    assert prepared.space.removed(plan) == prepared.space.target
    for name, tensor in pruned_tensors(prepared, plan)[1].items():
        assert bool(((tensor.view(len(tensor), -1, 4) != 0).sum(-1) <= 2).all()), name


def test_the_database_is_read_and_not_made_again(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared_of(tmp_path, text, pattern="n_m", criterion="wanda", compensation="least_squares")
    files = sorted((tmp_path / "cache" / "levels").rglob("*.safetensors"))
    assert len(files) == first.arch.layers
    foreseen = database_bytes(first.arch, NM(first.config, first.arch).levels(), repaired=True)
    assert foreseen == pytest.approx(sum(file.stat().st_size for file in files), rel=0.1)
    monkeypatch.setattr("selfpruner.pruning.patterns.masked.write_levels", None)
    second = prepared_of(tmp_path, text, pattern="n_m", criterion="wanda", compensation="least_squares")
    assert second.space == first.space
    assert second.signals == first.signals
    block = second.engine.blocks[1]
    assert isinstance(block, PrunableMasked)


@pytest.mark.parametrize(
    ("pattern", "criterion", "compensation", "rate"),
    [
        ("unstructured", "sparsegpt", "none", 0.5),
        ("unstructured", "wanda", "least_squares", 0.33),
        ("n_m", "magnitude", "none", 0.5),
        ("n_m", "sparsegpt", "least_squares", 0.4),
    ],
)
def test_one_plan_makes_only_its_own_levels(
    pattern: str, criterion: str, compensation: str, rate: float, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same checkpoint as from a database of all levels, from as few masks as it has matrices (of two plans: a criterion that
    counts by rows keeps a little more than foreseen)."""
    made: list[str] = []
    create = criteria.create

    class Counting:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def masks(self, matrix: Any, levels: Any) -> Any:
            for mask in self.inner.masks(matrix, levels):
                made.append(matrix.name)
                yield mask

    monkeypatch.setattr(criteria, "create", lambda *names: Counting(create(*names)))
    monkeypatch.setattr("selfpruner.pruning.patterns.zeros.WeightCriterion", object)
    model = tiny_model(tmp_path / "model", "llama")
    fields = {"pattern": pattern, "criterion": criterion, "compensation": compensation}
    config = config_of(model, text, rate=rate, **fields).model_dump(exclude={"rate", "rates", "preset"})
    one = api.prune(tmp_path / "one", rate=rate, cache=tmp_path / "one-cache", **config)
    matrices = 3 * 7
    assert len(made) <= (matrices if criterion != "wanda" else 2 * matrices)
    left = [path.name for part in ("levels", "used") for path in (tmp_path / "one-cache" / part).iterdir()]
    assert not [name for name in left if "plan-" in name or name.startswith("levels-")], "what is cheap to make again is not kept"
    made.clear()

    config_all = config_of(model, text, rate=rate, **fields)
    loaded = load(resolve(str(model), tmp_path), "cpu", "float32")
    whole = prepare(config_all, loaded, tmp_path / "cache", [], lambda _: None, lambda: False)
    assert len(made) == matrices * (len(whole.space.blocks[1].options) - 1)
    made.clear()
    two = api.prune(tmp_path / "two", rate=rate, cache=tmp_path / "cache", **config)
    assert not made, "the database of all levels serves a plan too"
    assert whole.space.meets_budget(one.plan)
    assert one.plan == two.plan
    found = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_masks_survive_their_packing() -> None:
    mask = torch.rand(5, 37, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(unpacked(packed(mask), 37), mask)


@pytest.mark.parametrize("pattern", ["n_m", "unstructured"])
def test_a_whole_job(pattern: str, tmp_path: Path, text: Path) -> None:
    model = tiny_model(tmp_path / "llama", "llama")
    config = config_of(model, text, pattern=pattern, rate=0.5, sparsity_step=0.1)
    assert config.criterion == "sparsegpt"

    async def run() -> Any:
        pool = InProcessPool(lambda: SessionHandler("cpu"))
        try:
            with Store(tmp_path / "db") as store:
                job, _ = store.create_job(config)
                store.transition(job.id, "running")
                result = await run_job(
                    config,
                    job_id=job.id,
                    pool=pool,
                    proposer_settings={},
                    recorder=store.recorder(job.id),
                    cache=tmp_path / "cache",
                    checkpoint_dir=tmp_path / "checkpoint",
                )
                return result, {event.type: event.message for event in store.events(job.id).data}
        finally:
            await pool.close()

    result, told = asyncio.run(run())
    report = result.report
    assert report["best"]["kl"] <= report["uniform_magnitude"]["kl"]
    assert report["best"]["parameters"] == report["dense"]["parameters"] - report["plan"]["removed"]
    assert report["plan"]["removed"] >= report["target"]["parameters_to_remove"]
    plan = json.loads((tmp_path / "checkpoint" / "plan.json").read_text())
    assert plan["pattern"] == pattern
    assert plan["nonzeros"] == report["best"]["parameters"]
    # One count everywhere, without the zeros.
    assert result.checkpoint["parameters"] == report["best"]["parameters"]
    assert f"{report['best']['parameters']:,} parameters" in told["checkpoint.exported"]
    scored = api.evaluate(tmp_path / "checkpoint", text=[str(text)], sequences=2, length=16, device="cpu", cache=tmp_path / "cache")
    assert scored.parameters == report["best"]["parameters"]
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    matrices: list[Tensor] = [tensor for name, tensor in tensors.items() if name.endswith(tuple(MATRICES))]
    gone = sum(int((tensor == 0).sum()) for tensor in matrices)
    assert gone >= report["plan"]["removed"]
    assert "are zero" in (tmp_path / "checkpoint" / "README.md").read_text()
    model = selfpruner.load(tmp_path / "checkpoint")
    assert sum(p.numel() for p in model.parameters()) == report["dense"]["parameters"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pattern": "n_m", "criterion": "obs"}, "not n_m. For n_m choose"),
        ({"pattern": "structured", "criterion": "ria"}, "not structured"),
        ({"pattern": "unstructured", "criterion": "eggs"}, "not unstructured"),
        ({"pattern": "n_m", "compensation": "bias"}, "whole units"),
        ({"pattern": "n_m", "objective": "quality,latency"}, "latency does not change"),
        ({"pattern": "unstructured", "of": "model"}, "leave out of"),
        ({"pattern": "n_m", "group": 1}, "group"),
        ({"pattern": "unstructured", "sparsity_step": 0.9}, "sparsity_step"),
        ({"pattern": "checkered"}, "checkered"),
    ],
)
def test_requests_that_can_never_work(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        api.config_of({"rate": 0.3, **changes})


def test_a_group_that_does_not_divide_the_model(tmp_path: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match="do not divide") as caught:
        prepared_of(tmp_path, text, pattern="n_m", criterion="magnitude", compensation="none", group=7)
    assert caught.value.param == "group"


def test_a_database_beyond_its_limit_is_refused_before_it_is_made(tmp_path: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match="level_bytes allows 1,000") as caught:
        prepared_of(tmp_path, text, pattern="unstructured", criterion="ria", level_bytes=1000)
    assert caught.value.param == "level_bytes"
    assert not (tmp_path / "cache" / "levels").exists()


def test_equal_requests_share_a_session_and_others_do_not() -> None:
    from selfpruner.jobs.run import session_of

    def key(**changes: Any) -> str:
        return session_of(SearchConfig(rate=0.5, pattern="n_m", **changes), Path("cache")).key

    assert key() == key(generations=3)
    assert len({key(), key(group=8), key(criterion="ria"), key(compensation="none")}) == 4
