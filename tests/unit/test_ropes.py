"""Every family with every kind of rotary table that transformers offers: built, and compared with the masked dense model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import selfpruner.testing.tiny_models as tiny
from selfpruner import models
from selfpruner.config import SearchConfig
from selfpruner.errors import ExportError, ModelError
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import session_of
from selfpruner.testing.cut_models import folder, prune
from selfpruner.testing.tiny_models import tokens_of
from selfpruner.workers.tasks import PrepareRequest
from tests.helpers.exports import greedy, masked_logits
from tests.helpers.ropes import CASES, ROPES, SHORT, options_of


def test_all_kinds_are_tried() -> None:
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


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
    body = json.loads((source / "config.json").read_text())
    body["rope_parameters"]["long_factor"] = [1.0, 2.0, 3.0]
    (source / "config.json").write_text(json.dumps(body))
    session = session_of(SearchConfig(model=str(source), rate=0.2, device="cpu"), tmp_path / "cache")
    told: list[str] = []
    with pytest.raises(ExportError, match="long_factor must have 4 numbers, not 3"):
        SessionHandler("cpu").handle(session, PrepareRequest(texts=("fitness",)), told.append, lambda: False)
    assert told == [f"loading {source}"]
    assert not (tmp_path / "cache").exists()
