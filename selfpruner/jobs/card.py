"""What a checkpoint's model card is told about the job, or the single plan, that made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from selfpruner.config import SearchConfig
from selfpruner.files.card_info import CardInfo
from selfpruner.files.report import Report
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.workers.tasks import PrepareResult

# Figures of a report that the card and the database keep with the checkpoint, for these models.
FIGURES: tuple[Literal["parameters", "kl", "perplexity", "prefill_tps", "decode_tps"], ...] = (
    "parameters",
    "kl",
    "perplexity",
    "prefill_tps",
    "decode_tps",
)
MODELS: tuple[Literal["dense", "uniform", "best"], ...] = ("dense", "uniform", "best")


def card(
    config: SearchConfig,
    prepared: PrepareResult,
    space: SearchSpace,
    plan: Plan,
    *,
    job_id: str | None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
) -> CardInfo:
    """``rate`` is the one asked for where the plan meets it."""
    return CardInfo(
        base_model=prepared.model.name,
        rate=config.rate if space.meets_budget(plan) else space.removed(plan) / space.total,
        of=config.of,
        pattern=config.pattern,
        criterion=config.criterion,
        compensation=config.compensation,
        calibration=tuple(share["source"] for share in prepared.texts["calibration"].sources),
        plan_hash=plan.hash,
        levels=plan.levels,
        layer_rates=tuple(space.layer_rates(plan)),
        metrics=metrics or {},
        job_id=job_id,
    )


def metrics(report: Report) -> dict[str, dict[str, float]]:
    """The figures of ``report`` that there are."""
    return {name: {key: value for key in FIGURES if (value := report[name].get(key)) is not None} for name in MODELS}
