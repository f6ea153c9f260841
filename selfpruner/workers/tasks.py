"""What goes to a worker and what comes back: one request and one result per kind of task. Imports no torch.

On the wire both are plain JSON. They are checked where they are made and where they are read: a field of another type, a missing
one and an unknown one are a :class:`~selfpruner.errors.ContractError` that names the field.

The type parameter of a request says what answers it, so ``await pool.run(session, EvaluateRequest(...))`` is an EvaluateResult. A
handler may have requests of its own (see ``selfpruner.timing.tasks``); nothing here knows them.

Levels are those of a plan: one per block, attention before FFN, layer by layer. ``sequences`` are numbers of a text's sequences,
each cut into pieces of ``piece`` tokens where that is given. KL and NLL are nats per token; seconds are wall-clock time.
"""

from __future__ import annotations

import json
from typing import ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

from selfpruner.config import Role
from selfpruner.errors import ContractError
from selfpruner.files.card_info import CardInfo
from selfpruner.files.report import Figures, SourceUsed
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import SearchSpace
from selfpruner.stages import Stage

Levels = tuple[int, ...]


class Contract(BaseModel):
    """Plain data that both ends agree on: strict types, no unknown fields, and numbers that are not finite are allowed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, ser_json_inf_nan="constants")

    def to_json(self) -> dict[str, JsonValue]:
        """What was given of the fields, as JSON data: defaults are the same at the other end."""
        return self.model_dump(mode="json", exclude_unset=True, warnings=False)

    @classmethod
    def read(cls, body: object) -> Self:
        """The contract in ``body``, JSON data. Raises ContractError."""
        try:
            return cls.model_validate_json(json.dumps(body))
        except ValidationError as error:
            raise wrong_shape(error) from None


def wrong_shape(error: ValidationError) -> ContractError:
    """pydantic's error as ours: the first problem by the name of its field, the others counted. The input is never quoted."""
    first, *others = error.errors(include_url=False, include_input=False)
    field = ".".join(str(part) for part in first["loc"])[:200] or None
    more = f" ({len(others)} more problem{'s' if len(others) > 1 else ''})" if others else ""
    where = f"{error.title}.{field}" if field else error.title
    return ContractError(
        f"{where}: {first['msg']}{more}. Both ends of a task have to be of one version of selfpruner.", param=field
    )


class TaskResult(Contract):
    """Filled in by what runs the handler: ``worker`` that did it, the seconds it was ``busy``, and ``parts``, what these went into;
    ``peak_mib``: the largest resident size of the worker's process meanwhile, in MiB."""

    peak_mib: float = 0.0
    busy: float = 0.0
    worker: str = ""
    parts: tuple[Stage, ...] = ()


R = TypeVar("R", bound=TaskResult, covariant=True)


class TaskRequest(Contract, Generic[R]):
    """A task that is answered by ``R``. ``kind`` is its name on the wire."""

    kind: ClassVar[str]

    @classmethod
    def result_type(cls) -> type[R]:
        """The class of the result, from the type parameter."""
        parameters = (base.__pydantic_generic_metadata__["args"] for base in cls.__mro__ if issubclass(base, TaskRequest))
        result: type[R] = next(filter(None, parameters))[0]
        return result

    def answered(self, result: TaskResult) -> R:
        """``result``, known to be what answers this. Raises ContractError where it is of another kind."""
        kind = self.result_type()
        if not isinstance(result, kind):
            raise ContractError(f"The task {self.kind!r} gave {type(result).__name__}, not {kind.__name__}.")
        return result


# -- making ready ------------------------------------------------------------------------------------------------------
class ModelFacts(Contract):
    """The dense model. ``channels`` of an FFN; ``decoder_parameters`` are those of all decoder layers."""

    name: str
    fingerprint: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    channels: int
    parameters: int
    decoder_parameters: int


class TextFacts(Contract):
    """One text: ``sequences`` of ``length`` tokens each; ``fingerprint`` identifies exactly these tokens."""

    sources: tuple[SourceUsed, ...]
    sequences: int
    length: int
    fingerprint: str


class PrepareResult(TaskResult):
    """``signals``: numbers measured on the dense model, see :class:`Signals`. ``seconds`` from the texts
    to the levels. ``streamed``: whether weights are read from their files when they are needed."""

    space: SearchSpace
    signals: Signals
    model: ModelFacts
    texts: dict[Role, TextFacts]
    dtype: str
    device: str
    streamed: bool
    seconds: float


class PrepareRequest(TaskRequest[PrepareResult]):
    """Make the session ready: model, these texts, statistics, levels. ``output``: the folder a checkpoint will be written to,
    looked at before anything takes its time."""

    kind: ClassVar[str] = "prepare"
    texts: tuple[Role, ...] = ("calibration", "fitness", "report")
    output: str | None = None


class BeginResult(TaskResult):
    """What several workers can do of the preparation. ``shares``: into how many parts the calibration text may be cut for its
    statistics, 0 where they are there already. ``layers`` are those to make factors or levels of; none where that is for one
    worker."""

    shares: int
    layers: tuple[int, ...]


class BeginRequest(TaskRequest[BeginResult]):
    """Look at everything that can be wrong, load the model, make the ``texts``. ``output`` as in :class:`PrepareRequest`. For so
    many ``workers``."""

    kind: ClassVar[str] = "begin"
    texts: tuple[Role, ...]
    workers: int
    output: str | None = None


class StatisticsResult(TaskResult):
    """``tokens`` that were walked through the model, in ``seconds``."""

    tokens: int
    seconds: float


class StatisticsRequest(TaskRequest[StatisticsResult]):
    """Collect the statistics of one of ``parts`` of the calibration text into the cache."""

    kind: ClassVar[str] = "statistics"
    part: int
    parts: int


class MakeResult(TaskResult):
    seconds: float


class MakeRequest(TaskRequest[MakeResult]):
    """Make factors or levels of ``layers`` in the cache, from statistics that are there in ``parts``, or whole (0)."""

    kind: ClassVar[str] = "make"
    layers: tuple[int, ...]
    parts: int


class ExpectResult(TaskResult):
    """The search space as it will be, up to what a criterion leaves of weights."""

    space: SearchSpace


class ExpectRequest(TaskRequest[ExpectResult]):
    """The space before anything is measured. ``output`` as in :class:`PrepareRequest`."""

    kind: ClassVar[str] = "expect"
    output: str | None = None


# -- judging plans -----------------------------------------------------------------------------------------------------
class ScoreRow(Contract):
    """One plan on some tokens: ``kl`` from the dense model and ``nll``, or None and the ``reason`` where they are not finite.
    ``rejected``: a race ended early for it, its figures are estimates and ``tokens`` what was spent on it. ``too_large``: it did
    not fit the device even alone."""

    kl: float | None
    nll: float | None
    tokens: int
    reason: str | None = None
    rejected: bool = False
    too_large: bool = False

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.kl is None) != (self.nll is None):
            raise ValueError("kl and nll are both numbers, or both null")
        return self


class RaceTerms(Contract):
    """Of the plans at the indices ``contenders`` only ``keep`` will be kept, so others may be dropped early, each with this
    ``confidence``; see :mod:`selfpruner.evaluation.race`."""

    keep: int
    contenders: tuple[int, ...]
    confidence: float = 0.99


class SequenceSums(Contract):
    """What scores are made of: per plan sums of the ``kl`` over stretches of single sequences (see
    :mod:`selfpruner.evaluation.tally`), sequence after sequence, and of the ``nll`` over sequences of ``length`` tokens. Those of a
    plan that is too large are empty."""

    length: int
    kl: tuple[tuple[float, ...], ...]
    nll: tuple[tuple[float, ...], ...]


class EvaluateResult(TaskResult):
    """One row per plan, in the order asked. ``passes`` through a layer, and what they would have been without shared prefixes.
    ``tasks``: how many it was split into."""

    rows: tuple[ScoreRow, ...]
    seconds: float
    passes: int
    passes_without_sharing: int
    sums: SequenceSums | None = None
    tasks: int = 1


class EvaluateRequest(TaskRequest[EvaluateResult]):
    """Score plans on the same tokens. ``exact``: whether expectations over the vocabulary are exact; by default on the text
    ``report`` only. With ``sums``, and then without a race, they come back too: the request is a part of a larger one."""

    kind: ClassVar[str] = "evaluate"
    plans: tuple[Levels, ...]
    text: Role
    sequences: tuple[int, ...]
    piece: int | None = None
    exact: bool | None = None
    race: RaceTerms | None = None
    sums: bool = False


class SlopesResult(TaskResult):
    """The plan's ``kl``, and per move the ``first`` term of its change in nats and the ``size`` of what it does to the block's
    output as a share of that output's ``energy``; means over ``tokens``. See :mod:`selfpruner.evaluation.slopes`."""

    kl: float
    first: tuple[float, ...]
    size: tuple[float, ...]
    energy: tuple[float, ...]
    tokens: int
    seconds: float


class SlopesRequest(TaskRequest[SlopesResult]):
    """What every move (block, level) away from ``plan`` would change, from one walk forth and back."""

    kind: ClassVar[str] = "slopes"
    plan: Levels
    moves: tuple[tuple[int, int], ...]
    text: Role
    sequences: tuple[int, ...]
    piece: int | None = None


class BaselineResult(ScoreRow, TaskResult):
    """The uniform plan's score, and the ``parameters`` it leaves of the model."""

    parameters: int
    seconds: float


class BaselineRequest(TaskRequest[BaselineResult]):
    """Score the uniform plan of the same config with ``changes``, another criterion or compensation. The worker gives up its
    session for that."""

    kind: ClassVar[str] = "baseline"
    changes: dict[str, str]
    text: Role
    sequences: tuple[int, ...]


class MeasureRow(Contract):
    """One model: its ``parameters``, and tokens per second of reading a prompt and of writing after it, at batch 1, where timed."""

    parameters: int
    prefill_tps: float | None = None
    decode_tps: float | None = None

    @property
    def figures(self) -> Figures:
        """Those there are, as a report has them."""
        found: Figures = {"parameters": self.parameters}
        if self.prefill_tps is not None:
            found["prefill_tps"] = self.prefill_tps
        if self.decode_tps is not None:
            found["decode_tps"] = self.decode_tps
        return found


class MeasureResult(TaskResult):
    """One row per name. ``not_timed``: why there are no speeds."""

    rows: dict[str, MeasureRow]
    not_timed: str | None = None


class MeasureRequest(TaskRequest[MeasureResult]):
    """Build the plans, by name, and time them in turn; all-zero levels are the dense model itself. Without ``decode`` only reading
    is timed."""

    kind: ClassVar[str] = "measure"
    plans: dict[str, Levels]
    decode: bool = True


class GenerateResult(TaskResult):
    """How much the text of each plan repeats itself, in [0, 1]."""

    repetition: dict[str, float]
    seconds: float


class GenerateRequest(TaskRequest[GenerateResult]):
    """Let plans, by name, write ``new_tokens`` greedily after the first ``prompt`` tokens of each sequence; all-zero levels are the
    dense model itself. A worker whose model is streamed cannot, and raises ConfigError."""

    kind: ClassVar[str] = "generate"
    plans: dict[str, Levels]
    text: Role
    sequences: tuple[int, ...]
    prompt: int
    new_tokens: int


class TimeBlocksResult(TaskResult):
    """Microseconds of one prefill of ``tokens`` tokens at batch 1: per block and level, and of the ``rest``, which no plan
    changes."""

    tokens: int
    blocks: tuple[tuple[float, ...], ...]
    rest: float


class TimeBlocksRequest(TaskRequest[TimeBlocksResult]):
    """Time every block at every level on the worker's device."""

    kind: ClassVar[str] = "time_blocks"
    tokens: int


# -- writing -----------------------------------------------------------------------------------------------------------
class ProposeResult(TaskResult):
    """The reply of ``model``, JSON under the schema asked for."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class ProposeRequest(TaskRequest[ProposeResult]):
    """Let the dense model answer ``messages`` (role and content); ``reply_schema`` is the JSON schema of the reply."""

    kind: ClassVar[str] = "propose"
    messages: tuple[dict[str, str], ...]
    reply_schema: dict[str, JsonValue]
    temperature: float
    max_tokens: int
    seed: int


class ExportResult(TaskResult):
    """The checkpoint in the folder ``path``. ``bytes`` are those of its weight files; ``reused``: it was there already."""

    path: str
    parameters: int
    bytes: int
    manifest_sha256: str
    verification: dict[str, JsonValue]
    write_seconds: float
    verify_seconds: float
    reused: bool


class ExportRequest(TaskRequest[ExportResult]):
    """Write the plan's checkpoint to ``directory`` and verify it."""

    kind: ClassVar[str] = "export"
    plan: Levels
    directory: str
    card: CardInfo
