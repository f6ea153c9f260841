"""Every family at sizes that are no power of two, in 32 and 16 bits, whole and streamed: what is written is what was pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.auto import AutoConfig

from selfpruner.evaluation.session import prepare
from selfpruner.export import checkpoint
from selfpruner.export.build import build
from selfpruner.export.formats import convert
from selfpruner.export.pruned import kept_units, pruned_tensors, streamed_export
from selfpruner.files.card_info import CardInfo
from selfpruner.models import LoadedModel, checks, load, resolve, streaming
from selfpruner.testing.tiny_models import FAMILIES, sample_text, tiny_model
from tests.helpers.pruned import random_plans
from tests.helpers.small_jobs import TIGHT, config_of

# Hidden sizes whose roots 16 bits round, odd numbers of heads, heads that do not share the hidden size out among them.
SIZES: dict[str, dict[str, int]] = {
    "five heads": {"hidden": 40, "heads": 5, "kv_heads": 5, "head_dim": 12, "ffn": 88},
    "three heads": {"hidden": 96, "heads": 3, "kv_heads": 1, "head_dim": 16, "ffn": 104},
}
CARD = CardInfo(base_model="tiny", rate=0.2, criterion="flap", compensation="least_squares_weights")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("verified_here")
def test_what_is_written_is_what_was_pruned(family: str, size: str, dtype: str, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", family, dtype=dtype, **SIZES[size])
    (tmp_path / "text.txt").write_text(sample_text(8_000, seed=3))
    config = config_of(
        tmp_path / "model", tmp_path / "text.txt", criterion="flap", compensation=CARD.compensation, dtype=dtype, drop_blocks=True
    )
    loaded = load(resolve(str(tmp_path / "model"), tmp_path), "cpu", dtype)
    prepared = prepare(config, loaded, tmp_path / "cache", [], lambda _: None, lambda: False)
    plan = random_plans(prepared.space, 1)[0]
    pruned = build(loaded.model, *pruned_tensors(prepared, plan))
    whole = checkpoint.write(pruned, loaded.tokenizer, None, tmp_path / "whole", CARD, units=kept_units(prepared, plan))
    assert whole.verification["dtype"] == dtype
    # The same files, the same device: nothing is left to differ but a buffer that one of the two computed otherwise.
    assert whole.verification["max_difference"] <= 1e-6 * whole.verification["max_logit"]
    masked = convert(tmp_path / "whole", tmp_path / "masked", "masked")
    assert masked.verification["dtype"] == dtype

    kind = getattr(torch, dtype)
    paths = checks.weight_files(tmp_path / "model")
    streamed = streaming.stream(AutoConfig.from_pretrained(tmp_path / "model"), paths, torch.device("cpu"), kind, TIGHT)
    held = LoadedModel(streamed, loaded.tokenizer, loaded.source, kind, 64 << 20, True)
    outline, tensors = streamed_export(prepare(config, held, tmp_path / "cache", [], lambda _: None, lambda: False), plan)
    streamed_result = checkpoint.write(outline, loaded.tokenizer, None, tmp_path / "streamed", CARD, source=tensors)
    assert streamed_result.verification["streamed"]
    assert streamed_result.verification["max_difference"] <= 1e-4 * streamed_result.verification["max_logit"]
