"""A whole search by two worker processes finds what one worker finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfpruner import api
from selfpruner.jobs.lifecycle import JobResult
from selfpruner.store.store import Store
from selfpruner.testing.tiny_models import sample_text, tiny_model
from tests.helpers.small_jobs import RATE, config_of


def test_two_workers_find_what_one_finds(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(sample_text(30_000, seed=3))
    model = tiny_model(tmp_path / "model", "llama", layers=4, ffn=96)
    stages = [{"tokens": 1024, "keep": 3}, {"tokens": 1280, "keep": 2}]
    config = config_of(model, tmp_path / "text.txt", stages=stages, device="auto", generations=1)
    fields = config.model_dump(mode="json", exclude={"rate"}, exclude_unset=True)

    def search(name: str, devices: str | None) -> JobResult:
        return api.search(RATE, tmp_path / name, cache=tmp_path / "cache", devices=devices, progress=False, **fields)

    one, two = search("one", None), search("two", "cpu*2")
    assert two.report["best_plan"] == one.report["best_plan"]
    assert two.report["tokens"] == one.report["tokens"]
    assert two.report["best"]["kl"] == pytest.approx(one.report["best"]["kl"], rel=1e-5)
    workers = [{row["stage"]: row["workers"] for row in found.report["stages"]} for found in (one, two)]
    assert [(rows["loading"], rows["scoring"], rows["export"]) for rows in workers] == [(1, 1, 1), (2, 2, 1)]
    kls = []
    for name in ("one", "two"):
        with Store(tmp_path / name / "selfpruner.db") as store:
            job = store.jobs(limit=1).data[0]
            rows = store.evaluations(job.id)
            kls.append({(row.plan_hash, row.window): row.kl for row in rows if row.kind == "measured"})
            events = [event for event in store.events(job.id, limit=500).data if event.type == "search.split"]
            assert bool(events) == (name == "two")
            assert all(event.data["tasks"] >= 2 for event in events)
    assert kls[1] == pytest.approx(kls[0], rel=1e-5)
