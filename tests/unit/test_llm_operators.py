"""LLM operators and their channel against the scripted server: outcomes, repair, caps, failures in a row, replay."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from selfpruner.config import LlmLimits
from selfpruner.errors import ConflictError, ProposerError
from selfpruner.operators.llm import Crossover, Initialize
from selfpruner.operators.plan_format import PlanFormat
from selfpruner.operators.prompt_facts import score
from selfpruner.planning.space import Plan
from selfpruner.proposers.base import OUTCOMES
from selfpruner.proposers.llm_calls import FAILURES_IN_A_ROW, MAX_TEMPERATURE
from tests.helpers.fake_openai import FakeOpenAI
from tests.helpers.llm_lab import KEY, OPERATORS, Lab, Memory, candidates, context, space


# -- what a good reply becomes -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("name", ["initialize", "crossover", "mutate"])
def test_offspring_are_new_legal_and_know_their_parents(fake_openai: FakeOpenAI, name: str, granularity: str) -> None:
    lab, on = Lab(fake_openai), context(space(granularity, layers=8))
    children = lab.propose(name, 6, on)
    assert len(children) == 6
    assert len({child.plan.hash for child in children} - on.seen) == 6
    for child in children:
        on.space.check(child.plan)
        assert on.space.meets_budget(child.plan)
        assert child.operator == name
        assert len(child.parents) == {"initialize": 0, "crossover": 2, "mutate": 1}[name]
        assert set(child.parents) <= {candidate.plan_hash for candidate in on.population}
    assert lab.memory.outcomes == ["ok", "ok"], "six plans, four a call"
    items = [r["response_format"]["json_schema"]["schema"]["properties"]["plans"]["items"] for r in fake_openai.requests]
    if name == "mutate":
        items = [item["properties"]["changes"]["items"] for item in items]
        assert [item["required"] for item in items] == [
            ["layer", "block", "rate"] if granularity == "block" else ["layer", "rate"]
        ] * 2
    else:
        assert [len(item["required"]) for item in items] == [2 if granularity == "block" else 1] * 2


def test_plans_are_read_as_written() -> None:
    of = space()
    plans = PlanFormat(of)
    assert plans.keys == ["attention", "ffn"]
    for candidate in candidates(of, 5):
        rates = plans.read(json.loads(plans.write(of.rates(Plan(candidate.levels)))))
        assert rates == pytest.approx(of.rates(Plan(candidate.levels)), abs=0.0051)
        assert of.project(plans.near_target(rates)).hash == candidate.plan_hash
    assert PlanFormat(space(attention=False)).keys == ["ffn"]
    assert PlanFormat(space("layer")).keys == ["rates"]


def test_too_high_rates_are_scaled_so_that_zero_stays_zero(fake_openai: FakeOpenAI) -> None:
    fake_openai.script('{"plans": [{"attention": [0, 0, 0, 0], "ffn": [0, 80, 80, 80]}], "why": "ignored"}')
    lab = Lab(fake_openai)
    operator = Initialize(lab.channel)
    (child,) = lab.propose("initialize", 1, operator=operator)
    rates = space().rates(child.plan)
    assert rates[0] == rates[1] == 0
    assert max(rates[3::2]) - min(rates[3::2]) < 0.1
    assert "average 42" in operator.refused[0].reason


def test_chosen_parents_come_first(fake_openai: FakeOpenAI) -> None:
    on = context()
    last_two = (on.history[3], on.history[4])
    for name, count in (("crossover", 2), ("mutate", 2)):
        children = Lab(fake_openai).propose(name, count, replace(on, parents=[last_two]))
        assert {parent for child in children for parent in child.parents} == {candidate.plan_hash for candidate in last_two}


def test_without_candidates_there_is_nothing_to_ask(fake_openai: FakeOpenAI) -> None:
    for name in ("crossover", "mutate", "select"):
        assert Lab(fake_openai).propose(name, 2, context(population=())) == []
    assert not fake_openai.requests


def test_select_returns_pairs_of_the_population(fake_openai: FakeOpenAI) -> None:
    on = context()
    pairs = Lab(fake_openai).propose("select", 3, on)
    assert len(pairs) == 3
    assert all(first in on.population and second in on.population and first is not second for first, second in pairs)


@pytest.mark.parametrize("reply", ['{"pairs": [[1, 1]]}', '{"pairs": [[1, 99], [0, 2]]}', '{"pairs": [["1", 2]]}', '{"pairs": []}'])
def test_select_refuses_pairs_that_are_none(fake_openai: FakeOpenAI, reply: str) -> None:
    fake_openai.script(reply)
    lab = Lab(fake_openai)
    assert len(lab.propose("select", 1)) == 1
    assert lab.memory.outcomes == ["invalid", "repaired"]


def test_a_stuck_search_asks_warmer(fake_openai: FakeOpenAI) -> None:
    for stale in (0, 3, 99, 0):
        Lab(fake_openai, temperature=0.5).propose("crossover", 1, context(stale_generations=stale))
    assert [request["temperature"] for request in fake_openai.requests] == pytest.approx([0.5, 0.8, MAX_TEMPERATURE, 0.5])


def test_a_temperature_above_the_bound_is_the_operators_own_choice(fake_openai: FakeOpenAI) -> None:
    for stale in (0, 9):
        Lab(fake_openai, temperature=1.8).propose("crossover", 1, context(stale_generations=stale))
    assert [request["temperature"] for request in fake_openai.requests] == [1.8, 1.8]


# -- outcomes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", ["fenced", "thinking", "in_prose", "good"])
def test_wrapped_json_is_found(fake_openai: FakeOpenAI, step: str) -> None:
    fake_openai.script(step)
    lab = Lab(fake_openai)
    assert lab.propose("mutate", 2)
    assert lab.memory.outcomes == ["ok"]


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ("prose", "not_json"),
        ("nested", "not_json"),
        ("wrong_length", "invalid"),
        ("out_of_range", "invalid"),
        ("nan", "invalid"),
        ("overflow", "invalid"),
        ("{}", "invalid"),
    ],
)
def test_bad_answers_get_one_repair_turn(fake_openai: FakeOpenAI, step: str, code: str) -> None:
    fake_openai.script(step, "good", then=step)
    lab = Lab(fake_openai)
    assert len(lab.propose("crossover", 2)) == 2
    with pytest.raises(ProposerError) as caught:
        lab.propose("crossover", 2)
    assert caught.value.code == code
    assert lab.memory.outcomes == [code, "repaired", code, code]
    first, second = (request["messages"] for request in fake_openai.requests[:2])
    assert second[0] == first[0]
    assert second[1]["content"].startswith(first[1]["content"])
    bad = lab.memory.calls[1]
    assert json.dumps(bad.reply[:40])[1:-1].replace("<", "\\u003c") in second[1]["content"]
    assert json.dumps(bad.detail)[1:-1] in second[1]["content"]


@pytest.mark.parametrize(
    ("step", "code"),
    [("empty", "empty"), ("truncated", "truncated"), ("refusal", "refused"), ("huge", "too_large"), ("500", "server_error")],
)
def test_other_failures_are_recorded_and_not_repaired(fake_openai: FakeOpenAI, step: str, code: str) -> None:
    fake_openai.script(then=step)
    lab = Lab(fake_openai)
    with pytest.raises(ProposerError) as caught:
        lab.propose("mutate", 2)
    assert caught.value.code == code
    assert lab.memory.outcomes == [code]
    call = lab.memory.calls[1]
    assert call.detail == caught.value.message
    assert (call.operator, call.generation, call.proposer) == ("mutate", 1, "fake")
    assert set(lab.memory.outcomes) <= set(OUTCOMES)


def test_known_plans_are_no_new_plan_and_noted_for_the_next_prompt(fake_openai: FakeOpenAI) -> None:
    on = context()
    known = PlanFormat(on.space).write(on.space.rates(Plan(on.history[0].levels)))
    fake_openai.script(f'{{"plans": [{known}, {known}]}}')
    lab = Lab(fake_openai)
    operator = Crossover(lab.channel)
    with pytest.raises(ProposerError) as caught:
        lab.propose("crossover", 2, on, operator)
    assert caught.value.code == "no_new_plan"
    assert lab.memory.outcomes == ["no_new_plan"]
    assert lab.channel.refused == {"known": 2}
    assert lab.propose("crossover", 2, on, operator)
    assert "known already (score 90)" in fake_openai.requests[1]["messages"][1]["content"]


def test_one_good_plan_in_a_reply_is_enough(fake_openai: FakeOpenAI) -> None:
    fake_openai.script(
        '{"plans": [{"attention": [1], "ffn": []}, {"attention": [0, 0, 50, 0], "ffn": [10, 30, 20, 20]}, {"ffn": "DROP TABLE"}]}'
    )
    lab = Lab(fake_openai)
    operator = Crossover(lab.channel)
    on = context()
    (child,) = lab.propose("crossover", 3, on, operator)
    assert len(child.parents) == 2
    assert lab.memory.outcomes == ["ok"]
    assert any("plans.0" in note.reason for note in operator.refused)
    assert not any("DROP" in note.reason for note in operator.refused)


def test_a_later_failure_does_not_lose_earlier_plans(fake_openai: FakeOpenAI) -> None:
    fake_openai.script("good", "500")
    lab = Lab(fake_openai, plans_per_call=1)
    assert len(lab.propose("crossover", 3)) == 2
    assert lab.memory.outcomes == ["ok", "server_error", "ok"]


# -- three in a row, caps ----------------------------------------------------------------------------------------------
def test_after_three_failures_in_a_row_the_generation_goes_on_without(fake_openai: FakeOpenAI) -> None:
    fake_openai.script("500", "500", "good", then="500")
    lab = Lab(fake_openai)
    assert len(lab.propose("crossover", 12)) == 4, "two failures, then a success: not in a row"
    assert lab.channel.open
    with pytest.raises(ProposerError):
        lab.propose("crossover", 40)
    assert not lab.channel.open
    calls = 3 + FAILURES_IN_A_ROW
    assert len(fake_openai.requests) == calls
    with pytest.raises(ProposerError, match="left out"):
        asyncio.run(lab.channel.ask("mutate", 1, {}, {}, lambda reply: reply))
    assert lab.propose("crossover", 2) == []
    assert len(fake_openai.requests) == calls
    (event,) = lab.memory.events.items()
    assert event[0] == "llm-left-out-1"
    assert event[1][:2] == ("llm.left_out", "warn")

    lab.channel.new_generation(2)
    assert lab.channel.open
    fake_openai.script()
    assert lab.propose("crossover", 2, replace(context(), generation=2))


@pytest.mark.parametrize(
    ("limits", "prices", "calls"),
    [
        (LlmLimits(calls=2), {}, 2),
        (LlmLimits(calls=0), {}, 0),
        (LlmLimits(tokens=1), {}, 1),
        (LlmLimits(cost=0.001), {"price_prompt": 1e6}, 1),
        (LlmLimits(cost=0), {"price_completion": 1e-9}, 0),
        (LlmLimits(cost=0), {}, 5),
    ],
)
def test_caps_are_passed_by_no_more_than_the_call_in_flight(
    fake_openai: FakeOpenAI, limits: LlmLimits, prices: dict[str, float], calls: int
) -> None:
    lab = Lab(fake_openai, limits=limits, plans_per_call=1, **prices)
    lab.propose("mutate", 5)
    assert len(fake_openai.requests) == calls == lab.channel.calls
    lab.channel.new_generation(2)
    assert lab.channel.open == (calls == 5)
    if calls < 5:
        with pytest.raises(ProposerError):
            asyncio.run(lab.channel.ask("mutate", 2, {}, {}, lambda reply: reply))
        assert lab.memory.events["llm-limit"][0] == "llm.limit_reached"


def test_no_repair_turn_beyond_a_cap(fake_openai: FakeOpenAI) -> None:
    fake_openai.script(then="prose")
    lab = Lab(fake_openai, limits=LlmLimits(calls=1))
    with pytest.raises(ProposerError):
        lab.propose("mutate", 1)
    assert lab.memory.outcomes == ["not_json"]


# -- resume ------------------------------------------------------------------------------------------------------------
def story(lab: Lab) -> list[Any]:
    """A fixed sequence of questions; what each gave."""
    operators = {name: make(lab.channel) for name, make in OPERATORS.items()}
    seen: list[Any] = []
    for generation in (1, 2):
        lab.channel.new_generation(generation)
        for name in ("select", "crossover", "mutate", "crossover", "mutate", "crossover", "mutate"):
            if not lab.channel.open:
                seen.append("closed")
                continue
            try:
                made = lab.propose(name, 2, replace(context(), generation=generation), operators[name])
            except ProposerError as error:
                seen.append((error.code, error.message))
            else:
                seen.append([[c.plan_hash for c in pair] for pair in made] if name == "select" else made)
    return [*seen, lab.channel.calls, lab.channel.tokens, lab.channel.cost]


SCRIPT = ("good", "prose", "good", "empty", "nan", "prose", "429", "good", "500", "hang", "refusal")


def test_resume_replays_without_a_request(fake_openai: FakeOpenAI) -> None:
    fake_openai.script(*SCRIPT)
    first = Lab(fake_openai, price_prompt=1.0, timeout=2.0)  # a busy machine must not make others time out
    told = story(first)
    assert len(first.memory.calls) == len(fake_openai.requests) == len(SCRIPT)
    assert told.count("closed") == 2 + 3
    assert len(first.memory.events) == 2
    assert first.memory.outcomes == (
        ["ok", "not_json", "repaired", "empty", "invalid", "not_json", "rate_limited", "ok", "server_error", "timeout", "refused"]
    )

    fake_openai.requests.clear()
    again = Lab(fake_openai, Memory(list(first.memory.calls.values())), price_prompt=1.0)
    assert story(again) == told
    assert fake_openai.requests == []
    assert again.memory.calls == first.memory.calls
    assert again.memory.events == first.memory.events


def test_resume_from_the_middle_goes_on_live(fake_openai: FakeOpenAI) -> None:
    first = Lab(fake_openai)
    story(first)
    kept = [call for call in first.memory.calls.values() if call.sequence <= 5]
    fake_openai.requests.clear()
    again = Lab(fake_openai, Memory(kept))
    story(again)
    assert len(fake_openai.requests) == len(again.memory.calls) - 5
    assert [again.memory.calls[n] for n in range(1, 6)] == kept
    assert fake_openai.requests[0]["seed"] != fake_openai.requests[1]["seed"]


def test_calls_of_another_config_are_a_conflict(fake_openai: FakeOpenAI) -> None:
    first = Lab(fake_openai)
    first.propose("mutate", 1)
    again = Lab(fake_openai, Memory(list(first.memory.calls.values())))
    with pytest.raises(ConflictError, match="Start a new job"):
        again.propose("crossover", 1)


# -- secrets and sizes -------------------------------------------------------------------------------------------------
def test_keys_reach_neither_rows_nor_events(fake_openai: FakeOpenAI) -> None:
    fake_openai.script("401", "reset", "429")
    lab = Lab(fake_openai)
    for _ in range(3):
        with pytest.raises(ProposerError):
            lab.propose("mutate", 1)
    kept = repr((lab.memory.calls, lab.memory.events, lab.channel.settings, lab.proposer))
    assert KEY not in kept
    assert lab.memory.outcomes == ["rejected", "unreachable", "rate_limited"]


def test_prompts_stay_small_and_keep_the_best(fake_openai: FakeOpenAI) -> None:
    of = space(layers=30)
    known = candidates(of, 40)
    on = context(of, history=known, population=known)
    for name in OPERATORS:
        fake_openai.requests.clear()
        Lab(fake_openai, max_prompt_chars=2500, plans_per_call=1).propose(name, 1, on)
        system, user = fake_openai.requests[0]["messages"]
        assert len(system["content"]) + len(user["content"]) <= 2500
        assert "average rate must be 25" in system["content"]
        if name in ("initialize", "mutate", "crossover"):
            scores = [int(line.split(":")[0]) for line in user["content"].splitlines() if line[:1].isdigit()]
            assert 90 in scores
            assert 207 not in scores
        else:
            assert 2 <= user["content"].count("\n#") < 40


def test_scores_are_relative_where_a_uniform_plan_is_known() -> None:
    on = context()
    bare = replace(on.history[0], relative=None, fitness=3.0)
    assert score(on, on.history[1]) == "93"
    assert score(replace(on, history=[bare, replace(bare, fitness=2.0)], population=[]), bare) == "150"
