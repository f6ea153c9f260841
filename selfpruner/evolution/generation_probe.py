"""The generation probe: does the plan that won the final also write well? It compares the few that could take its place.

KL says how near a plan's next-token distributions are to the dense model's on given text. A model that writes continues its own
words, where small errors feed each other until it runs in circles. The best plan stays the best unless it repeats itself much more
than the dense model does while another one, hardly worse in KL, does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selfpruner.evolution.evaluator import Evaluator, Fitness
from selfpruner.evolution.extras import survived
from selfpruner.planning.space import Plan
from selfpruner.records import Candidate, Recorder, Window

# The task is small beside the final: eight prompts for each of at most three plans and the dense model.
ENTRANTS, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 8, 32, 48
# Who may take the best plan's place (in relative KL), when (rate above the dense model's), and for what (rate below its own).
CLOSE, TOO_MUCH, LESS = 0.02, 0.1, 0.05


async def probe_writing(
    finalists: Sequence[Candidate], scores: Mapping[str, Fitness], evaluator: Evaluator, recorder: Recorder, window: Window
) -> tuple[Candidate, dict[str, float], str | None]:
    """The plan to take of ``finalists`` (best first, at least one), and repetition rates by plan hash and ``dense``: empty where
    the worker cannot write, and then why, which an event says too. ``scores`` are theirs; ``window`` gives the prompts."""
    best = finalists[0]
    near = scores[best.plan_hash].kl * (1 + CLOSE)
    entrants = [best, *(c for c in finalists[1:ENTRANTS] if scores[c.plan_hash].kl <= near)]
    try:
        rates = await evaluator.repetition(
            {c.plan_hash: Plan(c.levels) for c in entrants},
            Window(window.name, window.text, window.sequences[:PROMPTS]),
            prompt=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
        )
    except Exception as error:
        reason = survived(error)
        message = f"The best plans were not made to write: {reason}"
        recorder.event("repetition", "search.generation_probe", message, level="warn", data={"reason": reason})
        return best, {}, reason
    chosen = choose(entrants, rates)
    message = (
        f"Greedy text of {best.plan_hash} repeats {100 * rates[best.plan_hash]:.0f} % of itself, the dense model's "
        f"{100 * rates['dense']:.0f} %."
    )
    if chosen is not best:
        message += f" {chosen.plan_hash} is taken instead: {100 * rates[chosen.plan_hash]:.0f} %, and nearly as low in KL."
    recorder.event("repetition", "search.generation_probe", message, data={"repetition": rates, "chosen": chosen.plan_hash})
    return chosen, rates, None


def choose(entrants: Sequence[Candidate], rates: Mapping[str, float]) -> Candidate:
    """The first of ``entrants``, which are close in KL, unless it repeats itself too much and a later one clearly less."""
    best = entrants[0]
    own = rates[best.plan_hash]
    if own - rates["dense"] <= TOO_MUCH:
        return best
    return next((other for other in entrants[1:] if rates[other.plan_hash] <= own - LESS), best)
