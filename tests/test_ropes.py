"""Every family with every kind of rotary table that transformers offers: built, and compared with the masked dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tests.tiny_models as tiny
from selfpruner import models
from selfpruner.config import SearchConfig
from selfpruner.errors import ExportError, ModelError
from selfpruner.evaluation.session import prepare
from tests.test_export import folder, greedy, masked_logits, prune, tokens_of

SHORT = 24  # the length that a table which stretches starts from
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SHORT},
    "longrope": {**FACTORS, "original_max_position_embeddings": SHORT},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": SHORT},
    "proportional": {"partial_rotary_factor": 0.5},
}
FAMILIES = tuple(family for family in tiny.FAMILIES if family != "opt")


def options_of(family: str, rope: str) -> dict[str, Any]:
    """Config fields that give a tiny model of ``family`` this rope."""
    parameters = {"rope_type": rope, "rope_theta": 10_000.0, **ROPES[rope]}
    if family == "gemma3_text":
        local = {"rope_type": "default" if rope == "default" else "linear", "rope_theta": 5_000.0, **ROPES["linear"]}
        kinds = ["sliding_attention", "full_attention"] * 2  # two layers of a kind, which differ
        return {"rope_parameters": {"full_attention": parameters, "sliding_attention": local}, "layers": 4, "layer_types": kinds}
    options: dict[str, Any] = {"rope_parameters": parameters}
    if family == "phi3" and rope == "longrope":
        options["original_max_position_embeddings"] = SHORT
    if rope == "dynamic":
        options["max_position_embeddings"] = SHORT
    return options


def test_all_kinds_are_tried() -> None:
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


CASES = [(family, rope) for family in FAMILIES for rope in ROPES if family != "phi3" or rope in ("default", "longrope")]


@pytest.mark.parametrize(("family", "rope"), CASES)
@torch.inference_mode()
def test_a_rope_that_stretches_still_does(tmp_path: Path, family: str, rope: str) -> None:
    """Short texts and long ones, and one that grows from the one to the other while it is written."""
    case = prune(folder(tmp_path, family, **options_of(family, rope))[1], drop=True, biased=True)
    for length in (20, 40):
        tokens = tokens_of(2, length)
        assert (case.pruned(tokens).logits - masked_logits(case, tokens)).abs().max() <= 1e-4
        # A long rope's keys stay in the cache as they were when a text grows long, pruned or not; Phi-3 alone reads it anew.
        if rope != "longrope" or family == "phi3" or length > SHORT:
            assert greedy(case.pruned, tokens) == greedy(case.pruned, tokens, use_cache=False)


@pytest.mark.parametrize("rope", sorted({*ROPES} - {"default", "longrope"}))
def test_what_phi_3_has_no_table_for_is_refused_when_it_is_loaded(tmp_path: Path, rope: str) -> None:
    source = tiny.tiny_model(tmp_path / "model", "phi3")
    body = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(body | options_of("phi3", rope)))
    with pytest.raises(ModelError, match="rope_parameters"):
        models.load(models.resolve(str(source), tmp_path), "cpu", "float32")


def test_a_config_that_no_pruned_model_can_have_is_refused_before_the_work(tmp_path: Path) -> None:
    source = tiny.tiny_model(tmp_path / "model", "llama", **options_of("llama", "longrope"))
    loaded = models.load(models.resolve(str(source), tmp_path), "cpu", "float32")
    loaded.model.config.rope_parameters["long_factor"] = [1.0, 2.0, 3.0]
    told: list[str] = []
    with pytest.raises(ExportError, match="long_factor must have 4 numbers, not 3"):
        prepare(SearchConfig(rate=0.2), loaded, tmp_path / "cache", ["fitness"], told.append, lambda: False)
    assert told == []
    assert not (tmp_path / "cache").exists()
