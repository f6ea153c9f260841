"""Which operator makes the next children: a bandit on improvement per second.

An arm is an operator. It earns the relative improvement of the best plan among its children, and it costs seconds: those its
children took to score, and those it took to think (an LLM's latency, probes). Both fade, because what helps early need not help
late. Arms start with one second's worth of the same optimistic gain, so each is tried. A bonus keeps trying the arms that were
asked least, and a floor keeps any arm from being given up. An arm whose thinking costs seconds waits for it, twice as long after
every answer that brought nothing.

Deterministic: gains and seconds are recorded values, and ties go to the order of the config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FADING = 0.8
EXPLORATION = 0.35
# Gain per second that an arm is believed to have before it was tried: one percent in a minute.
HOPE_GAIN, HOPE_SECONDS = 0.01, 60.0
# An arm whose thinking costs seconds is not asked for its floor in every generation, but after so many; twice as many after an
# answer without a gain, and so on until one brings something.
FLOOR_EVERY = 4


@dataclass(slots=True)
class Arm:
    """``gain`` and ``seconds`` faded sums; ``children`` all that were made; ``asked`` the generation it was last asked in;
    ``misses`` how often it was asked since it last gained something."""

    gain: float = 0.0
    seconds: float = 0.0
    children: int = 0
    asked: int = 0
    thinking: float = 0.0
    misses: int = 0


class Bandit:
    """Shares a generation's children out among operators."""

    def __init__(self, names: Sequence[str]) -> None:
        self.arms = {name: Arm() for name in names}

    def value(self, name: str) -> float:
        """Believed gain per second, with the bonus for arms asked little."""
        arm = self.arms[name]
        total = sum(other.children for other in self.arms.values())
        value = (arm.gain + HOPE_GAIN) / (arm.seconds + HOPE_SECONDS)
        return value * (1 + EXPLORATION * math.sqrt(math.log(total + 1) / (arm.children + 1)))

    def shares(self, count: int, generation: int) -> dict[str, int]:
        """How many of ``count`` children each arm is to make. The floor is one child: in every generation for an arm that is
        free to ask, in every fourth for one whose answers cost seconds and gain, ever more rarely while they do not."""
        values = {name: self.value(name) for name in self.arms}
        top = max(values.values())
        weights = {name: (value / top) ** 2 for name, value in values.items()}
        whole = sum(weights.values())
        exact = {name: count * weight / whole for name, weight in weights.items()}
        shares = {name: int(value) for name, value in exact.items()}
        by_rest = sorted(exact, key=lambda name: shares[name] - exact[name])
        for name in by_rest[: count - sum(shares.values())]:
            shares[name] += 1
        for name, arm in self.arms.items():
            free = arm.thinking <= 0.05 * arm.seconds
            due = free or generation - arm.asked >= FLOOR_EVERY << arm.misses
            if shares[name] == 0 and due:
                giver = max(shares, key=lambda other: shares[other])
                if shares[giver] > 1:
                    shares[giver] -= 1
                    shares[name] = 1
            elif shares[name] and not free and weights[name] < 0.5 and not due:
                # A slow arm that is not the best waits for its turn, so that its latency is paid for rarely.
                giver = max((other for other in shares if other != name), key=lambda other: weights[other], default=name)
                shares[giver] += shares[name] if giver != name else 0
                shares[name] = 0 if giver != name else shares[name]
        for name, share in shares.items():
            if share:
                self.arms[name].asked = generation
        return shares

    def reward(
        self, gains: Mapping[str, float], seconds: Mapping[str, float], thinking: Mapping[str, float], made: Mapping[str, int]
    ) -> None:
        """Book a generation. ``seconds`` are of scoring, ``thinking`` of making the children; arms that were not asked fade too."""
        for name, arm in self.arms.items():
            spent = seconds.get(name, 0.0) + thinking.get(name, 0.0)
            arm.gain = FADING * arm.gain + gains.get(name, 0.0)
            arm.seconds = FADING * arm.seconds + spent
            arm.thinking = FADING * arm.thinking + thinking.get(name, 0.0)
            arm.children += made.get(name, 0)
            if gains.get(name, 0.0) > 0:
                arm.misses = 0
            elif made.get(name, 0):
                arm.misses += 1
