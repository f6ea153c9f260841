"""What a job keeps: evaluations, candidates, LLM calls, events, its stages. Plain values, and the protocol of whoever stores them.

Resume is replay. The loop is a deterministic function of config, seed, recorded LLM replies and evaluation results, so after a
restart it runs from the start and asks the recorder before it asks a worker or an LLM. Writing the same thing twice must
therefore change nothing: an evaluation is keyed by (plan, window), an LLM call by its sequence number, an event by its key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from typing_extensions import TypedDict

from selfpruner.stages import Stage

JobStatus = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Severity = Literal["info", "warn", "error"]
CandidateStatus = Literal["pending", "evaluated", "infeasible", "failed"]
EvaluationKind = Literal["measured", "raced", "foreseen"]
"""``measured`` on all tokens of the window; ``raced``: a race ended early, and the figures are estimates from the tokens there
were; ``foreseen`` from slopes, on no tokens of its own."""
EvaluationOutcome = Literal["ok", "out_of_memory", "not_finite"]


@dataclass(frozen=True, slots=True)
class Window:
    """Which tokens a plan was scored on: sequence numbers of one text, each cut into pieces of ``piece`` tokens where that is
    given. Equal names mean equal tokens."""

    name: str
    text: Literal["fitness", "report"]
    sequences: tuple[int, ...]
    piece: int | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One plan on one window. ``kl`` and ``nll`` are nats per token, and missing unless the ``outcome`` is ok. ``reason`` says the
    same to people, and nothing is decided by it."""

    plan_hash: str
    window: str
    tokens: int
    kl: float | None
    nll: float | None
    seconds: float
    reason: str | None = None
    kind: EvaluationKind = "measured"
    outcome: EvaluationOutcome = "ok"


@dataclass(slots=True)
class Candidate:
    """A plan in the population. ``fitness`` is on its latest and largest window; ``relative`` is that over the uniform
    plan's fitness on the same tokens, so candidates of different generations can be compared (1 = uniform, lower is better);
    None for a front's plan of another rate, which the uniform plan says nothing about. ``rejected``: a race ended early for it, and
    both are estimates, good enough to be left out by. ``reason`` is for people.

    ``predicted`` is the relative fitness the landscape's model expected before it was scored; ``credit`` what the bandit believed
    its operator gains per second; ``informed_by`` the latest generation whose scores an LLM operator knew."""

    plan_hash: str
    levels: tuple[int, ...]
    rates: tuple[float, ...]
    generation: int
    operator: str
    parents: tuple[str, ...] = ()
    status: CandidateStatus = "pending"
    fitness: float | None = None
    relative: float | None = None
    window: str | None = None
    tokens: int = 0
    reason: str | None = None
    survived: bool = False
    rejected: bool = False
    predicted: float | None = None
    credit: float | None = None
    informed_by: int | None = None


@dataclass(frozen=True, slots=True)
class LlmCall:
    """One call of the proposer, also a failed one. ``outcome`` is one of ``proposers.base.OUTCOMES``."""

    sequence: int
    generation: int
    operator: str
    proposer: str
    model: str
    messages: tuple[Mapping[str, str], ...]
    reply: str
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cost: float
    detail: str = ""


class ProgressData(TypedDict, total=False):
    """Plans that each operator made, how many of them ``improved`` the best, and the plan-tokens spent."""

    operators: dict[str, int]
    improved: dict[str, int]
    tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What a watcher sees. ``stage`` is preparing, probing, searching, reporting, exporting or done."""

    stage: str
    generation: int = 0
    generations: int = 0
    evaluations: int = 0
    plans: int = 0
    best_fitness: float | None = None
    best_relative: float | None = None
    best_plan: str | None = None
    message: str = ""
    data: ProgressData = field(default_factory=ProgressData)


class StoredProgress(TypedDict, total=False):
    """:class:`Progress` as it is stored and sent; an earlier version may have stored less of it."""

    stage: str
    generation: int
    generations: int
    evaluations: int
    plans: int
    best_fitness: float | None
    best_relative: float | None
    best_plan: str | None
    message: str
    data: ProgressData


class CheckpointFacts(TypedDict):
    """An exported and verified checkpoint. ``path`` is on the machine that wrote it."""

    plan_hash: str
    path: str
    parameters: int
    bytes: int
    manifest_sha256: str
    verification: Mapping[str, object]
    metrics: Mapping[str, object]


class JobError(TypedDict):
    """What ended a failed job, see :class:`selfpruner.errors.SelfprunerError`."""

    code: str
    message: str
    param: str | None


class StoredConfig(TypedDict):
    """The fields of a SearchConfig as JSON, those of the version that made the job; these are in all of them."""

    model: str
    rate: float
    seed: int


class Recorder(Protocol):
    """Where a job's history goes. Every write is durable when the call returns; every write is idempotent."""

    def find_evaluation(self, plan_hash: str, window: str) -> Evaluation | None: ...
    def save_evaluations(self, rows: Sequence[Evaluation]) -> None: ...
    def find_llm_call(self, sequence: int) -> LlmCall | None: ...
    def save_llm_call(self, call: LlmCall) -> None: ...
    def save_candidates(self, rows: Sequence[Candidate]) -> None:
        """Insert, or update the row of the same plan. ``parents``, ``operator`` and ``generation`` keep their first value."""

    def event(
        self, key: str, type: str, message: str, *, level: Severity = "info", data: Mapping[str, object] | None = None
    ) -> None:
        """Append an event once: a second one with the same ``key`` is ignored."""

    def find_event(self, key: str) -> Mapping[str, object] | None:
        """The data of the event with ``key``."""

    def progress(self, progress: Progress) -> None: ...
    def find_stages(self) -> Sequence[Stage]:
        """What was spent on the job until now, also before it was interrupted."""

    def save_stages(self, stages: Sequence[Stage]) -> None:
        """Insert, or take the place of the rows of the same names."""
