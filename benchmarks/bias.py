"""What the bias of the repair is worth: ``least_squares`` against ``least_squares_weights``, the same plans, the same units.

    python -m benchmarks.bias --seeds 0 1 2 --rates 0.2 0.3

For every seed the units are ordered by ``obs`` on its own calibration sequences, half WikiText-2 train and half C4. Two plans of
each rate, uniform and a ramp from 0.4 to 1.6 of the rate over the depth, are made of the shapes that both spaces have. Judged one
by one on the same sequences of WikiText-2 test and of C4's report part for all seeds, so that everything is paired. The interval is
a bootstrap of seeds and of sequences, each drawn again with replacement.

Results are kept after every sequence, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import text
from selfpruner import models
from selfpruner.api import config_of, default_cache
from selfpruner.evaluation.session import Prepared, prepare, text_of
from selfpruner.planning.space import Block, Option, Plan, SearchSpace

REPAIRS = ("least_squares", "least_squares_weights")
JUDGES = ("wikitext2-test", "c4")
LENGTH = 512
DRAWS = 10_000
Row = dict[str, dict[str, float]]  # by plan: kl and nll per token of one sequence


def config(options: argparse.Namespace, repair: str, seed: int, judge: str, cache: Path) -> Any:
    def of(names: Sequence[str], sequences: int) -> dict[str, Any]:
        return {"sources": [{"source": text(name, cache)} for name in names], "sequences": sequences, "length": LENGTH}

    return config_of(
        {
            "model": options.model,
            "rate": options.rates[0],
            "preset": "evolution",
            "seed": seed,
            "dtype": options.dtype,
            "compensation": repair,
            "calibration": of(["wikitext2-train", "c4"], options.calibration),
            "report_text": of([judge], options.sequences),
        }
    )


def plans_of(space: SearchSpace, rates: Sequence[float]) -> dict[str, Plan]:
    last = space.layers - 1
    shares = {"uniform": [1.0] * space.layers, "ramp": [0.4 + 1.2 * layer / last for layer in range(space.layers)]}
    found: dict[str, Plan] = {}
    for rate in rates:
        of = SearchSpace(space.blocks, space.total, rate, space.step, space.granularity)
        found |= {f"{rate:g} {name}": of.project([rate * share for share in wanted]) for name, wanted in shares.items()}
    return found


def shape(option: Option) -> tuple[int, int, int]:
    return option.kv_groups, option.heads_per_group, option.channels


def common(space: SearchSpace, other: SearchSpace) -> SearchSpace:
    """``space`` with the options that ``other`` has, too: of heads that cost the same each keeps those that it repairs best."""
    blocks = []
    for block, theirs in zip(space.blocks, other.blocks, strict=True):
        known = {shape(option) for option in theirs.options}
        blocks.append(Block(block.layer, block.kind, tuple(option for option in block.options if shape(option) in known)))
    return SearchSpace(tuple(blocks), space.total, space.rate, space.step, space.granularity)


def shape_by_shape(plan: Plan, source: SearchSpace, target: SearchSpace) -> Plan:
    """The plan of ``target`` that keeps what ``plan`` keeps in ``source``."""
    levels = []
    for block, other, level in zip(source.blocks, target.blocks, plan.levels, strict=True):
        levels.append([shape(option) for option in other.options].index(shape(block.options[level])))
    return Plan(tuple(levels))


def measured(loaded: models.LoadedModel, options: argparse.Namespace, seed: int, known: dict[str, list[Row]], cache: Path) -> Any:
    """Fill ``known``, rows by repair and text, and yield after each row."""
    # The text of the report does not depend on the seed: all seeds are judged on the same sequences.
    tokens = {
        judge: text_of(config(options, REPAIRS[0], 0, judge, cache), "report", loaded, cache, lambda _: None, lambda: False).tokens
        for judge in JUDGES
    }

    def ready(repair: str) -> Prepared:
        return prepare(config(options, repair, seed, JUDGES[0], cache), loaded, cache, [], lambda _: None, lambda: False)

    shared = common(*(ready(repair).space for repair in REPAIRS))
    wanted = plans_of(shared, options.rates)
    for repair in REPAIRS:
        prepared = ready(repair)
        plans = {name: shape_by_shape(plan, shared, prepared.space) for name, plan in wanted.items()}
        for judge in JUDGES:
            rows = known.setdefault(f"{repair} {judge}", [])
            for index in range(len(rows), options.sequences):
                scores = prepared.engine.evaluate(list(plans.values()), tokens[judge][index : index + 1])
                rows.append(
                    {
                        name: {"kl": round(score.kl, 6), "nll": round(score.nll, 6)}
                        for name, score in zip(plans, scores, strict=True)
                    }
                )
                yield f"seed {seed}, {repair}, {judge}: {len(rows)}/{options.sequences}"


def changes(results: Sequence[Mapping[str, list[Row]]], judges: Sequence[str], names: Sequence[str]) -> tuple[float, float, float]:
    """Mean of the logarithms of KL without a bias over KL with one, over seeds (``results``), plans and texts, and the bounds that
    hold 95 % of the bootstrap's means."""
    rng = random.Random(0)

    def once(draw: bool) -> float:
        seeds = rng.choices(results, k=len(results)) if draw else results
        logs = []
        for judge in judges:
            count = min(len(found[f"{repair} {judge}"]) for found in results for repair in REPAIRS)
            rows = rng.choices(range(count), k=count) if draw else range(count)
            for found in seeds:
                for name in names:
                    biased, plain = (sum(found[f"{repair} {judge}"][row][name]["kl"] for row in rows) for repair in REPAIRS)
                    logs.append(math.log(plain / biased))
        return sum(logs) / len(logs)

    drawn = sorted(once(True) for _ in range(DRAWS))
    return once(False), drawn[round(0.025 * DRAWS)], drawn[round(0.975 * DRAWS) - 1]


def table(results: Sequence[Mapping[str, list[Row]]], names: Sequence[str]) -> Iterator[str]:
    yield "| text | plan | KL with a bias | without | perplexity with a bias | without | KL without against with, 95 % interval |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for judge in JUDGES:
        for name in names:
            cells = []
            for unit in ("kl", "nll"):
                for repair in REPAIRS:
                    values = [row[name][unit] for found in results for row in found[f"{repair} {judge}"]]
                    mean = sum(values) / len(values)
                    cells.append(f"{mean:.4f}" if unit == "kl" else f"{math.exp(mean):.2f}")
            yield f"| {judge} | {name} | {' | '.join(cells)} | {interval(results, [judge], [name])} |"
        yield f"| {judge} | all | | | | | {interval(results, [judge], names)} |"
    yield f"| both | all | | | | | {interval(results, JUDGES, names)} |"


def interval(results: Sequence[Mapping[str, list[Row]]], judges: Sequence[str], names: Sequence[str]) -> str:
    mean, low, high = (math.expm1(value) for value in changes(results, judges, names))
    return f"{mean:+.1%} ({low:+.1%} to {high:+.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=32, help="sequences")
    parser.add_argument("--sequences", type=int, default=16, help="of each held-out text")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bias.json"))
    options = parser.parse_args()
    cache = default_cache()
    key = f"{options.model} {options.dtype} {options.calibration}x{LENGTH} rates {' '.join(f'{rate:g}' for rate in options.rates)}"
    known: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    of = known.setdefault(key, {})
    loaded = models.load(models.resolve(options.model, cache), "cpu", options.dtype)
    with torch.inference_mode():
        for seed in options.seeds:
            found = of.setdefault(str(seed), {})
            if all(len(found.get(f"{repair} {judge}", ())) >= options.sequences for repair in REPAIRS for judge in JUDGES):
                continue
            for done in measured(loaded, options, seed, found, cache):
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(known) + "\n", encoding="utf-8")
                print(done, flush=True)
    results = [of[str(seed)] for seed in options.seeds]
    print("\n".join(table(results, list(results[0][f"{REPAIRS[0]} {JUDGES[0]}"][0]))))


if __name__ == "__main__":
    main()
