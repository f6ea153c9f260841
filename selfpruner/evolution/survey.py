"""Looking before leaping: what blocks cost in the dense model, and what their next levels would do around a plan.

*Probes* of the dense model come first: one block at a time at a middle level, on whole sequences and on short pieces. Models of
this kind park attention on a sequence's first token, which the first layers mark. Where that fails for a token, everything after
it is ruined. A few sequences hardly show it, many starts do: a block that costs much more there than others do is taken to cost
more by that much (:func:`weighed`).

A *survey* is computed from slopes: all blocks and levels in one walk forward and back (:mod:`selfpruner.evaluation.slopes`).
Around a good plan slopes hardly see what a change does to the few sequences it harms most; around a plan that is pruned further
they see more of it. So they are taken at the plan that the landscape thinks best for a higher rate, and the next survey's at what
it thinks best after this one. Where the worker cannot take slopes, because the model is streamed or memory is short, a survey
consists of evaluations around the leader, on fewer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from selfpruner.evolution.evaluator import SLOPE_PASSES, Evaluator
from selfpruner.evolution.windows import Windows
from selfpruner.planning.allocation import cheapest
from selfpruner.planning.landscape import Landscape, Reference
from selfpruner.planning.space import Block, Plan, SearchSpace
from selfpruner.records import Recorder

# How many times more than others a block must cost on starts to be taken for one that ruins sequences.
RUINOUS = 2.0
# Slopes are taken at a plan of this many times the target rate, and at most of so much more: further on, the model is ruined as
# it is, and ruining more costs nothing. At most half way to all that can be removed.
HARDER, FURTHER = 1.4, 0.08
# A survey is worth its tokens again when that plan differs in this share of its blocks from the one last looked at.
MOVED = 0.2
# A survey foresees changes by up to so many levels. What it says of one is off by this share of it, beside what its tokens leave
# open.
REACH = 2
FORESIGHT = 0.3
# A survey by evaluations takes this share of the tokens, and FFNs in so many groups of neighbouring layers.
PROBED = 0.125
FFN_GROUPS = 6


class Surveyor:
    """Probes and surveys of one search. ``step`` is the share of its parameters that an FFN turns by in a survey by evaluations."""

    def __init__(self, space: SearchSpace, evaluator: Evaluator, windows: Windows, recorder: Recorder, step: float) -> None:
        self._space = space
        self._evaluator = evaluator
        self._windows = windows
        self._recorder = recorder
        self._step = step
        self.made = 0
        self._looked: Plan | None = None

    @property
    def tokens(self) -> int:
        """The most plan-tokens a survey takes, whichever way it is made."""
        foreseen = self._windows.survey_tokens * (SLOPE_PASSES + 2 * REACH)
        probed = self._windows.count(math.ceil(PROBED * self._windows.survey_tokens)) * self._windows.length
        return max(foreseen, probed * (len(self._space.blocks) + 2 * FFN_GROUPS + 1))

    async def probe(self) -> tuple[list[int], list[float]]:
        """Per block of the dense model a middle level, and the KL (nats) when only that block is at it."""
        blocks, windows = range(len(self._space.blocks)), (self._windows.probe, self._windows.starts)
        levels = [probe_level(self._space, block) for block in blocks]
        plans = [Plan(tuple(level if other == block else 0 for other in blocks)) for block, level in enumerate(levels)]
        whole, starts = [
            [max(kl, 0.0) if math.isfinite(kl := scores[plan.hash].kl) else 0.0 for plan in plans]
            for scores in [await self._evaluator.score(plans, [window]) for window in windows]
        ]
        self._evaluator.plans.clear()  # a probe is no candidate and does not count as a plan evaluated
        values = weighed(whole, starts)
        tokens = sum(len(window.sequences) for window in windows) * self._windows.length
        self._recorder.event(
            "probes",
            "search.probed",
            f"Sensitivity of {len(levels)} blocks measured on {tokens} tokens.",
            data={"levels": levels, **{name: [round(v, 6) for v in list_] for name, list_ in (("kl", values), ("starts", starts))}},
        )
        return levels, values

    def place(self, landscape: Landscape) -> Plan | None:
        """Where the next survey is due: the best plan of a higher rate. None where that is much like the one last looked at."""
        harder = cheapest(self._harder(), landscape.losses())
        if self._looked is not None:
            moved = sum(a != b for a, b in zip(self._looked.levels, harder.levels, strict=True))
            if moved < MOVED * len(harder.levels):
                return None
        return harder

    async def around(self, harder: Plan, here: Plan, landscape: Landscape, generation: int) -> float:
        """Show ``landscape`` what changes around ``harder`` do, or where the worker has no slopes those around the leader ``here``,
        on fresh tokens; the seconds it took."""
        number, self.made, self._looked = self.made, self.made + 1, harder
        window = self._windows.survey(number)
        tokens = len(window.sequences) * self._windows.length
        moves = {move: landscape.weights[move[0]] for move in steps(self._space, harder)}
        before = self._evaluator.seconds
        foreseen = await self._evaluator.predict_changes(harder, moves, window)
        if foreseen is None:
            around, how = here, "probed"
            count, tokens, seconds = await self._probe_around(here, landscape, number, generation)
        else:
            around, how = harder, "foreseen"
            base, changes = foreseen
            reference = Reference(harder, base, window.name, tokens, generation, FORESIGHT)
            for (block, level), change in changes.items():
                moved = Plan((*harder.levels[:block], level, *harder.levels[block + 1 :]))
                landscape.observe(moved, change, reference)
            count, seconds = len(changes), self._evaluator.seconds - before
        self._recorder.event(
            f"survey-{number}",
            "search.surveyed",
            f"Generation {generation}: {count} changes of {around.hash} {how} on {tokens} tokens.",
            data={"generation": generation, "plan": around.hash, "changes": count, "foreseen": foreseen is not None},
        )
        return seconds

    def _harder(self) -> SearchSpace:
        space = self._space
        most = sum(block.removed(len(block.options) - 1) for block in space.blocks) / space.total
        return replace(space, rate=min(HARDER * space.rate, space.rate + FURTHER, (space.rate + most) / 2))

    async def _probe_around(self, here: Plan, landscape: Landscape, number: int, generation: int) -> tuple[int, int, float]:
        """A survey by evaluations: probes, tokens of each, and seconds."""
        window = self._windows.survey(number, PROBED)
        probes = survey(self._space, here, self._step)
        scores = await self._evaluator.score([here, *probes], [window])
        self._evaluator.plans.difference_update(plan.hash for plan in probes)
        base = scores[here.hash]
        reference = Reference(here, base.kl, window.name, base.tokens, generation)
        for plan in probes:
            if math.isfinite(scores[plan.hash].kl) and math.isfinite(base.kl):
                landscape.observe(plan, scores[plan.hash].kl - base.kl, reference)
        return len(probes), base.tokens, sum(score.seconds for score in scores.values())


def weighed(whole: Sequence[float], starts: Sequence[float]) -> list[float]:
    """KL per block: that of whole sequences, times how much more than for the median block it is on starts, where that is more than
    RUINOUS."""
    ratios = [start / kl if kl > 0 else 1.0 for kl, start in zip(whole, starts, strict=True)]
    usual = max(median(ratios), 1e-9)
    return [kl * ratio / usual if ratio > RUINOUS * usual else kl for kl, ratio in zip(whole, ratios, strict=True)]


def steps(space: SearchSpace, plan: Plan) -> list[tuple[int, int]]:
    """(block, level) of every change by up to REACH levels, either way."""
    return [
        (index, level)
        for index, (block, here) in enumerate(zip(space.blocks, plan.levels, strict=True))
        for level in range(max(0, here - REACH), min(len(block.options), here + REACH + 1))
        if level != here
    ]


def survey(space: SearchSpace, plan: Plan, step: float) -> list[Plan]:
    """Plans around ``plan`` that tell what its blocks are worth. Attention blocks turn one at a time, to the next shape either way:
    what a shape costs is hard to foresee. FFNs turn in groups of neighbouring layers, both ways, each by a share ``step`` of its
    parameters or the next level, whichever is more: their losses follow the error curves, and a group is heard above the noise."""
    groups: list[tuple[int, ...]] = [(index,) for index, block in enumerate(space.blocks) if block.kind == "attention"]
    ffns = [index for index, block in enumerate(space.blocks) if block.kind == "ffn"]
    size = -(-len(ffns) // FFN_GROUPS)
    groups += [tuple(ffns[start : start + size]) for start in range(0, len(ffns), size)]
    found = {}
    for group in groups:
        for way in (-1, 1):
            levels = list(plan.levels)
            for index in group:
                levels[index] = _turned(space.blocks[index], levels[index], way, step)
            probe = Plan(tuple(levels))
            if probe != plan:
                found[probe.levels] = probe
    return list(found.values())


def _turned(block: Block, here: int, way: int, step: float) -> int:
    levels = range(here + way, -1 if way < 0 else len(block.options), way)
    if block.kind == "attention":
        return levels[0] if levels else here
    far = [level for level in levels if abs(block.rate(level) - block.rate(here)) >= step - 1e-9]
    return far[0] if far else levels[-1] if levels else here


def probe_level(space: SearchSpace, block: int) -> int:
    """The level whose rate is nearest to twice the target, at most a half: strong enough to be heard, near what is asked."""
    options = space.blocks[block]
    wanted = min(2 * space.rate, 0.5)
    levels = range(1, len(options.options))
    return min(levels, key=lambda level: (abs(options.rate(level) - wanted), level)) if levels else 0
