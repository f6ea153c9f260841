"""The real SmolLM2-135M end to end: what compensation and allocation are worth on unseen text. Minutes; `make test-slow`."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
from pathlib import Path

import pytest

from selfpruner.api import config_of
from selfpruner.config import SearchConfig
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import run_job
from selfpruner.records import Progress
from selfpruner.store.store import Store
from selfpruner.workers.thread_pool import InProcessPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    root = os.environ.get("SELFPRUNER_DATA")
    if not root:
        pytest.skip("needs real text: set SELFPRUNER_DATA to the folder that has wikitext2/")
    folder = tmp_path_factory.mktemp("texts")
    for name in ("train.head", "test"):
        shutil.copyfile(Path(root) / "wikitext2" / f"wiki.{name}.raw", folder / f"{name}.txt")
    train, test = ({"sources": [{"source": str(folder / f"{name}.txt")}]} for name in ("train.head", "test"))
    return config_of(
        {
            "rate": 0.2,
            "preset": "evolution",
            "calibration": {**train, "sequences": 32, "length": 512},
            "fitness_text": {**train, "sequences": 48, "length": 256},
            "report_text": {**test, "sequences": 12, "length": 512},
            "generations": 2,
            "final_tokens": 2048,
        }
    )


def test_found_beats_uniform_beats_flap(config: SearchConfig, tmp_path: Path) -> None:
    async def run() -> dict[str, object]:
        pool = InProcessPool(lambda: SessionHandler("cpu"))
        try:
            with Store(tmp_path / "db") as store:
                job, _ = store.create_job(config)
                store.transition(job.id, "running")
                places = {"cache": tmp_path / "cache", "checkpoint_dir": tmp_path / "checkpoint"}
                recorder = store.recorder(job.id)
                result = await run_job(config, job_id=job.id, pool=pool, proposer_settings={}, recorder=recorder, **places)
                recorder.progress(Progress(stage="done"))
                return result.report
        finally:
            await pool.close()

    report = json.loads(json.dumps(asyncio.run(run())))
    dense, flap, uniform, best = (report[name] for name in ("dense", "uniform_flap_bias", "uniform", "best"))
    assert math.isclose(dense["kl"], 0, abs_tol=1e-6)
    assert uniform["perplexity"] <= 0.75 * flap["perplexity"]
    assert best["kl"] <= 0.88 * uniform["kl"]
    assert best["perplexity"] <= 0.975 * uniform["perplexity"]
    for row in (uniform, best):
        removed = dense["parameters"] - row["parameters"]
        assert report["target"]["parameters_to_remove"] <= removed < report["target"]["parameters_to_remove"] + 3 * 576 * 64
    from selfpruner.export import checkpoint, formats

    model = checkpoint.load(tmp_path / "checkpoint")
    assert sum(p.numel() for p in model.parameters()) == best["parameters"]
    masked = formats.convert(tmp_path / "checkpoint", tmp_path / "masked", "masked").verification
    assert masked["class"] == "LlamaForCausalLM"
    assert masked["max_difference"] <= 1e-3
    assert masked["greedy"] == "equal"
