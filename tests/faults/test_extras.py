"""What a job does beside its checkpoint may fail, and costs nothing then; and models with few positions make none of it fail."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from selfpruner import api
from selfpruner.cli import plots
from selfpruner.errors import OutOfMemoryError, WorkerError
from selfpruner.evaluation import speed
from selfpruner.export import checkpoint, formats
from selfpruner.jobs.lifecycle import JobResult
from selfpruner.jobs.live_view import account
from selfpruner.jobs.run import run_job
from selfpruner.judging import repetition
from selfpruner.progress import OnProgress
from selfpruner.store.store import Store
from selfpruner.testing.tiny_models import sample_text, tiny_model
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import EvaluateRequest, R, TaskRequest
from tests.helpers.small_jobs import Recording, config_of

ONE = {"generations": 0, "surveys": 0, "stages": [{"tokens": 64, "keep": 2}], "final_tokens": 64, "probe_tokens": 64}


class Failing(Recording):
    """A pool in which some kinds of tasks fail; ``report`` is scoring on the report's text."""

    def __init__(self, *kinds: str, error: Exception) -> None:
        super().__init__()
        self.kinds, self.error = kinds, error

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        reported = isinstance(request, EvaluateRequest) and request.text == "report"
        if request.kind in self.kinds or (reported and "report" in self.kinds):
            raise self.error
        return await super().run(session, request, on_progress)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an OPT of 64 positions and a text."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("opt")
    (folder / "text.txt").write_text(sample_text(30_000, seed=3))
    tiny_model(folder / "model", "opt", max_position_embeddings=64)
    return folder


def run(folder: Path, name: str, pool: Recording, **changes: Any) -> tuple[JobResult, Store, str]:
    config = config_of(folder / "model", folder / "text.txt", **{**ONE, **changes})
    store = Store(folder / f"{name}.db")
    job = store.create_job(config)[0].id

    async def go() -> JobResult:
        try:
            return await run_job(
                config,
                job_id=job,
                pool=pool,
                proposer_settings={},
                recorder=store.recorder(job),
                cache=folder / "cache",
                checkpoint_dir=folder / name,
            )
        finally:
            await pool.close()

    return asyncio.run(go()), store, job


def test_a_model_with_no_more_positions_than_the_texts_are_long(opt: Path) -> None:
    result, store, job = run(opt, "whole", Recording())
    report = result.report
    assert "missing" not in report
    for name in ("dense", "uniform", "best"):
        assert report[name]["decode_tps"] > 0
        assert report[name]["tokens"] == 8 * 64
    assert set(report["dense"]) >= {"repetition", "kl", "parameters"}
    assert formats.verify(result.checkpoint["path"])["verification"]["greedy"] in ("equal", "tied")
    assert not [event for event in store.events(job).data if event.level != "info"]
    store.close()


def test_writing_stays_within_the_positions(opt: Path) -> None:
    assert speed.fitting(512, 32, 512) == (480, 32)
    assert speed.fitting(100, 32, 512) == (100, 32)
    assert speed.fitting(512, 0, 512) == (512, 0)
    assert speed.fitting(32, 48, 64) == (32, 32)
    from selfpruner.models import load, resolve

    loaded = load(resolve(str(opt / "model"), opt / "cache"), "cpu", "float32")
    written = repetition.after_prompts(loaded.model, loaded.tokenizer, ["the of " * 60, "the"], 64)
    assert [len(tokens) for tokens in written] == [32, 32]


def test_a_benchmark_takes_a_prompt_that_fits(opt: Path) -> None:
    quick: dict[str, Any] = {"new_tokens": 4, "repetitions": 1, "device": "cpu", "dtype": "float32", "cache": opt / "cache"}
    report = api.benchmark([opt / "model"], **quick)
    assert report.settings.prompt_tokens == 60
    with pytest.raises(api.ConfigError, match="more than the 64 positions"):
        api.benchmark([opt / "model"], prompt_tokens=61, **quick)


@pytest.mark.parametrize(
    "error", [WorkerError("The device went away.", code="internal_error"), OutOfMemoryError("No room."), IndexError("index 66")]
)
def test_what_fails_beside_the_checkpoint_is_said_and_costs_nothing(opt: Path, error: Exception) -> None:
    name = type(error).__name__
    result, store, job = run(opt, name, Failing("measure", "baseline", "generate", "report", error=error))
    assert checkpoint.load(result.checkpoint["path"]).num_parameters() == result.checkpoint["parameters"]
    said = str(error)
    assert set(result.report["missing"]) == {"timing", "baseline", "scores", "generation_probe"}
    assert all(said in reason for reason in result.report["missing"].values())
    json.dumps(result.report, allow_nan=False)
    assert result.report["best"]["parameters"] == result.checkpoint["parameters"]
    warned = {event.key: event.message for event in store.events(job).data if event.level == "warn"}
    assert {"missing/timing", "missing/baseline", "missing/scores"} <= set(warned)
    assert all(said in message for message in warned.values())
    lines = [line for line in account(result.report) if line.startswith("Missing: ")]
    assert any(line.startswith("Missing: speed. ") and said in line for line in lines)
    store.close()


def test_a_picture_that_cannot_be_drawn_stops_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        raise KeyError("rates")

    assert plots.draw(broken, tmp_path / "a.svg") == "a.svg could not be drawn (KeyError: 'rates')."
