"""What a prompt says about the search so far: scores, known plans, hints, lessons. Plain text from plain values.

Scores are whole points. Known plans are listed with the best last, and all but the best are described by their differences where
that is shorter: what changed, and what it did to the score, is what a model can learn from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from selfpruner.operators.base import Context
from selfpruner.operators.plan_format import PlanFormat
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.records import Candidate

# Plans that have less than this share of what is removed in other places count as one: the parameters of a single FFN step are
# 0.2 to 0.5 % of it, and what moving them does to the score is a fraction of the point to which scores are told.
NEAR = 0.003
_HISTORY, _PENDING, _LOOKED_AT = 24, 8, 200
_FEW = 12  # changes that say more than a list of all rates
_HINTS = 4  # of each direction
_HEARD = 0.05  # percent of the score; smaller predictions are noise


def moved(space: SearchSpace, first: Sequence[int], second: Sequence[int]) -> float:
    """How far apart two plans (levels) are: parameters removed in other places, as a share of all that is removed. 0 to 1."""
    gaps = [block.removed(a) - block.removed(b) for block, a, b in zip(space.blocks, first, second, strict=True) if a != b]
    up = sum(gap for gap in gaps if gap > 0)
    return max(up, up - sum(gaps)) / space.target


def score(context: Context, candidate: Candidate) -> str:
    """A candidate's score in whole points: differences below one are noise a model would read meaning into."""
    points = _points(context, candidate)
    return "unknown" if points is None else f"{points:.0f}"


def scale(context: Context) -> str:
    relative = any(candidate.relative is not None for candidate in (*context.history, *context.population))
    return f"100 = {'the uniform plan' if relative else 'the best known'}, lower is better"


def best_score(context: Context) -> str:
    """The score to beat; empty before anything was scored."""
    return score(context, context.history[0]) if context.history else ""


def change(context: Context, child: Candidate, parent: Candidate | None) -> float | None:
    """Points from the parent's score to the child's, negative = better; a child without parents starts from the uniform plan."""
    after = _points(context, child)
    before = 100.0 if parent is None and child.relative is not None else None if parent is None else _points(context, parent)
    return None if after is None or before is None else after - before


def entry(context: Context, plans: PlanFormat, candidate: Candidate) -> dict[str, str]:
    return {"score": score(context, candidate), "plan": plans.write(context.space.rates(Plan(candidate.levels)))}


def apart(context: Context, plans: PlanFormat, first: Candidate, second: Candidate) -> str:
    """How the second plan differs from the first; empty where they differ in too much to be told so."""
    before, after = (context.space.rates(Plan(candidate.levels)) for candidate in (first, second))
    changed = plans.differences(before, after)
    return plans.tell(before, after, changed) if len(changed) <= _FEW else ""


def known_plans(
    context: Context, plans: PlanFormat, elsewhere: frozenset[str], unscored: Iterable[Sequence[int]]
) -> list[dict[str, str]]:
    """Unscored plans, then scored ones, best last; without plans shown ``elsewhere`` in the prompt and near twins of others."""
    space = context.space
    levels = [candidate.levels for candidate in context.pending[-_PENDING:]] + list(unscored)
    if not context.history:
        return [{"score": "not scored", "plan": plans.write(space.rates(Plan(tuple(each))))} for each in levels]
    best = context.history[0]
    base = space.rates(Plan(best.levels))

    def told(each: Sequence[int]) -> str:
        rates = space.rates(Plan(tuple(each)))
        changed = plans.differences(base, rates)
        short, full = f"the best, but {plans.tell(base, rates, changed)}", plans.write(rates)
        return short if changed and (len(changed) <= _FEW or len(short) < len(full)) else full

    kept = [best]
    for candidate in context.history[1:_LOOKED_AT]:
        if len(kept) == _HISTORY:
            break
        alike = any(moved(space, candidate.levels, other.levels) < 2 * NEAR for other in kept)
        if candidate.plan_hash not in elsewhere and not alike:
            kept.append(candidate)
    if len(kept) == 1 and not levels and best.plan_hash in elsewhere:
        return []
    scored = [{"score": score(context, candidate), "plan": told(candidate.levels)} for candidate in reversed(kept[1:])]
    # Plans without a score stand where they cannot pass for good ones.
    return [*({"score": "not scored", "plan": told(each)} for each in levels), *scored, entry(context, plans, best)]


def hints(context: Context, plans: PlanFormat) -> list[str]:
    """Where it is predicted to pay to keep more and where to remove more, strongest first; empty where nothing is predicted."""
    if not context.hints or not context.history:
        return []
    space = context.space
    rates = space.rates(Plan(context.history[0].levels))
    gains: dict[int, float] = {}
    for hint in context.hints:
        dial = plans.dial_of(hint.block)
        if dial is not None:
            gains[dial] = gains.get(dial, 0.0) + hint.gain
    lines = []
    for title, sign, possible in (
        ("lower the rate of", 1, {d for d in gains if rates[d] > 0}),
        ("raise the rate of", -1, {d for d in gains if rates[d] < space.dials[d].rate(-1)}),
    ):
        chosen = sorted((d for d in possible if sign * gains[d] <= -_HEARD), key=lambda d: (sign * gains[d], d))[:_HINTS]
        said = [f"{plans.name(d)} ({100 * rates[d]:.0f}, {sign * gains[d]:+.1f} %)" for d in chosen]
        if said:
            lines.append(f"{title} {', '.join(said)}")
    return lines


def lessons(context: Context) -> list[str]:
    """What was learnt, the newest last."""
    return [text for text in (context.reflections.long, context.reflections.short) if text]


def informed_by(context: Context) -> int | None:
    """The latest generation with a score in this context."""
    return max((candidate.generation for candidate in context.history), default=None)


def _points(context: Context, candidate: Candidate) -> float | None:
    if candidate.relative is not None:
        return 100 * candidate.relative
    best = min((c.fitness for c in (*context.history, *context.population) if c.fitness is not None), default=None)
    if candidate.fitness is None or best is None or best <= 0:
        return None
    return 100 * candidate.fitness / best
