"""LLM operators on the scripted server: a channel, a recorder in memory, a small space and its candidates."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from selfpruner.config import LlmLimits
from selfpruner.operators.base import Context
from selfpruner.operators.llm import Crossover, Initialize, Mutate, Select
from selfpruner.planning.space import Block, Option, SearchSpace, ffn_widths
from selfpruner.proposers.llm_calls import LlmChannel
from selfpruner.proposers.openai import OpenAIProposer
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.records import Candidate, LlmCall
from tests.helpers.fake_openai import FakeOpenAI

OPERATORS: dict[str, Any] = {operator.name: operator for operator in (Initialize, Select, Crossover, Mutate)}
KEY = "sk-very-secret-0123456789"


class Memory:
    """A recorder in memory: calls by number, events by key."""

    def __init__(self, calls: Sequence[LlmCall] = ()) -> None:
        self.calls = {call.sequence: call for call in calls}
        self.events: dict[str, tuple[str, str, str]] = {}

    def find_llm_call(self, sequence: int) -> LlmCall | None:
        return self.calls.get(sequence)

    def save_llm_call(self, call: LlmCall) -> None:
        assert call.sequence not in self.calls
        self.calls[call.sequence] = call

    def event(self, key: str, type: str, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None) -> None:
        json.dumps(data)
        self.events.setdefault(key, (type, level, message))

    @property
    def outcomes(self) -> list[str]:
        return [call.outcome for _, call in sorted(self.calls.items())]


def space(granularity: Any = "block", layers: int = 4, attention: bool = True) -> SearchSpace:
    blocks = []
    for layer in range(layers):
        heads = range(4, 0, -1) if attention else [4]
        blocks.append(Block(layer, "attention", tuple(Option(1024 * n, kv_groups=n, heads_per_group=1) for n in heads)))
        blocks.append(Block(layer, "ffn", tuple(Option(96 * w, channels=w) for w in ffn_widths(96, 8))))
    return SearchSpace(tuple(blocks), sum(b.options[0].parameters for b in blocks), 0.25, 96 * 8, granularity)


def candidates(of: SearchSpace, count: int) -> list[Candidate]:
    """``count`` different plans, best first, scores 90, 93, 96, ..."""
    rng = random.Random(1)
    plans = {(p := of.project([rng.random() / 2 for _ in of.dials])).hash: p for _ in range(4 * count)}
    return [
        Candidate(key, plan.levels, tuple(of.rates(plan)), 0, "random", status="evaluated", fitness=1.0, relative=0.9 + 0.03 * i)
        for i, (key, plan) in enumerate(list(plans.items())[:count])
    ]


def context(of: SearchSpace | None = None, **fields: Any) -> Context:
    of = of or space()
    known = candidates(of, 5)
    base = {"population": known[:3], "history": known, "seen": frozenset(c.plan_hash for c in known)}
    return Context(of, generation=1, generations=3, **{**base, **fields})


class Lab:
    """A channel to the scripted server, and a recorder."""

    def __init__(self, server: FakeOpenAI, memory: Memory | None = None, limits: LlmLimits | None = None, **fields: Any) -> None:
        base = {"kind": "openai", "model": "fake", "api_key": KEY, "base_url": server.base_url, "timeout": 5, "max_retries": 0}
        self.settings = ProposerSettings(**{**base, **fields})
        self.memory = memory or Memory()
        self.proposer = OpenAIProposer("fake", self.settings)
        self.channel = LlmChannel(self.proposer, self.memory, limits or LlmLimits(), self.settings, seed=3)  # type: ignore[arg-type]

    def propose(self, name: str, count: int = 2, on: Context | None = None, operator: Any = None) -> list[Any]:
        operator = operator or OPERATORS[name](self.channel)
        on = on or context()
        method = operator.select if name == "select" else operator.propose
        return asyncio.run(method(on, count, random.Random(0)))
