"""A pruned model learns like any other: LoRA by peft, in the Trainer that trl's are made from; adapters are saved and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.models.auto import AutoModelForCausalLM

import selfpruner.export  # noqa: F401 - registers the classes
from selfpruner.testing.cut_models import folder, prune
from selfpruner.testing.tiny_models import sample_text, tiny_tokenizer, tokens_of

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH, STEPS = 32, 30


# peft 0.21 still asks transformers 5.23 by names that it has deprecated.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(tmp_path: Path, checkpointing: bool) -> None:
    pruned = prune(folder(tmp_path / "base", "qwen2", tied=False)[1], drop=True, biased=True).pruned
    pruned.save_pretrained(tmp_path / "pruned")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    # Three layers less the attention of the first and the FFN of the last.
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * (2 * 4 + 2 * 3)

    ids = torch.tensor(tiny_tokenizer()(sample_text(3000))["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path / "runs"),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            dataloader_pin_memory=False,
            gradient_checkpointing=checkpointing,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) <= 0.8 * sum(losses[:5])

    model.eval()
    tokens = tokens_of(2, 16)
    with torch.inference_mode():
        learnt = model(tokens).logits
        assert (learnt - pruned(tokens).logits).abs().max() > 0.1
        model.save_pretrained(tmp_path / "adapter")
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
        again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        assert torch.equal(again(tokens).logits, learnt)
        merged = again.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert type(loaded) is type(pruned)
        assert (loaded(tokens).logits - learnt).abs().max() <= 1e-4
