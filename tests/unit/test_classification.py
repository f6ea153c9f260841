"""Pruned models with the heads that transformers has for classification, read from a checkpoint of the causal model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.auto import AutoModelForSequenceClassification, AutoModelForTokenClassification

import selfpruner.export  # noqa: F401 - registers the classes
from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.testing.cut_models import folder, prune
from selfpruner.testing.tiny_models import tokens_of

FAMILIES = ("llama", *(family for family, form in MODELING_FILES.items() if form is not MODELING_FILES["llama"]))
LABELS = 3


# peft 0.21 still asks transformers 5.23 by names that it has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_and_tokens_are_classified(tmp_path: Path, family: str) -> None:
    pruned = prune(folder(tmp_path / "base", family)[1], drop=True, biased=True).pruned
    pruned.save_pretrained(tmp_path / "pruned")
    tokens = tokens_of(2, 12)
    tokens[1, 9:] = 0  # padding, which is not the last token of a text
    mask = (tokens != 0).long()
    hidden = pruned.base_model(tokens, attention_mask=mask).last_hidden_state

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned", num_labels=LABELS).eval()
    assert type(model) is MODELING_FILES[family].sequence_classification
    found = model(tokens, attention_mask=mask, labels=torch.tensor([0, 2]))
    expected = model.score(hidden[torch.arange(2), torch.tensor([11, 8])])
    torch.testing.assert_close(found.logits, expected)
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0, 2])))

    other = AutoModelForTokenClassification.from_pretrained(tmp_path / "pruned", num_labels=LABELS).eval()
    assert type(other) is MODELING_FILES[family].token_classification
    torch.testing.assert_close(other(tokens, attention_mask=mask).logits, other.score(hidden))

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "qkv_proj"], task_type="SEQ_CLS"))
    adapted(tokens, attention_mask=mask, labels=torch.tensor([0, 2])).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert any("score" in name for name in trained)
    assert any("lora" in name for name in trained)


def test_a_classifier_is_saved_and_read_again(tmp_path: Path) -> None:
    prune(folder(tmp_path / "base", "qwen2")[1], drop=True, biased=True).pruned.save_pretrained(tmp_path / "pruned")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned", num_labels=LABELS).eval()
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    assert again.config.num_labels == LABELS
    tokens = tokens_of(2, 12)
    with torch.inference_mode():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
