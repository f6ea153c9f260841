"""What scoring a generation costs: the engine against a pruned copy per candidate and against masks in one model.

    python -m benchmarks.engine --children 8 16 32
    python -m benchmarks.engine --random-shape llama-2-7b --device cuda:0 --children 16
    python -m benchmarks.engine --cost-model

Children of one parent (uniform at ``--rate``) by level switch, the same tokens, the same dtype; fresh children and tokens in
every repetition, methods in turn in one process: ``naive`` (a) and ``masked`` (b) of benchmarks/rivals.py, ``engine`` (c) at full
fidelity, ``race`` (d) with early rejection, ``--keep`` to survive. Every method pays for the dense model's side of its
generation. ``late`` is (c) on children that keep as many of the parent's first blocks as those of ``level_switch`` do on average.
Then ``--generations`` generations, each from the best of the last, scored with and without early rejection: how often the same
survive. Memory is measured in a process per method, set up as workers are: its peak while it scores beyond what the process held
before the model was loaded (on a GPU what torch allocated).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.streaming import SHAPES
from selfpruner.architectures.cost import model_parameters
from selfpruner.workers.lifeline import tied

METHODS = ("naive", "masked", "engine", "race")
SECTIONS = ("time", "survivors", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--random-shape", choices=SHAPES, help="a model of random weights, made on the device, instead")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--memory", type=int, help="MiB the engine may add to the weights; by default it chooses")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--children", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--confidence", type=float, default=0.99)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument(
        "--generations", type=int, default=20, help="generations of the survivors' comparison, per number of children"
    )
    parser.add_argument(
        "--only", nargs="*", choices=SECTIONS, default=SECTIONS, help="sections to measure; the others' results stay"
    )
    parser.add_argument("--cost-model", action="store_true", help="only: how time and memory grow")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/engine.json"))
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cost_model:
        from benchmarks import engine_cost

        engine_cost.main(options)
    elif options.one:
        print(json.dumps(_memory_of(options)))
    else:
        _all(options)


def _all(options: argparse.Namespace) -> None:
    """Section by section, each kept in the file as soon as it is there."""
    results = json.loads(options.output.read_text()) if options.output.exists() else {}

    def keep(children: int, found: dict[str, Any]) -> None:
        results.setdefault(f"children_{children}", {}).update(found)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")
        print(f"children_{children}", json.dumps(found), flush=True)

    if "memory" in options.only:
        for children in options.children:
            keep(children, _memory({method: _child(method, children) for method in METHODS}))
    case = prepare(options) if {"time", "survivors"} & set(options.only) else None
    for children in options.children:
        if case is not None and "time" in options.only:
            keep(children, _row(_timed(case, options, children), children))
    for children in options.children:
        if case is not None and "survivors" in options.only:
            keep(children, _survivors(case, options, children))


# -- what is measured --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """A model ready to be pruned, and text to judge it on."""

    arch: Any
    blocks: Any
    space: Any
    tokens: Any
    held: Callable[[], float]

    def window(self, number: int, sequences: int) -> Any:
        start = number * sequences % (len(self.tokens) - sequences + 1)
        return self.tokens[start : start + sequences].to(self.arch.device)


def children_of(space: Any, parent: Any, count: int, seed: int, first: int = 0) -> list[Any]:
    """Different children by level switch; all keep the parent's levels before block ``first``."""
    from selfpruner.operators.evolution import switch

    chance = random.Random(seed)
    found: list[Any] = []
    while len(found) < count:
        child = switch(space, parent, chance, min(chance.randint(1, 3), chance.randint(1, 3)), first)
        if child != parent and child not in found and child.levels[:first] == parent.levels[:first]:
            found.append(child)
    return found


def scorer(case: Case, options: argparse.Namespace, method: str) -> Callable[[Sequence[Any], Any], list[Any]]:
    """Plans and tokens to KL (``naive``, ``masked``) or Scores."""
    from benchmarks import rivals
    from selfpruner.evaluation.engine import Engine
    from selfpruner.evaluation.race import Race

    if method == "naive":
        return lambda plans, tokens: rivals.naive(case.arch, case.blocks, case.space, plans, tokens)
    if method == "masked":
        return lambda plans, tokens: rivals.masked(case.arch, case.blocks, plans, tokens)
    engine = Engine(case.arch, case.blocks, memory_bytes=None if options.memory is None else options.memory << 20)

    def score(plans: Sequence[Any], tokens: Any) -> list[Any]:
        race = Race(options.keep, tuple(range(len(plans))), options.confidence) if method == "race" else None
        found: list[Any] = engine.evaluate(plans, tokens, exact=False, race=race)
        score.work = engine.work  # type: ignore[attr-defined]
        return found

    return score


def _timed(case: Case, options: argparse.Namespace, children: int) -> dict[str, Any]:
    import torch

    from selfpruner.operators.evolution import KEEPING, KEPT

    sequences = options.tokens // options.length
    parent = case.space.project([options.rate] * case.space.layers)
    scorers = {method: scorer(case, options, method) for method in METHODS}
    late = scorer(case, options, "engine")
    for method in METHODS:  # kernels are compiled, files are in the page cache
        scorers[method](children_of(case.space, parent, 2, seed=-1), case.window(-1, 2))
    seconds: dict[str, list[float]] = {method: [] for method in (*METHODS, "late")}
    cpu: dict[str, list[float]] = {name: [] for name in seconds}
    out: dict[str, Any] = {"seconds": seconds, "cpu": cpu, "tokens": options.tokens, "difference": [], "race_tokens": []}

    def clock(name: str, run: Callable[[Sequence[Any], Any], list[Any]], plans: Sequence[Any], tokens: Any) -> list[Any]:
        started, busy = time.perf_counter(), time.process_time()
        found = run(plans, tokens)
        if case.arch.device.type == "cuda":
            torch.cuda.synchronize(case.arch.device)
        seconds[name].append(time.perf_counter() - started)
        cpu[name].append(time.process_time() - busy)
        print(f"{name}: {seconds[name][-1]:.1f} s, {cpu[name][-1]:.1f} s of CPU", file=sys.stderr, flush=True)
        return found

    for repetition in range(options.repetitions):
        tokens = case.window(repetition, sequences)
        plans = children_of(case.space, parent, children, repetition)
        found = {method: clock(method, scorers[method], plans, tokens) for method in METHODS}
        kept = round(KEEPING * statistics.mean(KEPT) * len(case.blocks))
        clock("late", late, children_of(case.space, parent, children, repetition, first=kept), tokens)
        out["difference"] += [abs(s.kl - kl) / kl for s, kl in zip(found["engine"], found["naive"], strict=True)]
        out["race_tokens"] += [score.tokens for score in found["race"]]
        out.setdefault("kl", []).append([score.kl for score in found["engine"]])
    tokens = case.window(0, sequences)
    plans = children_of(case.space, parent, children, 0)
    exact = _exact(case, plans, tokens)
    out["approximation"] = [abs(kl - true) / true for kl, true in zip(out["kl"][0], exact, strict=True)]
    out["work"] = scorers["engine"].work  # type: ignore[attr-defined]
    return out


def _exact(case: Case, plans: Sequence[Any], tokens: Any) -> list[float]:
    from selfpruner.evaluation.engine import Engine

    return [score.kl for score in Engine(case.arch, case.blocks).evaluate(plans, tokens, exact=True)]


def _row(timed: dict[str, Any], children: int) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in timed["seconds"].items()}
    work = timed["work"]
    return {
        "candidates_per_second": {name: round(children / value, 4) for name, value in median.items()},
        "ratio_naive": round(median["naive"] / median["engine"], 3),
        "ratio_masked": round(median["masked"] / median["engine"], 3),
        "ratio_early_rejection": round(median["naive"] / median["race"], 3),
        "ratio_late": round(median["naive"] / median["late"], 3),
        "cpu_seconds": {name: round(statistics.median(values), 1) for name, values in timed["cpu"].items()},
        "ratios_naive": [round(a / c, 3) for a, c in zip(timed["seconds"]["naive"], timed["seconds"]["engine"], strict=True)],
        "saved_passes": round(1 - work.passes / work.passes_without_sharing, 4),
        "fitness_difference": max(timed["difference"]),
        "approximation": max(timed["approximation"]),
        "tokens": timed["tokens"],
        "repetitions": len(timed["seconds"]["naive"]),
        "tokens_of_race": round(statistics.mean(timed["race_tokens"]) / timed["tokens"], 4),
    }


def _survivors(case: Case, options: argparse.Namespace, children: int) -> dict[str, Any]:
    """Generations from the best of the one before, each scored twice. ``lost``: what the survivors' mean KL was worse by."""
    sequences = options.tokens // options.length
    parent = case.space.project([options.rate] * case.space.layers)
    full, race = scorer(case, options, "engine"), scorer(case, options, "race")
    same, best, lost, spent = 0, 0, [], []
    for generation in range(options.generations):
        plans = children_of(case.space, parent, children, 1000 + generation)
        tokens = case.window(generation, sequences)
        one, other = full(plans, tokens), race(plans, tokens)
        ranked = sorted(range(children), key=lambda index: one[index].kl)
        kept = sorted(range(children), key=lambda index: (other[index].rejected, other[index].kl))[: options.keep]
        same += set(kept) == set(ranked[: options.keep])
        best += ranked[0] == kept[0]
        mean = statistics.mean(one[index].kl for index in ranked[: options.keep])
        lost.append(statistics.mean(one[index].kl for index in kept) / mean - 1)
        spent.append(sum(score.tokens for score in other) / (children * options.tokens))
        parent = plans[ranked[0]]
        print(f"generation {generation}: same {set(kept) == set(ranked[: options.keep])}, tokens {spent[-1]:.2f}", flush=True)
    return {
        "same_survivors": round(same / options.generations, 4),
        "same_best": round(best / options.generations, 4),
        "survivors_lost": max(lost),
        "survivors_tokens": round(statistics.mean(spent), 4),
    }


# -- memory ----------------------------------------------------------------------------------------------------------------------
def _child(method: str, children: int) -> dict[str, float]:
    from selfpruner.models.memory import ENVIRONMENT

    command = tied("-m", "benchmarks.engine", *sys.argv[1:], "--one", method, "--children", str(children))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **ENVIRONMENT})
    if done.returncode:
        raise SystemExit(f"the {method} process failed with code {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _memory(peaks: dict[str, dict[str, float]]) -> dict[str, Any]:
    over = {method: round(1 + peak["added_mib"] / peak["model_mib"], 3) for method, peak in peaks.items()}
    return {
        "added_mib": {method: round(peak["added_mib"], 1) for method, peak in peaks.items()},
        "peak_mib": round(peaks["engine"]["model_mib"] + peaks["engine"]["added_mib"], 1),
        "peaks_over_model": over,
        "peak_over_model": over["engine"],
    }


def _memory_of(options: argparse.Namespace) -> dict[str, float]:
    from selfpruner.models.memory import release

    case = prepare(options)
    run = scorer(case, options, options.one)
    parent = case.space.project([options.rate] * case.space.layers)
    # Candidates that come one after the other need no more memory when there are many.
    count = 2 if options.one in ("naive", "masked") else options.children[0]
    plans = children_of(case.space, parent, count, 0)
    release()
    case.held()
    run(plans, case.window(0, options.tokens // options.length))
    model = model_parameters(case.arch) * case.arch.dtype.itemsize / 2**20
    return {"model_mib": model, "added_mib": case.held() - model}


# -- preparing -------------------------------------------------------------------------------------------------------------------
def prepare(options: argparse.Namespace) -> Case:
    """The embedded model with its calibrated units, or a model of random weights whose units are in order of magnitude."""
    import torch

    from benchmarks.data import text
    from benchmarks.streaming import Memory, warm_up
    from selfpruner import models
    from selfpruner.api import config_of, default_cache
    from selfpruner.architectures import describe
    from selfpruner.calibration.texts import token_batches
    from selfpruner.config import TextConfig
    from selfpruner.models import checks
    from selfpruner.pruning.blocks import prepare_blocks
    from selfpruner.pruning.search_space import space_of

    cache = default_cache()
    device = models.choose_device(options.device)
    if options.random_shape:
        return random_case(
            SHAPES[options.random_shape], options, device, models.choose_dtype(options.dtype, device, stored="bfloat16")
        )
    source = models.resolve(options.model, cache)
    dtype = models.choose_dtype(options.dtype, device, stored=checks.stored_dtype(source.folder))
    warm_up(source.folder, device, dtype)
    memory = Memory(device)
    loaded = models.load(source, str(device), str(dtype).removeprefix("torch."))
    config = config_of({"model": options.model, "rate": options.rate, "preset": "evolution"})
    arch = describe(loaded.model)

    def tokens(name: str, sequences: int, length: int, role: Any) -> Any:
        wanted = TextConfig.model_validate({"sources": [{"source": text(name, cache)}], "sequences": sequences, "length": length})
        return token_batches(wanted, role, loaded, cache, 0)

    calibration = tokens("wikitext2-train", 32, 512, "calibration")
    judged = tokens("wikitext2-valid", 76_800 // options.length, options.length, "fitness").tokens
    with torch.no_grad():
        blocks, _ = prepare_blocks(config, arch, loaded, calibration, cache, lambda _: None, lambda: False)
    return Case(arch, blocks, space_of(config, arch, blocks), judged, memory.peak)


def random_case(shape: dict[str, int], options: argparse.Namespace, device: Any, dtype: Any) -> Case:
    """A Llama of random weights, made on ``device``; its units in order of magnitude, without compensation."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.auto import AutoModelForCausalLM

    from benchmarks.streaming import Memory
    from selfpruner import compensation, criteria
    from selfpruner.api import config_of
    from selfpruner.architectures import describe
    from selfpruner.calibration.statistics import BlockStatistics
    from selfpruner.planning.space import attention_shapes, ffn_widths
    from selfpruner.pruning.patterns import attention_block, ffn_block, measure_attention, measure_ffn
    from selfpruner.pruning.search_space import space_of

    memory = Memory(device)
    settings = LlamaConfig(**shape, max_position_embeddings=4096, tie_word_embeddings=False)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    model.train(False)
    arch = describe(model.requires_grad_(False))
    how: tuple[Any, Any] = (criteria.create("magnitude"), compensation.create("none"))
    blocks: list[Any] = []
    for layer in range(arch.layers):
        moments = []
        for width in (arch.heads * arch.head_dim, arch.channels):
            zero, one = torch.zeros(width, device=device), torch.ones(width, device=device)
            moments.append(BlockStatistics(1, 1, zero, one, one, torch.eye(width, device=device)))
        shapes = attention_shapes(arch.kv_groups, arch.heads_per_group, "all")
        attention, ffn = measure_attention(arch, layer, moments[0], *how), measure_ffn(arch, layer, moments[1], *how)
        blocks.append(attention_block(arch, layer, attention, shapes, adds_bias=False))
        blocks.append(ffn_block(arch, layer, ffn, ffn_widths(arch.channels), adds_bias=False))
    config = config_of({"rate": options.rate, "preset": "evolution"})
    tokens = torch.randint(arch.vocabulary, (512, options.length), generator=torch.Generator().manual_seed(0))
    return Case(arch, blocks, space_of(config, arch, blocks), tokens, memory.peak)


if __name__ == "__main__":
    main()
