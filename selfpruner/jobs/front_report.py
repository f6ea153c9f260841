"""What a report says about a front: every member's figures on the held-out text, and its speed where latency is an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from selfpruner.evolution.evaluator import Evaluator
from selfpruner.evolution.extras import Extras, finite
from selfpruner.evolution.front import Latencies, Member
from selfpruner.planning.space import SearchSpace
from selfpruner.records import Window
from selfpruner.workers.base import Json, Session, WorkerPool

# Members timed at once, beside the dense model: each of them is held in memory.
TOGETHER = 3


async def front_rows(
    members: Sequence[Member],
    *,
    best: str,
    metric: str,
    prepared: Json,
    space: SearchSpace,
    evaluator: Evaluator,
    windows: Sequence[Window],
    pool: WorkerPool,
    session: Session,
    tell: Callable[[str], None],
    extras: Extras,
) -> list[dict[str, Any]]:
    """One row per member, best quality first: ``plan``, ``operator``, ``levels``, ``layer_rates``, ``rate``, ``parameters``,
    ``fitness`` (where it was chosen), ``kl`` and ``perplexity`` (on ``windows``), ``best`` (whether it is the job's own plan).

    With latency also ``latency_us``, the sum of what its blocks take, and ``prefill_tps`` and ``speedup``, measured on the built
    model, the latter against the dense model in the same rounds; these two are missing where the models do not fit the memory.
    """
    tell("front: scoring on the held-out text")
    counted = evaluator.evaluations
    scores = await evaluator.score([member.plan for member in members], windows)
    evaluator.evaluations = counted  # the report's figures are no part of the search's cost
    rows = []
    for member in members:
        candidate, score = member.candidate, scores[member.candidate.plan_hash]
        rows.append(
            {
                "plan": candidate.plan_hash,
                "operator": candidate.operator,
                "rate": member.rate,
                "parameters": prepared["model"]["parameters"] - space.removed(member.plan),
                "fitness": member.values(metric)[0],
                "kl": finite(score.kl),
                "perplexity": finite(score.perplexity),
                "levels": list(candidate.levels),
                "layer_rates": [round(rate, 4) for rate in space.layer_rates(member.plan)],
                "best": candidate.plan_hash == best,
                **({} if member.latency is None else {"latency_us": round(member.latency, 1)}),
            }
        )
    timed = [member for member in members if member.latency is not None]
    for start in range(0, len(timed), TOGETHER):
        tell(f"front: timing plans {start + 1} to {min(start + TOGETHER, len(timed))} of {len(timed)}")
        part = {member.candidate.plan_hash: list(member.candidate.levels) for member in timed[start : start + TOGETHER]}
        plans = {"dense": list(space.dense.levels), **part}
        asked = {"plans": plans, "decode": False}
        nothing: Json = {}
        tried = await extras.attempt("timing", "A front was not timed", partial(pool.run, session, "measure", asked, tell), nothing)
        found = tried.get("rows", {})
        for row in rows:
            if "prefill_tps" in found.get(row["plan"], {}):
                row["prefill_tps"] = found[row["plan"]]["prefill_tps"]
                row["speedup"] = round(row["prefill_tps"] / found["dense"]["prefill_tps"], 3)
    return rows


async def latencies_of(pool: WorkerPool, session: Session, tokens: int, tell: Callable[[str], None]) -> Latencies:
    """What every block takes at every level on the pool's device."""
    found = await pool.run(session, "time_blocks", {"tokens": tokens}, tell)
    return Latencies(int(found["tokens"]), tuple(tuple(times) for times in found["blocks"]), float(found["rest"]))
