"""A model's figures on held-out text, from all workers of a pool: each takes a part of the sequences. Imports no torch."""

from __future__ import annotations

import math

from selfpruner.config import TextConfig
from selfpruner.evaluation import split
from selfpruner.judging.tasks import HeldOutRequest, HeldOutResult
from selfpruner.progress import OnProgress
from selfpruner.workers.base import Session, WorkerPool


async def held_out(
    pool: WorkerPool, session: Session, text: TextConfig, against: str | None, progress: OnProgress
) -> HeldOutResult:
    """Means over the tokens of all parts."""
    parts = 1 if text.sequences < pool.workers or _written(text) else pool.workers
    asked = [HeldOutRequest(text=text, against=against, part=part, parts=parts) for part in range(parts)]
    found = await split.together(pool.run(session, request, progress) for request in asked)
    if parts == 1:
        return found[0]
    tokens = sum(one.tokens for one in found)
    nll = math.fsum(math.log(one.perplexity) * one.tokens for one in found) / tokens
    kls = [one.kl * one.tokens for one in found if one.kl is not None]
    kl = math.fsum(kls) / tokens if len(kls) == parts else None
    return found[0].model_copy(update={"tokens": tokens, "perplexity": math.exp(nll), "kl": kl})


def _written(text: TextConfig) -> bool:
    """Whether a model has to write some of it first, which every worker would do for itself."""
    return any(source.source == "self" for source in text.sources)
