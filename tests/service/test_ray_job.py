"""A whole job on a Ray cluster of two nodes that loses one on the way, against the same job in this process.

`make test-ray` runs this; elsewhere there is no Ray.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed here: make test-ray")

from selfpruner.progress import OnProgress
from selfpruner.store.store import Store
from selfpruner.testing.tiny_models import sample_text, tiny_model
from selfpruner.workers.base import Session
from selfpruner.workers.ray_pool import RayConnection, RayPool
from selfpruner.workers.tasks import EvaluateRequest, R, TaskRequest
from tests.helpers.ray_cluster import cluster
from tests.helpers.small_jobs import Place, config_of

AT = 5  # the evaluation during which a node is lost


class Losing(RayPool):
    """Loses the node of the worker that has the job, in the middle of its work."""

    def __init__(self, made: Any) -> None:
        super().__init__(made.address)
        self.made = made
        self.evaluations = 0
        self.lost: int | None = None

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        work = asyncio.create_task(super().run(session, request, on_progress))
        if isinstance(request, EvaluateRequest):
            self.evaluations += 1
            if self.evaluations == AT:
                await asyncio.sleep(0.01)
                busy = next(slot for slot in self._slots if slot.busy)
                assert isinstance(busy.link, RayConnection)
                self.lost = busy.link.pid
                node = next(n for n in self.made.list_all_nodes() if n.node_id == self._places[busy.device].node)
                await asyncio.to_thread(self.made.remove_node, node)
        return await work


def test_a_job_that_loses_a_node_finds_the_same_plan(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text(30_000, seed=3))
    model = tiny_model(tmp_path / "model", "llama", layers=4, ffn=96)
    config = config_of(model, text)
    with Store(tmp_path / "one.sqlite3") as store:
        place = Place(tmp_path / "one", model, text, store)
        alone, _ = place.run(config, place.job(config))
    # The head has no core for workers, so that it is not the one that is lost.
    with cluster(3, head_cores=0) as made, Store(tmp_path / "two.sqlite3") as store:
        place = Place(tmp_path / "two", model, text, store)
        pool = Losing(made)
        assert len(pool.devices) == 2
        together, _ = place.run(config, place.job(config), inner=pool)
        assert pool.lost is not None
        assert [slot.gone for slot in pool._slots].count(True) == 1
    assert together.checkpoint["plan_hash"] == alone.checkpoint["plan_hash"]
    for name in ("dense", "uniform", "best"):
        for figure in ("kl", "perplexity"):
            assert together.report[name][figure] == pytest.approx(alone.report[name][figure], rel=1e-6, abs=1e-9)
