"""What a prompt says of the search, changes named block by block, and plans that are hardly new."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from selfpruner.errors import ProposerError
from selfpruner.operators.base import Context, Hint
from selfpruner.operators.plan_format import MOST_CHANGES, PlanFormat
from selfpruner.operators.prompt_facts import NEAR, hints, known_plans, moved
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.records import Candidate
from selfpruner.testing.spaces import shape, space_of
from tests.helpers.fake_openai import FakeOpenAI
from tests.helpers.llm_lab import Lab, candidates, context, space


def candidate_of(of: SearchSpace, plan: Plan, relative: float = 1.0, generation: int = 0) -> Candidate:
    return Candidate(plan.hash, plan.levels, tuple(of.rates(plan)), generation, "x", (), "evaluated", relative, relative)


def on_one_parent(of: SearchSpace, plan: Plan, **fields: Any) -> Context:
    parent = candidate_of(of, plan, 0.9)
    return context(of, population=[parent], history=[parent], seen=frozenset({plan.hash}), **fields)


# -- named changes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments", [shape(rate=0.25), shape(rate=0.3, granularity="layer"), {"layers": 6, "rate": 0.3}])
def test_changes_are_kept_whatever_else_must_pay_for_them(arguments: dict[str, Any]) -> None:
    of = space_of(**arguments)
    plans, rng, kept, made = PlanFormat(of), random.Random(1), 0, 0
    for candidate in candidates(of, 10):
        before = of.rates(Plan(candidate.levels))
        for _ in range(10):
            changes = {dial: rng.randint(0, 50) / 100 for dial in rng.sample(range(len(of.dials)), 3)}
            plan = of.project(plans.balanced(before, changes))
            assert of.meets_budget(plan)
            after = of.rates(plan)
            for dial, rate in changes.items():
                settings = [of.dials[dial].rate(p) for p in range(len(of.dials[dial].removed))]
                kept += abs(after[dial] - min(settings, key=lambda s: abs(s - rate))) < 1e-6
                made += 1
    assert kept >= 0.97 * made


def test_changes_that_balance_touch_nothing_else(fake_openai: FakeOpenAI) -> None:
    of = space_of(**shape(rate=0.25))
    parent = of.project([0.25] * 30)
    before = of.rates(parent)
    ffn = [index for index, block in enumerate(of.blocks) if block.kind == "ffn"]
    step = 100 / 24
    names = {3: before[ffn[2]] * 100 - 2 * step, 7: before[ffn[6]] * 100 + 2 * step}
    changes = [{"layer": layer, "block": "ffn", "rate": round(rate)} for layer, rate in names.items()]
    fake_openai.script(json.dumps({"plans": [{"changes": changes}]}))
    (child,) = Lab(fake_openai).propose("mutate", 1, on_one_parent(of, parent))
    assert {i for i in range(60) if child.plan.levels[i] != parent.levels[i]} == {ffn[2], ffn[6]}
    assert child.parents == (parent.hash,)
    assert child.informed_by == 0


def test_changes_that_cannot_balance_still_meet_the_budget() -> None:
    of = space_of(layers=2, mode="none", rate=0.3)
    plans = PlanFormat(of)
    before = of.rates(of.project([0.3, 0.3]))
    for rate in (0.0, 0.9):
        changes = {index: rate for index, dial in enumerate(of.dials) if len(dial.removed) > 1}
        assert of.meets_budget(of.project(plans.balanced(before, changes)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layer": 5, "block": "ffn", "rate": 20}, "from 1 to 4"),
        ({"layer": 0, "block": "ffn", "rate": 20}, "from 1 to 4"),
        ({"layer": 1, "block": "head", "rate": 20}, "attention, ffn"),
        ({"layer": 1, "rate": 20}, "attention, ffn"),
        ({"layer": 1, "block": "ffn", "rate": -1}, "from 0 to"),
        ({"layer": 1, "block": "ffn", "rate": 101}, "from 0 to"),
        ({"layer": "1", "block": "ffn", "rate": 20}, "layer"),
        ({"layer": True, "block": "ffn", "rate": 20}, "layer"),
        ("ffn 1: 20", "changes.0"),
    ],
)
def test_a_change_that_names_nothing_is_refused(fake_openai: FakeOpenAI, change: object, complaint: str) -> None:
    plans = PlanFormat(space())
    with pytest.raises(ValueError, match=complaint):
        plans.changes({"changes": [change]})
    fake_openai.script(then=json.dumps({"plans": [{"changes": [change]}]}))
    lab = Lab(fake_openai)
    with pytest.raises(ProposerError):
        lab.propose("mutate", 1)
    assert lab.memory.outcomes == ["invalid", "invalid"]


def test_examples_follow_their_schemas() -> None:
    from selfpruner.proposers.reply import follows

    for of in (space(), space("layer"), space(attention=False)):
        plans = PlanFormat(of)
        for count in (1, 2):
            assert follows(plans.example_of_changes(count), plans.schema_of_changes(count))
            assert follows(plans.example(count), plans.schema(count))
            for plan in json.loads(plans.example_of_changes(count))["plans"]:
                assert 2 <= len(plans.changes(plan)) <= MOST_CHANGES
    assert PlanFormat(space()).steps() == "25 (attention), 8 (ffn)"
    assert PlanFormat(space(attention=False)).steps() == "8 (ffn)"
    assert PlanFormat(space("layer")).steps().isdigit()


# -- what is new ---------------------------------------------------------------------------------------------------------
def test_distance_is_what_is_removed_elsewhere() -> None:
    of = space()
    first, second, *_ = (candidate.levels for candidate in candidates(of, 2))
    assert moved(of, first, first) == 0
    assert moved(of, first, second) == moved(of, second, first)
    assert 0 < moved(of, first, second) <= 1
    front, back = of.project([0.5] * 4 + [0.0] * 4), of.project([0.0] * 4 + [0.5] * 4)
    assert moved(of, front.levels, back.levels) == pytest.approx(1, abs=0.1)


def test_a_child_that_hardly_differs_is_no_new_plan(fake_openai: FakeOpenAI) -> None:
    """At half the parameters of a deep model, one step moved is two thousandths of what is removed."""
    of = space_of(**shape(rate=0.5))
    parent = of.project([0.5] * 30)
    assert moved(of, parent.levels, [*parent.levels[:-1], parent.levels[-1] + 1]) < NEAR
    ffn = of.rates(parent)[1] * 100
    twin = {
        "changes": [{"layer": 1, "block": "ffn", "rate": round(ffn + 4.2)}, {"layer": 9, "block": "ffn", "rate": round(ffn - 4.2)}]
    }
    bold = {
        "changes": [
            {"layer": 1, "block": "ffn", "rate": round(ffn + 12.5)},
            {"layer": 9, "block": "ffn", "rate": round(ffn - 12.5)},
        ]
    }
    fake_openai.script(json.dumps({"plans": [twin, bold]}), then=json.dumps({"plans": [twin, twin]}))
    lab, on = Lab(fake_openai), on_one_parent(of, parent)
    (child,) = lab.propose("mutate", 2, on)
    assert moved(of, child.plan.levels, parent.levels) > NEAR
    assert lab.memory.calls[1].detail == "plans.0: hardly different from a known one"
    from selfpruner.operators.llm import Mutate

    operator = Mutate(lab.channel)
    with pytest.raises(ProposerError) as caught:
        lab.propose("mutate", 2, on, operator)
    assert caught.value.code == "no_new_plan"
    assert lab.channel.refused == {"near": 3}
    fake_openai.script()
    lab.propose("mutate", 1, on, operator)
    assert "hardly different from a known one" in fake_openai.requests[-1]["messages"][-1]["content"]


def test_plans_under_way_are_known_and_shown_as_unscored(fake_openai: FakeOpenAI) -> None:
    of = space(layers=8)
    known = candidates(of, 6)
    pending = [replace(c, status="pending", fitness=None, relative=None) for c in known[4:]]
    on = context(of, population=known[:4], history=known[:4], pending=pending, seen=frozenset(c.plan_hash for c in known[:4]))
    text = PlanFormat(of).write(of.rates(Plan(pending[0].levels)))
    fake_openai.script(f'{{"plans": [{text}]}}')
    lab = Lab(fake_openai)
    with pytest.raises(ProposerError) as caught:
        lab.propose("crossover", 1, on)
    assert caught.value.code == "no_new_plan"
    prompt = fake_openai.requests[0]["messages"][-1]["content"].splitlines()
    assert [line.split(":")[0] for line in prompt].count("not scored") == 2


# -- what is told --------------------------------------------------------------------------------------------------------
def test_known_plans_are_told_by_what_they_do_otherwise() -> None:
    of = space(layers=8)
    plans = PlanFormat(of)
    best = of.project([0.25] * 16)
    rates = of.rates(best)
    other = of.project(plans.balanced(rates, {1: rates[1] - 0.083, 3: rates[3] + 0.083}))
    far = of.project([0.5, 0.0] * 8)
    history = [candidate_of(of, best, 0.9), candidate_of(of, other, 0.95), candidate_of(of, far, 1.2)]
    on = context(of, population=history, history=history)
    worst, middle, last = known_plans(on, plans, frozenset(), [])
    assert worst == {"score": "120", "plan": plans.write(of.rates(far))}
    assert last == {"score": "90", "plan": plans.write(rates)}
    assert middle["plan"] == "the best, but ffn 1: 25->17, 2: 25->33"
    assert known_plans(on, plans, frozenset({other.hash}), [])[0] == worst
    assert len(known_plans(on, plans, frozenset({other.hash}), [])) == 2
    alone = replace(on, history=history[:1])
    assert known_plans(alone, plans, frozenset({best.hash}), []) == [], "shown once, as a parent"


def test_twins_in_the_history_are_told_once() -> None:
    of = space_of(**shape(rate=0.5))
    plans = PlanFormat(of)
    base = of.project([0.5] * 30)
    rates = of.rates(base)
    twins = [of.project(plans.balanced(rates, {1: rates[1] - 0.042, 2 * n + 1: rates[1] + 0.042})) for n in range(1, 12)]
    assert len({plan.hash for plan in twins}) == 11
    history = [candidate_of(of, plan, 0.9) for plan in (base, *twins)]
    assert len(known_plans(context(of, history=history), plans, frozenset(), [])) == 1


def test_hints_name_the_few_blocks_that_are_likely_to_pay() -> None:
    of = space(layers=8)
    plans = PlanFormat(of)
    best = of.project([0.25] * 16)
    on = on_one_parent(of, best)
    gains = {3: -2.0, 1: -0.8, 5: -0.5, 7: -0.4, 9: -0.3, 0: 1.5, 15: 0.04, 13: 0.3}
    lower, higher = hints(replace(on, hints=[Hint(block, gain) for block, gain in gains.items()]), plans)
    assert lower == "lower the rate of ffn 2 (25, -2.0 %), ffn 1 (25, -0.8 %), ffn 3 (25, -0.5 %), ffn 4 (25, -0.4 %)"
    assert higher == "raise the rate of attention 1 (25, -1.5 %), ffn 7 (25, -0.3 %)"
    assert hints(on, plans) == []
    assert hints(replace(on, hints=[Hint(3, -0.01)]), plans) == []

    dense = replace(on, history=[candidate_of(of, Plan((0,) * 16))])
    assert hints(replace(dense, hints=[Hint(3, -2.0)]), plans) == [], "what keeps all cannot keep more"

    of = space("layer", layers=8)
    by_layer = on_one_parent(of, of.project([0.25] * 8), hints=[Hint(2, -1.0), Hint(3, -0.5)])
    assert hints(by_layer, PlanFormat(of)) == ["lower the rate of layer 2 (25, -1.5 %)"]


def test_hints_reach_the_prompts_of_those_who_change_plans(fake_openai: FakeOpenAI) -> None:
    on = context(space(layers=8), hints=[Hint(3, -2.0), Hint(5, 1.0)])
    for name in ("mutate", "crossover", "select"):
        Lab(fake_openai).propose(name, 1, on)
        prompt = fake_openai.requests[-1]["messages"][-1]["content"]
        assert ("- lower the rate of ffn 2" in prompt) == (name != "select")


def test_equal_parents_are_shown_once(fake_openai: FakeOpenAI) -> None:
    of = space(layers=8)
    Lab(fake_openai).propose("mutate", 3, on_one_parent(of, of.project([0.25] * 16)))
    prompt = fake_openai.requests[0]["messages"][-1]["content"]
    assert prompt.count("Parent of") == 1
    assert "Parent of plans 1, 2, 3 " in prompt
