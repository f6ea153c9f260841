"""The contract of an operator: it makes plans from candidates. One file per kind, one line in the registry.

An operator sees a :class:`Context` and returns offspring; it never evaluates, stores or draws from a global random generator.
The loop treats LLM operators and classical ones alike.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from selfpruner.catalogue import OperatorNeed
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.records import Candidate

if TYPE_CHECKING:
    from selfpruner.planning.landscape import Landscape


@dataclass(frozen=True, slots=True)
class Offspring:
    """A plan with its origin. ``operator`` is recorded as given (a ramp adds its slope to the event, not to the name).

    ``informed_by`` is the latest generation whose scores an LLM operator knew: the one before the child's own, or the one before
    that for a child that was asked for while workers were scoring.
    """

    plan: Plan
    operator: str
    parents: tuple[str, ...] = ()
    informed_by: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A proposal that became no candidate, and why; shown to the LLM in the next prompt."""

    operator: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reflections:
    """What the LLM concluded from earlier generations (ReEvo): ``short`` from the latest ones, ``long`` accumulated. Both were
    written by an LLM: they are data, cleaned and cut where they are read, and empty until something was learnt."""

    short: str = ""
    long: str = ""


@dataclass(frozen=True, slots=True)
class Hint:
    """What a model of the landscape expects of one block. ``gain``: predicted relative change of the fitness in percent when
    the block keeps one step more and the same size is removed elsewhere at the going price; negative = the plan gets better."""

    block: int
    gain: float


@dataclass(frozen=True)
class Context:
    """What an operator may know.

    ``population`` is sorted, best first, evaluated candidates only; ``history`` holds every evaluated candidate, best first.
    ``sensitivities`` gives per block the KL (nats/token) when only that block is at ``probe_levels``; empty before probing.
    ``seen`` holds the hashes of all plans made so far. ``parents`` are pairs that a ParentSelection chose for this generation;
    operators that need parents take those first, and draw their own when there are none.

    ``hints`` say where around the best plan it is likely to pay to keep more or to remove more; empty before the landscape is
    known. A context is a snapshot: an operator asked while workers still score a generation is one generation behind, by design.
    The plans being scored then are ``pending``, and their hashes are in ``seen``.
    ``landscape`` is the model behind the hints, None before probing.
    ``signals`` are numbers that a worker measured on the dense model, per layer and per block (``evaluation.signals.gather``).
    """

    space: SearchSpace
    generation: int
    generations: int
    population: Sequence[Candidate] = ()
    history: Sequence[Candidate] = ()
    pending: Sequence[Candidate] = ()
    sensitivities: Sequence[float] = ()
    probe_levels: Sequence[int] = ()
    seen: frozenset[str] = frozenset()
    refused: Sequence[Refused] = ()
    parents: Sequence[tuple[Candidate, Candidate]] = ()
    metric: str = "kl"
    stale_generations: int = 0
    reflections: Reflections = Reflections()
    hints: Sequence[Hint] = ()
    landscape: Landscape | None = None
    signals: Signals = field(default_factory=Signals)

    def snapshot(self) -> Context:
        """The same knowledge with copies of all candidates. A search gives its candidates new scores while it scores them: who is
        asked meanwhile needs a snapshot taken before, or what it is told depends on which of the two is faster."""
        copies = {id(c): copy(c) for c in (*self.population, *self.history, *self.pending, *chain.from_iterable(self.parents))}
        of = {name: tuple(copies[id(c)] for c in getattr(self, name)) for name in ("population", "history", "pending")}
        pairs = tuple((copies[id(first)], copies[id(second)]) for first, second in self.parents)
        return replace(self, population=of["population"], history=of["history"], pending=of["pending"], parents=pairs)


class Operator(ABC):
    """Makes plans. A class says what the search has to know about it:

    ``needs``: what must be there for it to say anything. ``crosses``: it makes one plan of two. ``endless``: it always has as many
    new plans as it is asked for. ``picked``: of several times as many proposals the landscape's model picks the most promising.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[OperatorNeed]] = frozenset()
    crosses: ClassVar[bool] = False
    endless: ClassVar[bool] = False
    picked: ClassVar[bool] = True

    @abstractmethod
    async def propose(self, context: Context, count: int, rng: random.Random) -> list[Offspring]:
        """At most about ``count`` offspring, all legal and within budget; fewer, or none, is allowed.

        Raises ProposerError when an LLM gave nothing usable; the loop counts such failures.
        """


class ParentSelection(ABC):
    """Chooses parents instead of making plans (the LLM's ``select``)."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[OperatorNeed]] = frozenset()

    @abstractmethod
    async def select(self, context: Context, count: int, rng: random.Random) -> list[tuple[Candidate, Candidate]]: ...
