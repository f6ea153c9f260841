"""Continuations scored together are what each alone is: every family, own checkpoints, cut contexts, windows of attention."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from selfpruner.errors import CancelledTaskError, ModelError
from selfpruner.export.modeling_selfpruner import SelfPrunerConfig, SelfPrunerForCausalLM
from selfpruner.judging.likelihood import Likelihood, Question, likelihoods
from selfpruner.testing.tiny_models import FAMILIES, load_tiny, randomize


def questions(seed: int = 0, count: int = 12, longest: int = 40) -> list[Question]:
    rng = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(4, 128) for _ in range(length)]

    made = [
        Question(tokens(rng.randrange(1, longest)), [tokens(rng.randrange(1, 12)) for _ in range(rng.randrange(1, 6))])
        for _ in range(count)
    ]
    # As boolq has it: nothing but the context is in the row.
    return [*made, Question(tokens(9), [[5], [6]]), Question(tokens(1), [tokens(1)])]


@torch.no_grad()
def alone(model: PreTrainedModel, question: Question, longest: int = 512) -> list[Likelihood]:
    """Each continuation by a forward pass of its own, nothing padded, nothing shared."""
    found = []
    for continuation in question.continuations:
        whole = torch.tensor([*question.context, *continuation][-(longest + 1) :])
        logits = model(input_ids=whole[None, :-1]).logits[0, -len(continuation) :].log_softmax(-1)
        wanted = whole[-len(continuation) :, None]
        found.append(Likelihood(float(logits.gather(1, wanted).sum()), bool((logits.argmax(-1) == wanted[:, 0]).all())))
    return found


def check(model: PreTrainedModel, asked: list[Question], longest: int = 512, **options: object) -> None:
    found = likelihoods(model, asked, **options)  # type: ignore[arg-type]
    for question, scores in zip(asked, found, strict=True):
        expected = alone(model, question, longest)
        assert [score.logprob for score in scores] == pytest.approx([score.logprob for score in expected], abs=2e-4, rel=1e-5)
        assert [score.greedy for score in scores] == [score.greedy for score in expected]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
def test_each_is_what_it_is_alone(family: str, share: bool) -> None:
    check(load_tiny(family), questions(), share=share)


@pytest.mark.parametrize("tokens", [1, 30, 64, 4096])
def test_batches_change_nothing(tokens: int) -> None:
    check(load_tiny("llama"), questions(1), batch_tokens=tokens)
    check(load_tiny("llama"), questions(1), logit_bytes=128 * 4 * tokens)


def test_greedy_is_seen() -> None:
    model = load_tiny("llama")
    context = torch.arange(4, 20)[None]
    written = model.generate(context, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(context), eos_token_id=None)
    own = written[0, 16:].tolist()
    scores = likelihoods(model, [Question(context[0].tolist(), [own, [*own[:-1], own[-1] ^ 1], own[:1]])])[0]
    assert [score.greedy for score in scores] == [True, False, True]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_checkpoint_whose_layers_differ(implementation: str) -> None:
    config = SelfPrunerConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        o_proj_bias=True,
        down_proj_bias=True,
        tie_word_embeddings=True,
        per_layer_config={
            "0": {"num_attention_heads": 0, "num_key_value_heads": 0},
            "1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24},
            "2": {"intermediate_size": 0},
        },
        attn_implementation=implementation,
    )
    model = SelfPrunerForCausalLM(config)
    randomize(model, 3)
    model.train(False)
    check(model, questions(2))


def test_the_beginning_of_a_long_context_is_cut() -> None:
    check(load_tiny("qwen2"), questions(3), 20, max_length=20)


def test_a_sliding_window_is_kept_to() -> None:
    model = load_tiny("mistral", sliding_window=8)
    asked = questions(4)
    check(model, asked)
    wide = load_tiny("mistral")
    differ = [alone(model, question) != alone(wide, question) for question in asked]
    assert any(differ), "the case this test is about"


def test_what_is_no_number_is_refused() -> None:
    model = load_tiny("llama")
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        likelihoods(model, questions())


def test_progress_and_cancelling_between_batches() -> None:
    model, seen = load_tiny("llama"), list[tuple[int, int]]()
    likelihoods(model, questions(), batch_tokens=64, progress=lambda *step: seen.append(step))
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    answers = iter([False, True])
    with pytest.raises(CancelledTaskError):
        likelihoods(model, questions(), batch_tokens=64, cancelled=lambda: next(answers))
