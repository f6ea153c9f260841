"""The simulation of searches at scale: more workers are never slower where work is split, and what cannot be split stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import scale
from selfpruner.config import SearchConfig

WORK = scale.work_of(SearchConfig(rate=0.2), own=0.6, survey=8.0)


@pytest.mark.parametrize("shape", scale.SHAPES, ids=lambda shape: shape.name)
def test_sizes_are_those_of_the_models(shape: scale.Shape) -> None:
    billions = float(shape.name.rpartition("-")[2].rstrip("B"))
    assert shape.weight_bytes / 2e9 == pytest.approx(billions, rel=0.02)


def test_what_is_split_takes_a_share_and_what_is_read_stays() -> None:
    small, large = scale.SHAPES[0], scale.SHAPES[1]
    one, eight = (scale.stages(scale.H100, small, WORK, workers) for workers in (1, 8))
    assert eight["orders and repairs"] < one["orders and repairs"] / 7
    assert one["surveys"] / 8 < eight["surveys"] < one["surveys"] / 4
    assert eight["export and proof"] == one["export and proof"]
    # Four sequences of a streamed model: every walk reads all its weights.
    streamed = [scale.stages(scale.H100, large, WORK, workers)["generations"] for workers in (1, 8, 64)]
    assert streamed[1] == streamed[2] >= WORK.generations * large.weight_bytes / scale.H100.host
    roomy = replace(scale.H100, room=float("inf"))
    assert scale.stages(roomy, large, WORK, 64)["generations"] < streamed[2] / 10


def test_the_page_has_every_model_and_number_of_gpus() -> None:
    page = scale.page(0.6, 8.0)
    for shape in scale.SHAPES:
        for workers in (1, 8, 64):
            assert f"| {shape.name} | {workers} |" in page
