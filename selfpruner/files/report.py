"""The report of a job: the content of result.json and of the column ``job.result``. Imports no torch.

Reports of earlier versions lack some of it, and what could not be had is left out; ``missing`` says why. All of it is JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from selfpruner.config import Role

# Models that a report has figures of; the two last are baselines as is usual without retraining.
Subject = Literal["dense", "uniform", "ramp", "best", "uniform_flap_bias", "uniform_magnitude"]


class Figures(TypedDict, total=False):
    """One model on the held-out text. ``parameters``, of which zeros are none; ``kl`` in nats per token from the dense model;
    speeds at batch 1; ``repetition``: how much of its greedy text repeats itself."""

    parameters: int
    kl: float | None
    perplexity: float | None
    tokens: int
    prefill_tps: float
    decode_tps: float
    repetition: float


class SourceUsed(TypedDict):
    """One source of a text as it was used: its share of the whole, and how many sequences that made."""

    source: str
    weight: float
    sequences: int


class TextUsed(TypedDict):
    """:class:`selfpruner.workers.tasks.TextFacts` in a report; those of earlier versions have no fingerprint."""

    sources: list[SourceUsed]
    sequences: int
    length: int
    fingerprint: NotRequired[str]


class ModelUsed(TypedDict):
    """:class:`selfpruner.workers.tasks.ModelFacts` in a report; those of earlier versions have no fingerprint."""

    name: str
    fingerprint: NotRequired[str]
    family: str
    layers: int
    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    channels: int
    parameters: int
    decoder_parameters: int


class Inputs(TypedDict):
    """What was pruned, with what and where."""

    model: ModelUsed
    texts: dict[Role, TextUsed]
    dtype: str
    device: str


class Target(TypedDict):
    rate: float
    of: str
    parameters_to_remove: int


class MethodUsed(TypedDict):
    pattern: str
    criterion: str
    compensation: str
    preset: str


class BestPlan(TypedDict):
    """``removed``: parameters."""

    hash: str
    operator: str
    levels: list[int]
    layer_rates: list[float]
    removed: int


class Contribution(TypedDict):
    """Plans that an operator made, and how many of them improved the best."""

    made: int
    improved: int


class StageShare(TypedDict):
    """What a stage took, see :class:`selfpruner.stages.Stage`; ``share`` of all seconds."""

    stage: str
    seconds: float
    share: float
    tokens: int
    workers: int
    peak_mib: int


class FrontRow(TypedDict):
    """A member of a front: ``fitness`` where it was chosen, ``kl`` and ``perplexity`` on the held-out text, ``best``: whether it is
    the job's own plan. With latency also ``latency_us``, the sum of what its blocks take, and ``prefill_tps`` and ``speedup``,
    measured on the built model, the latter against the dense model in the same rounds."""

    plan: str
    operator: str
    rate: float
    parameters: int
    fitness: float
    kl: float | None
    perplexity: float | None
    levels: list[int]
    layer_rates: list[float]
    best: bool
    latency_us: NotRequired[float]
    prefill_tps: NotRequired[float]
    speedup: NotRequired[float]


class LatencyTerms(TypedDict):
    """What a front's latencies are made of: microseconds of a prefill of ``prompt_tokens``."""

    prompt_tokens: int
    dense_us: float
    unpruned_us: float


class Report(TypedDict, total=False):
    """``tokens``: plan-tokens that the search was charged; ``stopped``: why its generations ended; ``tokens_saved``: at most, by
    ending early; ``rank_correlation``: predicted against measured; ``seconds``: of the last run, where ``stages`` have those of all
    its runs; ``missing``: why something could not be had, by what failed (``scores``, ``timing``, ``baseline``, ``front``,
    ``latency``, ``generation_probe``)."""

    dense: Figures
    uniform: Figures
    ramp: Figures
    best: Figures
    uniform_flap_bias: Figures
    uniform_magnitude: Figures
    model: ModelUsed
    texts: dict[Role, TextUsed]
    dtype: str
    device: str
    target: Target
    method: MethodUsed
    best_plan: str
    plan: BestPlan
    front: list[FrontRow]
    latency: LatencyTerms
    evaluations: int
    plans: int
    tokens: int
    stopped: str
    tokens_saved: int
    rank_correlation: float | None
    seconds: float
    stages: list[StageShare]
    peak_worker_mib: int
    operators: dict[str, Contribution]
    checkpoint: str
    verification: Mapping[str, object]
    missing: dict[str, str]
