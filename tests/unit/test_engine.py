"""The engine's scores are those of the masked transformers model, whatever else is in the batch and however it is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import pytest
import torch

from selfpruner.architectures import AttentionWeights, FfnWeights, describe
from selfpruner.compensation import COMPENSATIONS
from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation.engine import Engine, LevelCache, PassCount
from selfpruner.evaluation.known import KnownFinals
from selfpruner.evaluation.parallel import Lanes
from selfpruner.planning.space import Plan
from selfpruner.pruning.patterns import PrunableAttention
from selfpruner.testing.prepared_models import Ready, ready
from selfpruner.testing.tiny_models import load_tiny, outputs_of, tokens_of
from tests.helpers.pruned import inputs_of, kept_columns, masked, naive, random_plans

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2},
    "llama mha biased": {"kv_heads": 4, "attention_bias": True, "mlp_bias": True},
    "mistral mqa window": {"kv_heads": 1, "sliding_window": 9},
    "qwen2 untied": {"kv_heads": 2, "tied": False},
    "qwen3 wide heads": {"kv_heads": 2, "head_dim": 16},
    "opt": {},
    "gemma2": {"kv_heads": 1},
    "gemma3_text": {},
    "phi3": {"sliding_window": 9},
}


@pytest.fixture(scope="module")
def case() -> Ready:
    return ready(load_tiny("llama"))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return tokens_of(4, 20, seed=3)


# -- slicing equals masking ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", COMPENSATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_slicing_equals_masking(name: str, method: str, tokens: torch.Tensor) -> None:
    """Final hidden states and scores, for plans that take every attention option in turn and channels at random."""
    case = ready(load_tiny(name.split()[0], **MODELS[name]), method=method, drop="wide" in name)
    plans = random_plans(case.space, 3)
    for level in range(len(case.blocks[0].options)):
        plans.append(Plan((level, *plans[0].levels[1:])))
    dense, finals = case.engine._walk([plan.levels for plan in plans], tokens, lambda: False)
    scores = case.engine.evaluate(plans, tokens)
    for plan, final, score in zip(plans, finals, scores, strict=True):
        with masked(case, plan) as model:
            expected = model.model(tokens, use_cache=False).last_hidden_state
        found = case.arch.final_norm(final)
        assert float((found - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))
        kl, nll = naive(case, plan, tokens)
        assert score.kl == pytest.approx(kl, abs=1e-5, rel=1e-4)
        assert score.nll == pytest.approx(nll, abs=1e-5, rel=1e-4)
    assert float((dense - finals[0]).abs().max()) > 1e-2, "the cut must matter, or equality proves nothing"


@pytest.mark.parametrize("name", MODELS)
def test_block_errors_on_the_calibration_text(name: str) -> None:
    """What an option says it costs is what its weights do to the block's output: least squares <= bias <= nothing."""
    model = load_tiny(name.split()[0], **MODELS[name])
    cases = [ready(model, method=method, criterion="flap") for method in ("least_squares", "bias", "none")]
    for index in range(len(cases[0].blocks)):
        X = inputs_of(model, cases[0].calibration)[index // 2][index % 2].flatten(0, 1)
        module = outputs_of(model, index // 2)[index % 2]
        dense = module.weight.double()
        whole = float((X @ dense.T).pow(2).sum())
        measured: list[dict[Any, float]] = []
        for case in cases:
            of_case: dict[Any, float] = {}
            block = case.blocks[index]
            for level in range(1, len(block.options)):
                weights: Any = block.weights(level)
                plan = Plan(tuple(level if other == index else 0 for other in range(len(case.blocks))))
                kept = list(block.heads[level]) if isinstance(block, PrunableAttention) else None
                columns = (
                    kept_columns(case, plan, index)
                    if isinstance(block, PrunableAttention)
                    else list(range(block.options[level].channels))
                )
                W = weights.o if isinstance(weights, AttentionWeights) else weights.down
                bias = weights.o_bias if isinstance(weights, AttentionWeights) else weights.down_bias
                added = torch.zeros(1) if bias is None else bias - (0 if module.bias is None else module.bias)
                left = float((X @ dense.T - X[:, columns] @ W.double().T - added.double()).pow(2).sum()) / whole
                of_case[tuple(kept or [block.options[level].channels])] = left
                error = block.options[level].error
                if case.compensation == "least_squares":  # with what the ridge takes for the change of the weights that stay
                    assert left - 1e-4 <= error <= left + 0.05
                else:
                    assert error == pytest.approx(left, rel=1e-4, abs=1e-4)
            measured.append(of_case)
        for option in measured[0].keys() & measured[1].keys() & measured[2].keys():
            assert measured[0][option] <= measured[1][option] * 1.0001 + 1e-7
            assert measured[1][option] <= measured[2][option] * 1.0001 + 1e-7


def test_constant_channels_with_bias_leave_the_model_exactly_as_it_was(tokens: torch.Tensor) -> None:
    """FLAP's promise: what never moves is replaced by a constant. A channel is constant where gate and up see only biases."""
    model = load_tiny("llama", mlp_bias=True)
    for index, layer in enumerate(model.model.layers):
        still = torch.arange(64)[torch.randperm(64, generator=torch.Generator().manual_seed(index))[:16]]
        layer.mlp.gate_proj.weight[still] = 0
        layer.mlp.up_proj.weight[still] = 0
    for criterion in ("flap", "obs"):
        case = ready(model, criterion=criterion, method="bias" if criterion == "flap" else "least_squares")
        level = next(i for i, option in enumerate(case.blocks[1].options) if option.channels == 48)
        plan = Plan((0, level) * 3)
        (score,) = case.engine.evaluate([plan], tokens)
        # Least squares refits the others too, with a ridge: as good as equal, not exactly.
        assert abs(score.kl) <= (1e-7 if criterion == "flap" else 1e-4)
        if criterion == "flap":
            dense, (final,) = case.engine._walk([plan.levels], tokens, lambda: False)
            assert float((final - dense).abs().max()) <= 1e-5 * max(1.0, float(dense.abs().max()))


def test_dominated_attention_options_are_left_out() -> None:
    """Of the shapes a layer could take, those stay that no smaller one beats; the heads belong to the options that stayed."""
    for criterion in ("obs", "magnitude"):
        case = ready(load_tiny("llama", hidden=48, heads=12, kv_heads=4, head_dim=4), criterion=criterion)
        for block in case.blocks[::2]:
            assert isinstance(block, PrunableAttention)
            assert (block.options[0].kv_groups, block.options[0].heads_per_group) == (4, 3)
            for after, option in enumerate(block.options[1:], 1):
                assert option.parameters < block.options[after - 1].parameters
                assert option.error > block.options[after - 1].error
                assert len(block.heads[after]) == option.heads
                assert len({head // 3 for head in block.heads[after]}) == option.kv_groups
    shapes = {(option.kv_groups, option.heads_per_group) for block in case.blocks[::2] for option in block.options}
    assert len(shapes) > 4


# -- scores --------------------------------------------------------------------------------------------------------------
def test_the_dense_plan(case: Ready, tokens: torch.Tensor) -> None:
    (score,) = case.engine.evaluate([case.space.dense], tokens)
    assert score.kl == 0
    assert score.nll == pytest.approx(float(case.model(tokens, labels=tokens).loss), rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(score.nll))
    assert score.tokens == tokens.numel()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [64, 65, 150])
def test_sequences_longer_than_a_block_of_queries(name: str, length: int) -> None:
    model = load_tiny(name.split()[0], **MODELS[name])
    arch = describe(model)
    tokens = tokens_of(2, length)
    x, rope = arch.embed(tokens), arch.rope(length)
    for layer in range(arch.layers):
        x = arch.feed_forward(layer, arch.attend(layer, x, arch.attention(layer), rope), arch.ffn(layer))
    expected = model.model(tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(arch.final_norm(x), expected, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_company(case: Ready, tokens: torch.Tensor) -> None:
    plans = random_plans(case.space, 12)
    together = case.engine.evaluate(plans, tokens)
    for index in (0, 5, 11):
        (alone,) = case.engine.evaluate([plans[index]], tokens)
        few = case.engine.evaluate([plans[3], plans[index], case.space.dense], tokens)[1]
        for other in (alone, few):
            assert other.kl == pytest.approx(together[index].kl, abs=1e-5)
            assert other.nll == pytest.approx(together[index].nll, abs=1e-5)


def test_order_and_repetition(case: Ready, tokens: torch.Tensor) -> None:
    plans = random_plans(case.space, 5)
    engine = Engine(case.arch, case.blocks)
    forward = engine.evaluate(plans, tokens)
    once = engine.work
    mixed = engine.evaluate([plans[3], plans[3], plans[0], plans[3]], tokens)
    assert mixed[0] == mixed[1] == mixed[3]
    assert mixed[0].kl == pytest.approx(forward[3].kl, abs=1e-6)
    assert mixed[2].kl == pytest.approx(forward[0].kl, abs=1e-6)
    # Dense and two different plans: that is all that was walked.
    assert engine.work.passes_without_sharing - once.passes_without_sharing == 3 * len(case.blocks)


def test_no_plans_no_scores(case: Ready, tokens: torch.Tensor) -> None:
    assert case.engine.evaluate([], tokens) == []


def test_shared_prefixes_are_walked_once(case: Ready, tokens: torch.Tensor) -> None:
    engine = Engine(case.arch, case.blocks)
    plans = [Plan((0, 0, 0, 0, 0, 1)), Plan((0, 0, 0, 0, 0, 2)), Plan((0, 0, 0, 1, 0, 0)), Plan((0, 1, 0, 1, 0, 0))]
    engine.evaluate(plans, tokens)
    # Distinct prefixes after each of the six blocks, the dense model's among them:
    #   attention 0: {0} = 1        ffn 0: {0, 1} = 2       attention 1: 2
    #   ffn 1: {00 00, 00 01, 01 01} = 3    attention 2: 3    ffn 2: dense, .1, .2 of the first; one each of the others = 5
    assert engine.work == PassCount(1 + 2 + 2 + 3 + 3 + 5, 5 * 6)


@pytest.mark.parametrize("how", [{"stream_bytes": 1}, {"max_tokens": 1}, {"max_tokens": 40}, {"cache_bytes": 0}])
def test_chunking_changes_nothing(case: Ready, tokens: torch.Tensor, how: dict[str, int]) -> None:
    plans = random_plans(case.space, 6)
    expected = case.engine.evaluate(plans, tokens)
    for found, score in zip(Engine(case.arch, case.blocks, **how).evaluate(plans, tokens), expected, strict=True):
        assert found.kl == pytest.approx(score.kl, abs=1e-5)
        assert found.nll == pytest.approx(score.nll, abs=1e-5)
        assert found.tokens == score.tokens


@pytest.mark.parametrize("memory", [1, 1 << 16, 1 << 30])
def test_memory_changes_nothing(case: Ready, tokens: torch.Tensor, memory: int) -> None:
    plans = random_plans(case.space, 6)
    expected = case.engine.evaluate(plans, tokens)
    engine = Engine(case.arch, case.blocks, memory_bytes=memory)
    assert engine.stream_bytes + engine.logit_bytes + engine.cache.max_bytes <= memory
    for found, score in zip(engine.evaluate(plans, tokens), expected, strict=True):
        assert found.kl == pytest.approx(score.kl, abs=1e-5)


def test_a_window_is_the_mean_of_its_sequences(case: Ready, tokens: torch.Tensor) -> None:
    plans = random_plans(case.space, 2)
    whole = case.engine.evaluate(plans, tokens)
    parts = [case.engine.evaluate(plans, row[None]) for row in tokens]
    for index, score in enumerate(whole):
        assert score.kl == pytest.approx(sum(part[index].kl for part in parts) / len(parts), abs=1e-6)
        assert score.nll == pytest.approx(sum(part[index].nll for part in parts) / len(parts), abs=1e-5)


class Made:
    """A block whose levels are made by ``weights``."""

    def __init__(self, block: Any, weights: Callable[[int], Any]) -> None:
        self.weights, self.own_bytes = weights, block.own_bytes


def test_a_plan_that_breaks_down_spoils_no_other(tokens: torch.Tensor) -> None:
    case = ready(load_tiny("llama"))
    broken = case.blocks[3].weights(2)
    assert isinstance(broken, FfnWeights)
    good, bad = Plan((0, 1, 0, 1, 0, 1)), Plan((0, 1, 0, 2, 0, 1))
    (expected,) = case.engine.evaluate([good], tokens)
    case.engine.cache.get(
        3, 2, cast(Any, Made(case.blocks[3], lambda _: FfnWeights(broken.gate, broken.up, broken.down * math.nan)))
    )
    scores = case.engine.evaluate([bad, good], tokens)
    assert math.isnan(scores[0].kl)
    assert math.isnan(scores[0].nll)
    assert scores[1].kl == pytest.approx(expected.kl, abs=1e-6)


def test_dropped_blocks(tokens: torch.Tensor) -> None:
    case = ready(load_tiny("qwen2"), drop=True)
    last = tuple(len(block.options) - 1 for block in case.blocks)
    assert all(case.blocks[index].weights(level) is None for index, level in enumerate(last))
    plans = [Plan(last), Plan((0, last[1], 0, 0, last[4], 0))]
    for plan, score in zip(plans, case.engine.evaluate(plans, tokens), strict=True):
        kl, nll = naive(case, plan, tokens)
        assert score.kl == pytest.approx(kl, rel=1e-4)
        assert score.nll == pytest.approx(nll, rel=1e-4)
    dense, (empty,) = case.engine._walk([last], tokens, lambda: False)
    assert torch.equal(empty, case.arch.embed(tokens)), "without blocks the stream is the embedding"
    assert not torch.equal(empty, dense)


# -- stopping and remembering ----------------------------------------------------------------------------------------------
def test_cancelling(case: Ready, tokens: torch.Tensor) -> None:
    polls = 0

    def after(count: int) -> Any:
        def poll() -> bool:
            nonlocal polls
            polls += 1
            return polls > count

        return poll

    case.engine.evaluate(random_plans(case.space, 3), tokens, cancelled=after(10**9))
    needed, polls = polls, 0
    assert needed >= len(case.blocks) + 1
    for count in (0, 3, needed - 1):
        polls = 0
        with pytest.raises(CancelledTaskError):
            case.engine.evaluate(random_plans(case.space, 3), tokens, cancelled=after(count))
        assert polls == count + 1


def test_the_cache_of_levels_is_bounded(case: Ready) -> None:
    sizes = [
        w.down.numel() * 4 + case.arch.hidden * 4 for w in map(case.blocks[1].weights, range(1, 7)) if isinstance(w, FfnWeights)
    ]
    cache = LevelCache(sizes[0] + sizes[1])
    made: list[int] = []

    def make(level: int) -> Any:
        made.append(level)
        return case.blocks[1].weights(level)

    def walk(*levels: int) -> None:
        cache.next_walk()
        for level in levels:
            assert cache.get(1, level, cast(Any, Made(case.blocks[1], make))) is not None
            assert cache.bytes <= cache.max_bytes

    walk(1, 2, 3)
    assert made == [1, 2, 3]
    walk(1, 2, 3)
    assert made == [1, 2, 3, 3], "a walk does not push out what the next one begins with"
    walk(2, 3)
    walk(2, 3)
    assert made == [1, 2, 3, 3, 3], "what the last walk did not use made room"
    assert cache.bytes == sizes[1] + sizes[2]
    tight = LevelCache(0)
    assert tight.get(1, 1, case.blocks[1]) is not None
    assert tight.bytes == 0


def test_dense_levels_are_the_models_own_weights(case: Ready) -> None:
    cache = LevelCache(10**9)
    for index, block in enumerate(case.blocks):
        weights: Any = cache.get(index, 0, block)
        mine = weights.down if index % 2 else weights.o
        layer = case.model.model.layers[index // 2]
        own = layer.mlp.down_proj if index % 2 else layer.self_attn.o_proj
        assert mine.data_ptr() == own.weight.data_ptr()
    assert cache.bytes == 0


# -- lanes ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_streams_side_by_side_score_as_one_after_the_other() -> None:
    case = ready(load_tiny("llama"))
    plans, tokens = random_plans(case.space, 5), tokens_of(3, 24)
    engine = Engine(case.arch, case.blocks)
    assert engine.lanes.count == 2
    assert torch.get_num_threads() == 2, "who starts the lanes keeps its threads"
    side_by_side = engine.evaluate(plans, tokens)
    torch.set_num_threads(1)
    alone = Engine(case.arch, case.blocks)
    assert alone.lanes.count == 1
    for one, other in zip(side_by_side, alone.evaluate(plans, tokens), strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-4)
        assert one.nll == pytest.approx(other.nll, rel=1e-5)


def test_the_dense_model_is_walked_once_over_what_is_scored_exactly() -> None:
    case = ready(load_tiny("llama"))
    plans, tokens = random_plans(case.space, 2), tokens_of(3, 24)
    known = KnownFinals(tokens.numel() * case.arch.hidden * 4)
    first, then, third = (Engine(case.arch, case.blocks) for _ in range(3))
    first.known = then.known = known
    assert known.find(tokens) is None
    expected = first.evaluate(plans, tokens)
    assert then.evaluate(plans, tokens) == expected
    assert first.work.passes_without_sharing == 3 * len(case.blocks)
    assert then.work.passes_without_sharing == 2 * len(case.blocks)
    third.known = KnownFinals(0)
    assert third.evaluate(plans, tokens) == expected
    assert third.known.find(tokens) is None


@pytest.mark.usefixtures("two_threads")
def test_lanes_finish_what_they_have_before_they_raise() -> None:
    done: list[tuple[int, int, bool]] = []

    def task(number: int) -> None:
        if number == 0:
            raise ValueError("the first")
        done.append((number, torch.get_num_threads(), torch.is_grad_enabled()))

    with pytest.raises(ValueError, match="the first"):
        Lanes(torch.device("cpu")).run([partial(task, number) for number in range(6)])
    assert sorted(done) == [(number, 1, False) for number in range(1, 6)]
