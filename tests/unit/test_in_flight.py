"""Questions in flight while workers score: order and numbers, resume, cancellation, caps."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace

import pytest

from selfpruner.config import LlmLimits
from selfpruner.errors import ProposerError
from selfpruner.operators.base import Context, Offspring
from selfpruner.operators.llm import Crossover, Mutate, Select
from selfpruner.operators.reflect import Reflect
from selfpruner.proposers.base import Reply, Request
from selfpruner.proposers.in_flight import in_flight
from selfpruner.proposers.llm_calls import LlmChannel
from selfpruner.proposers.settings import ProposerSettings
from tests.helpers.fake_openai import FakeOpenAI
from tests.helpers.llm_lab import Lab, candidates, context, space
from tests.helpers.searching import MemoryRecorder, ScriptedProposer


class Gate(ScriptedProposer):
    """Holds every call until ``open`` is set, and knows which are under way."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.under_way: list[int] = []
        self.abandoned: list[int] = []

    async def complete(self, request: Request) -> Reply:
        self.under_way.append(request.sequence)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.abandoned.append(request.sequence)
            raise
        finally:
            self.under_way.remove(request.sequence)
        return await super().complete(request)


def channel_of(proposer: ScriptedProposer, recorder: MemoryRecorder, limits: LlmLimits | None = None) -> LlmChannel:
    settings = ProposerSettings(kind="openai", model="scripted-1", plans_per_call=2)
    return LlmChannel(proposer, recorder, limits or LlmLimits(), settings, seed=3)


async def questions(channel: LlmChannel, on: Context) -> list[Offspring]:
    """All the questions of one generation, one after the other."""
    rng = random.Random(0)
    lessons = await Reflect(channel).reflect(on, rng)
    on = replace(on, reflections=lessons, parents=await Select(channel).select(on, 2, rng))
    made: list[Offspring] = []
    for kind in (Crossover, Mutate):
        try:
            made += await kind(channel).propose(on, 3, rng)
        except ProposerError:
            continue
    return made


def wide() -> Context:
    of = space(layers=8)
    known = candidates(of, 6)
    on = context(of, population=known, history=known, seen=frozenset(c.plan_hash for c in known))
    return replace(on, generation=2)


def test_the_proposer_writes_while_the_workers_score() -> None:
    async def story() -> None:
        gate, recorder = Gate(), MemoryRecorder()
        async with in_flight(questions(channel_of(gate, recorder), wide())) as asked:
            assert gate.under_way == [1], "the first call left before the scoring began"
            assert not recorder.calls
            gate.open.set()
            await asyncio.sleep(0.01)  # the workers score
            children = await asked
        assert children
        assert {child.informed_by for child in children} == {0}, "children say what was known when they were asked for"
        assert [call.operator for call in recorder.calls.values()][:2] == ["reflect", "select"]

    asyncio.run(story())


@pytest.mark.parametrize("scoring", [0.0, 0.05])
def test_the_same_questions_whichever_ends_first_and_none_on_resume(scoring: float) -> None:
    async def story(recorder: MemoryRecorder, proposer: ScriptedProposer) -> list[Offspring]:
        async with in_flight(questions(channel_of(proposer, recorder), wide())) as asked:
            await asyncio.sleep(scoring)
            return await asked

    expected_recorder = MemoryRecorder()
    expected = asyncio.run(questions(channel_of(ScriptedProposer(), expected_recorder), wide()))
    recorder = MemoryRecorder()
    assert asyncio.run(story(recorder, ScriptedProposer())) == expected
    assert recorder.calls == expected_recorder.calls
    again = ScriptedProposer()
    assert asyncio.run(story(recorder, again)) == expected
    assert again.made == []


@pytest.mark.parametrize("scoring", [0.0, 0.05])
def test_scores_that_arrive_meanwhile_change_nothing_in_a_snapshot(scoring: float) -> None:
    """Workers give members of the population new scores at any moment; what the proposer is told must not depend on when."""

    async def story(recorder: MemoryRecorder) -> list[Offspring]:
        on = wide()
        chosen = replace(on, parents=[(on.population[1], on.population[2])]).snapshot()
        assert chosen.history[0] is chosen.population[0]
        assert chosen.parents[0][0] is chosen.population[1]
        async with in_flight(questions(channel_of(ScriptedProposer(), recorder), chosen)) as asked:
            for member in on.population:
                member.relative = 5.0
                await asyncio.sleep(scoring / 5)
            return await asked

    undisturbed, recorder = MemoryRecorder(), MemoryRecorder()
    expected = asyncio.run(questions(channel_of(ScriptedProposer(), undisturbed), wide()))
    assert asyncio.run(story(recorder)) == expected
    assert recorder.calls == undisturbed.calls


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_scoring_that_fails_takes_the_question_with_it(finished: int) -> None:
    """Whatever was answered is recorded whole, the call under way not at all; going on gives what an undisturbed run gives."""
    recorder = MemoryRecorder()

    class Stops(Gate):
        async def complete(self, request: Request) -> Reply:
            if request.sequence <= finished:
                self.made.append(request.sequence)
                return await ScriptedProposer().complete(request)
            return await super().complete(request)

    async def fails() -> None:
        gate = Stops()
        channel = channel_of(gate, recorder)
        async with in_flight(questions(channel, wide())):
            while not gate.under_way:
                await asyncio.sleep(0)
            raise ZeroDivisionError
        raise AssertionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(fails())
    assert sorted(recorder.calls) == list(range(1, finished + 1))

    undisturbed = MemoryRecorder()
    expected = asyncio.run(questions(channel_of(ScriptedProposer(), undisturbed), wide()))
    assert asyncio.run(questions(channel_of(ScriptedProposer(), recorder), wide())) == expected
    assert recorder.calls == undisturbed.calls


def test_a_search_that_is_cancelled_leaves_nothing_running() -> None:
    async def story() -> None:
        gate, recorder = Gate(), MemoryRecorder()
        channel = channel_of(gate, recorder)

        async def search() -> None:
            async with in_flight(questions(channel, wide())) as asked:
                await asyncio.sleep(60)
                await asked

        searching = asyncio.create_task(search())
        await asyncio.sleep(0.01)
        searching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await searching
        assert gate.abandoned == [1]
        assert gate.under_way == []
        assert (recorder.calls, channel.calls, channel.tokens) == ({}, 0, 0)
        gate.open.set()
        assert await questions(channel, wide()), "the channel goes on, from the same number"
        assert min(recorder.calls) == 1

    asyncio.run(story())


def test_an_error_nobody_awaited_is_not_reported_as_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise ProposerError("nothing usable")

    async def story() -> None:
        async with in_flight(broken()):
            await asyncio.sleep(0.01)

    asyncio.run(story())
    assert not caplog.records

    async def awaited() -> None:
        async with in_flight(broken()) as asked:
            await asked

    with pytest.raises(ProposerError, match="nothing usable"):
        asyncio.run(awaited())


def test_two_that_ask_at_once_wait_for_each_other() -> None:
    async def story() -> None:
        gate, recorder = Gate(), MemoryRecorder()
        channel = channel_of(gate, recorder)
        asking = [asyncio.create_task(kind(channel).propose(wide(), 2, random.Random(0))) for kind in (Mutate, Crossover)]
        await asyncio.sleep(0.01)
        assert gate.under_way == [1]
        gate.open.set()
        await asyncio.gather(*asking)
        assert [(n, call.operator) for n, call in sorted(recorder.calls.items())] == [(1, "mutate"), (2, "crossover")]

    asyncio.run(story())


def test_caps_hold_in_flight() -> None:
    async def story() -> None:
        gate, recorder = Gate(), MemoryRecorder()
        channel = channel_of(gate, recorder, LlmLimits(calls=2))
        gate.open.set()
        async with in_flight(questions(channel, wide())) as asked:
            await asyncio.sleep(0.01)
            await asked
        assert sorted(recorder.calls) == [1, 2]
        assert not channel.open
        assert "llm-limit" in recorder.events

    asyncio.run(story())


def test_the_next_generation_may_be_announced_while_its_question_is_in_flight() -> None:
    """Announcing a generation again forgives no failures, and rows keep the generation they were asked for."""

    async def story() -> None:
        gate, recorder = Gate(), MemoryRecorder()
        gate.failures = dict.fromkeys(range(1, 100), "timeout")
        channel = channel_of(gate, recorder)
        async with in_flight(questions(channel, wide())) as asked:
            channel.new_generation(2)
            gate.open.set()
            with pytest.raises(ProposerError):
                await asked
            channel.new_generation(2)
        assert {call.generation for call in recorder.calls.values()} == {2}
        assert len(recorder.calls) <= 3

    asyncio.run(story())


def test_a_call_over_http_is_cut_when_it_is_cancelled(fake_openai: FakeOpenAI) -> None:
    fake_openai.script("hang")
    lab = Lab(fake_openai)

    async def story() -> None:
        async with in_flight(Crossover(lab.channel).propose(wide(), 1, random.Random(0))):
            while not fake_openai.requests:
                await asyncio.sleep(0.01)

    began = time.monotonic()
    asyncio.run(story())
    assert time.monotonic() - began < 4, "before its own time was up"
    assert lab.memory.calls == {}
    assert lab.propose("crossover", 1, wide())
    assert list(lab.memory.calls) == [1]


def test_only_a_remote_proposer_leaves_the_workers_free(fake_openai: FakeOpenAI) -> None:
    assert Lab(fake_openai).channel.overlaps
    assert not Lab(fake_openai, kind="local").channel.overlaps
