"""What an exported model must do in transformers, in every form it comes in: generate in batches through every cache, compute in
half precision, survive save and load, and learn.

The forms are pruned at random, differently in every layer. That a pruned model equals the masked dense one is
``tests/unit/test_export.py``'s subject.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM

import selfpruner.export  # noqa: F401 - registers the classes
from selfpruner.testing.cut_models import Case, folder, masked_dense, prune
from selfpruner.testing.device_suite import DeviceSuite
from selfpruner.testing.tiny_models import tokens_of

PAD, LENGTHS, NEW = 0, (5, 14, 9), 8


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def continued(model: Any, inputs: dict[str, Tensor], **how: object) -> list[list[int]]:
    """``NEW`` tokens for every row, never stopping early, so that the cache is used at every step."""
    out = model.generate(**inputs, min_new_tokens=NEW, max_new_tokens=NEW, **{"do_sample": False, **how})
    rows: list[list[int]] = out[:, inputs["input_ids"].shape[1] :].tolist()
    return rows


def loss_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens, labels=tokens, use_cache=False).loss  # type: ignore[no-any-return]


def gradients(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, tokens).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


class ExportedModelSuite(DeviceSuite):
    """Subclass it with ``family``, ``options`` of the tiny model, and what the pruning does besides cutting."""

    family: ClassVar[str]
    options: ClassVar[dict[str, object]] = {}
    drop: ClassVar[bool] = False  # the first layer's attention and the last layer's FFN are gone
    biased: ClassVar[bool] = False  # o_proj and down_proj have biases in some layers only
    tied: ClassVar[bool] = True

    @pytest.fixture
    def case(self, tmp_path: Path) -> Case:
        return prune(folder(tmp_path, self.family, tied=self.tied, **self.options)[1], drop=self.drop, biased=self.biased)

    @torch.inference_mode()
    def test_a_padded_batch_generates_what_each_prompt_does(self, case: Case) -> None:
        prompts = [tokens_of(1, length, seed=length) for length in LENGTHS]
        batch = left_padded(prompts)
        alone = [continued(case.pruned, left_padded([prompt]), use_cache=False)[0] for prompt in prompts]
        assert len({tuple(row) for row in alone}) > 1, "equal rows prove nothing"
        static = {"cache_implementation": "static", "disable_compile": True}
        for attention in ("sdpa", "eager"):
            case.pruned.set_attn_implementation(attention)
            for how in ({}, static, {"use_cache": False}):
                assert continued(case.pruned, batch, **how) == alone, (attention, how)
        # Beams reorder the cache.
        assert continued(case.pruned, batch, num_beams=3) == continued(case.pruned, batch, num_beams=3, use_cache=False)

    @torch.inference_mode()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_near(self, case: Case, dtype: torch.dtype) -> None:
        tokens = tokens_of(2, 24)
        expected = case.pruned(tokens, use_cache=False).logits
        # The dense model of transformers says what rounding does to a model of this kind.
        model: nn.Module = case.dense
        dense = model(tokens, use_cache=False).logits
        noise = (model.to(dtype)(tokens, use_cache=False).logits.float() - dense).abs().mean() / dense.abs().mean()
        half = case.pruned.to(dtype)
        found = half(tokens, use_cache=False).logits
        assert found.dtype == dtype
        error = (found.float() - expected).abs().mean() / expected.abs().mean()
        assert error <= 3 * noise
        held = half(tokens[:, :-1]).past_key_values
        assert {layer.keys.dtype for layer in held.layers} == {dtype}
        last = half(tokens[:, -1:], past_key_values=held).logits[:, -1].float()
        assert (last - found[:, -1].float()).abs().mean() <= 3 * noise * expected.abs().mean()

    @torch.inference_mode()
    def test_save_and_load_change_nothing(self, case: Case, tmp_path: Path) -> None:
        case.pruned.save_pretrained(tmp_path / "again")
        with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) != self.tied  # noqa: SIM118 - not a mapping
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
        again, report = loaded
        assert not any(report.values()), report
        assert type(again) is type(case.pruned)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == self.tied
        tokens = tokens_of(2, 16)
        expected = case.pruned(tokens)
        assert torch.equal(again(tokens).logits, expected.logits)
        config = AutoConfig.from_pretrained(tmp_path / "again")
        assert config.to_dict()["per_layer_config"] == case.pruned.config.to_dict()["per_layer_config"]
        states = AutoModel.from_pretrained(tmp_path / "again")(tokens).last_hidden_state
        assert torch.equal(again.lm_head(states), expected.logits)

    def test_gradients_are_those_of_the_masked_model(self, case: Case) -> None:
        tokens = tokens_of(2, 20)
        with masked_dense(case):
            expected = gradients(case.dense, tokens)
        found = gradients(case.pruned, tokens)
        whole = {name for name in found if name in expected and found[name].shape == expected[name].shape}
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= whole
        assert sum(name.endswith("layernorm.weight") for name in whole) == 6 - 2 * self.drop
        for name in whole:
            assert (found[name] - expected[name]).abs().max() <= 1e-4 * max(1.0, float(expected[name].abs().max())), name
        # A bias on the keys is the same for every position, and softmax takes it out again.
        assert all(grad.abs().sum() > 0 for name, grad in found.items() if not name.endswith("k_proj.bias"))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_gives_the_same_gradients(self, case: Case, reentrant: bool) -> None:
        tokens = tokens_of(2, 20)
        case.pruned.train()
        expected = gradients(case.pruned, tokens)
        runs = []
        counted = case.pruned.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
        case.pruned.activation_checkpointing_enable({"use_reentrant": reentrant})
        case.pruned.enable_input_require_grads()
        found = gradients(case.pruned, tokens)
        counted.remove()
        assert len(runs) == 2, "the layer was not computed again, so nothing was checkpointed"
        for name, grad in expected.items():
            assert torch.allclose(found[name], grad, rtol=1e-5, atol=1e-6), name
