"""Does choosing operators by a bandit cost anything? The whole search against each of its operators alone, at equal seconds.

    python -m benchmarks.bandit --seeds 10

Dozens of searches are needed for an answer, so their fitness is a stand-in: search space and sensitivities are the real model's, a
plan's KL a sum of losses per block and level that scatter around what those two say, and every window of tokens weighs the
blocks a little differently, as windows of text do (size of both as surveyed on the real model). Plans, operators,
bandit and landscape are the product's own. Seconds are counted, not measured: plan-tokens at a given speed, and an LLM that
answers rubbish after a given time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from benchmarks.judge import Bench, Settings, TraceRecorder
from selfpruner.api import default_cache
from selfpruner.config import SearchConfig
from selfpruner.evolution.evaluator import FIRST, SLOPE_PASSES, Evaluator
from selfpruner.evolution.loop import Search
from selfpruner.evolution.survey import FORESIGHT, probe_level
from selfpruner.evolution.windows import Windows
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.progress import OnProgress
from selfpruner.proposers import ProposerSettings
from selfpruner.proposers.base import Reply, Request
from selfpruner.proposers.llm_calls import LlmChannel
from selfpruner.records import LlmCall
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import EvaluateRequest, EvaluateResult, R, ScoreRow, SlopesRequest, SlopesResult, TaskRequest

LENGTH, SEQUENCES = 256, 512
# Losses against those expected: FFNs together, spread (log-normal) of an FFN, of an attention block, of an attention shape. And of
# a block's weight, and of that of all blocks of a kind, in a sequence of 256 tokens.
FFNS, FFN, ATTENTION, SHAPE, WINDOW, KIND = 0.77, 0.08, 0.15, 0.35, 0.9, 0.27


class World:
    """A pool whose evaluations are made up; ``speed`` in plan-tokens per second."""

    workers = 1

    def __init__(self, space: SearchSpace, weights: Sequence[float], seed: int, speed: float) -> None:
        self.space, self.speed, self.seconds = space, speed, 0.0
        rng = np.random.default_rng(seed)
        self.losses = []
        for block, weight in zip(space.blocks, weights, strict=True):
            errors = np.maximum.accumulate([option.error for option in block.options])
            drawn = rng.standard_normal(1 + len(errors))
            if block.kind == "ffn":
                curve = weight * FFNS * math.exp(FFN * drawn[0]) * errors
            else:
                curve = weight * math.exp(ATTENTION * drawn[0]) * np.exp(SHAPE * drawn[1:]) * errors
            self.losses.append(curve)

    def kl(self, plan: Plan, weights: Sequence[float] | None = None) -> float:
        parts = [float(curve[level]) for curve, level in zip(self.losses, plan.levels, strict=True)]
        return math.fsum(parts if weights is None else (w * p for w, p in zip(weights, parts, strict=True)))

    def weights(self, sequence: int) -> Any:
        """What every block weighs on one sequence, 1 on average."""
        drawn = np.random.default_rng([7, sequence]).standard_normal(len(self.losses) + 2)
        kinds = np.array([drawn[-1] if block.kind == "ffn" else drawn[-2] for block in self.space.blocks])
        spread = math.sqrt(math.log(1 + WINDOW**2))
        return np.exp(spread * drawn[:-2] - spread**2 / 2) * np.maximum(1 + KIND * kinds, 0.1)

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:  # noqa: ARG002
        tasks: dict[type[TaskRequest[Any]], Callable[..., Any]] = {SlopesRequest: self._slopes, EvaluateRequest: self._evaluate}
        result: R = tasks[type(request)](request)
        return result

    def _mean_weights(self, sequences: Sequence[int]) -> list[float]:
        found: list[float] = np.mean([self.weights(number) for number in sequences], axis=0).tolist()
        return found

    def _slopes(self, request: SlopesRequest) -> SlopesResult:
        weights, here = self._mean_weights(request.sequences), request.plan
        tokens, passes = len(request.sequences) * LENGTH, SLOPE_PASSES + len(request.moves) // len(here)
        terms = [weights[block] * (self.losses[block][level] - self.losses[block][here[block]]) for block, level in request.moves]
        seconds = tokens * passes / self.speed
        self.seconds += seconds
        wrong = np.random.default_rng(request.sequences).normal(1, FORESIGHT, len(terms))
        first = tuple(float(term * error / FIRST) for term, error in zip(terms, wrong, strict=True))
        kl, zeros = self.kl(Plan(here), weights), (0.0,) * len(first)
        return SlopesResult(kl=kl, first=first, size=zeros, energy=zeros, tokens=tokens, seconds=seconds)

    def _evaluate(self, request: EvaluateRequest) -> EvaluateResult:
        weights, tokens = self._mean_weights(request.sequences), len(request.sequences) * LENGTH
        rows = tuple(ScoreRow(kl=self.kl(Plan(levels), weights), nll=3.0, tokens=tokens) for levels in request.plans)
        seconds = tokens * len(rows) / self.speed
        self.seconds += seconds
        return EvaluateResult(rows=rows, seconds=seconds, passes=0, passes_without_sharing=0)

    async def close(self) -> None:
        """Nothing to close."""


class Rubbish:
    """A proposer that answers every question within its schema and without sense, after ``latency`` seconds."""

    name = model = "rubbish"

    def __init__(self, latency: float) -> None:
        self.latency = latency

    async def complete(self, request: Request) -> Reply:
        rng = random.Random(request.seed)
        return Reply(json.dumps(_rubbish(request.schema, rng)), self.model, 1000, 200, self.latency)


def _rubbish(schema: Mapping[str, Any], rng: random.Random) -> Any:
    if "enum" in schema:
        return rng.choice(list(schema["enum"]))
    if schema["type"] == "object":
        return {name: _rubbish(part, rng) for name, part in schema["properties"].items()}
    if schema["type"] == "array":
        return [_rubbish(schema["items"], rng) for _ in range(schema.get("minItems", 1))]
    if schema["type"] == "string":
        return "keep more of what is kept"
    return rng.randint(int(schema.get("minimum", 0)), int(schema.get("maximum", 60)))


class Curve(TraceRecorder):
    """The trace of the best plan over counted seconds; ``channel`` adds the LLM's where they are not hidden."""

    def __init__(self, world: World) -> None:
        self.world, self.points = world, [(0.0, math.inf)]
        self.evaluations, self.calls, self.levels, self.first = {}, {}, {}, {}
        self._waited = 0.0
        self._scored = 0.0

    def save_candidates(self, rows: Sequence[Any]) -> None:
        for row in rows:
            self.levels[row.plan_hash] = row.levels

    def save_llm_call(self, call: LlmCall) -> None:
        self.calls[call.sequence] = call

    def event(self, key: str, type: str, message: str, *, level: Any = "info", data: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        best = (data or {}).get("best")
        if best in self.levels:
            # Questions are in flight while workers score: a generation takes the longer of the two.
            asked = sum(call.seconds for call in self.calls.values()) - self._waited
            scored = self.world.seconds - self._scored
            self._waited += asked
            self._scored += scored
            last = self.points[-1][0]
            self.points.append((last + max(asked, scored), self.world.kl(Plan(self.levels[best]))))


async def one(
    space: SearchSpace, operators: Sequence[str], seed: int, options: argparse.Namespace, *, bandit: bool = True
) -> Curve:
    llm = any(name in ("select", "crossover", "mutate") for name in operators)
    fields = {
        "rate": space.rate,
        "preset": "evolution",
        "initial": ["uniform", "ramp", "sensitivity"],
        "operators": list(operators),
        "bandit": bandit,
        "seed": seed,
        "budget_tokens": options.budget_tokens,
        "generations": 10_000,
        "patience": 0,
        "generation_probe": False,
        "fitness_text": {"sequences": SEQUENCES, "length": LENGTH},
    }
    config = SearchConfig.model_validate(fields)
    world = World(space, options.weights, seed, options.speed)
    recorder = Curve(world)
    evaluator = Evaluator(world, Session("bandit", {}, ""), recorder)
    windows = Windows.of(config)
    channel = None
    if llm:
        settings = ProposerSettings(kind="openai", model="rubbish")
        channel = LlmChannel(Rubbish(options.latency), recorder, config.limits, settings, seed)
    await Search(config, space, evaluator, recorder, windows, channel).run()
    return recorder


async def measured(model: str, cache: Path) -> tuple[SearchSpace, list[float]]:
    """The model's search space, and per block nats of KL per unit of relative error; kept in the cache."""
    settings = Settings(model, "obs", "least_squares", 10**9)
    kept = cache / "benchmarks" / f"bandit-{settings.fingerprint()}.json"
    if not kept.exists():
        bench = Bench(settings, [0.2], cache)
        try:
            await bench.prepare(print)
            run = bench.run(0.2, 0)
            levels = [probe_level(run.space, block) for block in range(len(run.space.blocks))]
            plans = [Plan(tuple(level * (other == block) for other in range(len(levels)))) for block, level in enumerate(levels)]
            values = await run.score(plans, run.fresh(1024))
        finally:
            await bench.close()
        errors = [block.options[level].error for block, level in zip(run.space.blocks, levels, strict=True)]
        weights = [max(kl, 1e-6) / max(error, 1e-9) for kl, error in zip(values, errors, strict=True)]
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"space": TypeAdapter(SearchSpace).dump_python(run.space), "weights": weights}), "utf-8")
    found = json.loads(kept.read_text("utf-8"))
    return TypeAdapter(SearchSpace).validate_python(found["space"]), found["weights"]


def at(curve: Curve, seconds: float) -> float:
    """KL of the best plan after so many seconds."""
    return [kl for when, kl in curve.points if when <= seconds + 1e-9][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rate", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget-tokens", type=int, default=250_000)
    parser.add_argument("--speed", type=float, default=1500.0, help="plan-tokens per second")
    parser.add_argument("--latency", type=float, default=10.0, help="seconds of one answer of the LLM")
    options = parser.parse_args()
    whole, options.weights = asyncio.run(measured(options.model, default_cache()))
    classical = ("reallocate", "level_switch", "recombine")
    cases: dict[str, tuple[tuple[str, ...], bool]] = {name: ((name,), True) for name in classical}
    cases |= {
        "all, bandit": (classical, True),
        "all, even shares": (classical, False),
        "all and rubbish LLM, bandit": (("select", "crossover", "mutate", *classical), True),
        "all and rubbish LLM, even": (("select", "crossover", "mutate", *classical), False),
    }
    for rate in options.rate:
        space = replace(whole, rate=rate)
        curves = {
            name: [asyncio.run(one(space, operators, seed, options, bandit=bandit)) for seed in range(options.seeds)]
            for name, (operators, bandit) in cases.items()
        }
        # Equal seconds: those of the shortest run of each seed.
        ends = [min(curve[seed].points[-1][0] for curve in curves.values()) for seed in range(options.seeds)]
        finals = {name: [at(curve, end) for curve, end in zip(runs, ends, strict=True)] for name, runs in curves.items()}
        single = min(classical, key=lambda name: statistics.mean(finals[name]))
        print(f"rate {rate:g}: mean KL of the best plan after {statistics.mean(ends):.0f} counted seconds, {options.seeds} seeds")
        for name, values in finals.items():
            against = statistics.mean(value / best for value, best in zip(values, finals[single], strict=True))
            print(f"  {name:30} {statistics.mean(values):.4f}   {100 * (against - 1):+6.2f} % against {single} alone")


if __name__ == "__main__":
    main()
