"""How the engine's time and memory grow with layers, candidates, tokens and vocabulary: a formula, fitted and checked.

    python -m benchmarks.engine --cost-model

Models of random weights, one size changed at a time. The time of a generation is fitted (non-negative weights, relative errors) by

    seconds = a * passes * tokens + b * tokens * vocabulary * (1 + candidates / 64) + c * tokens * candidates + d * levels

where ``passes`` are distinct prefixes times blocks (at most blocks * (candidates + 1)) and ``levels`` the materialised ones; of
every candidate one position in 64 is compared over the whole vocabulary. Memory is compared with what is held when all plans have
parted, 4 * hidden * tokens * (candidates + 1) bytes, and with the ceiling.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.engine import children_of, random_case
from benchmarks.streaming import Memory
from selfpruner.evaluation.divergence import ASTRAY
from selfpruner.evaluation.engine import Engine
from selfpruner.models.memory import release

HIDDEN, CHANNELS, HEADS, LENGTH = 256, 768, 4, 128


@dataclass(frozen=True)
class Sizes:
    layers: int = 8
    candidates: int = 8
    tokens: int = 2048
    vocabulary: int = 8192


SIZES = [
    Sizes(),
    *(replace(Sizes(), layers=layers) for layers in (4, 16, 24)),
    *(replace(Sizes(), candidates=candidates) for candidates in (2, 16, 32)),
    *(replace(Sizes(), tokens=tokens) for tokens in (512, 1024, 4096)),
    *(replace(Sizes(), vocabulary=vocabulary) for vocabulary in (16384, 32768, 65536)),
]


def main(options: argparse.Namespace) -> None:
    rows = []
    for sizes in SIZES:
        rows.append(_measure(options, sizes))
    terms = torch.tensor([row["terms"] for row in rows], dtype=torch.float64)
    seconds = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
    weights = _non_negative(terms / seconds[:, None])
    print("seconds = " + " + ".join(f"{w:.3g} * {t}" for w, t in zip(weights.tolist(), TERMS, strict=True)))
    fitted = terms @ weights
    print(" layers  cand.  tokens  vocab.  measured s  formula s   error  added MiB  streams")
    for sizes, row, value in zip(SIZES, rows, fitted.tolist(), strict=True):
        error = value / row["seconds"] - 1
        print(
            f"{sizes.layers:>7}{sizes.candidates:>7}{sizes.tokens:>8}{sizes.vocabulary:>8}{row['seconds']:>12.3f}{value:>11.3f}"
            f"{error:>8.1%}{row['added']:>11.1f}{row['streams']:>9.1f}"
        )
    print("Peak beyond the weights under a ceiling, 32 candidates, 8,192 tokens (streams alone would take 264 MiB):")
    for ceiling in (32, 64, 128):
        row = _measure(options, Sizes(candidates=32, tokens=8192), ceiling)
        print(f"  ceiling {ceiling:>4} MiB: {row['added']:.1f} MiB, {row['seconds']:.2f} s")


TERMS = ("passes * tokens", "tokens * vocabulary * (1 + candidates / 64)", "tokens * candidates", "levels")


def _measure(options: argparse.Namespace, sizes: Sizes, ceiling: int | None = None) -> dict[str, Any]:
    """Seconds (the better of two), peak beyond the weights and the terms of the formula."""
    shape = {"hidden_size": HIDDEN, "intermediate_size": CHANNELS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
    shape |= {"num_hidden_layers": sizes.layers, "vocab_size": sizes.vocabulary}
    case = random_case(shape, options, torch.device("cpu"), torch.float32)
    arch, space = case.arch, case.space
    plans = children_of(space, space.project([options.rate] * space.layers), sizes.candidates, 0)
    tokens = torch.randint(sizes.vocabulary, (sizes.tokens // LENGTH, LENGTH))
    wide = {"memory_bytes": 1 << 30, "cache_bytes": 0, "logit_bytes": 32 << 20, "max_tokens": 1024}
    engine = Engine(arch, case.blocks, **(wide if ceiling is None else {"memory_bytes": ceiling << 20}))
    engine.evaluate(plans[:2], tokens[:1], exact=False)
    seconds = []
    release()
    memory = Memory(arch.device)
    for _ in range(2):
        before = engine.work
        started = time.perf_counter()
        engine.evaluate(plans, tokens, exact=False)
        seconds.append(time.perf_counter() - started)
    added = memory.peak()
    passes = engine.work.passes - before.passes
    levels = len({pair for plan in plans for pair in enumerate(plan.levels) if pair[1]})
    count = sizes.tokens
    return {
        "seconds": min(seconds),
        "terms": [
            passes * count,
            count * sizes.vocabulary * (1 + sizes.candidates / ASTRAY),
            count * sizes.candidates,
            levels,
        ],
        "added": added,
        "streams": 4 * HIDDEN * count * (sizes.candidates + 1) / 2**20,
    }


def _non_negative(terms: torch.Tensor) -> torch.Tensor:
    """Weights >= 0 with terms @ weights nearest to one, by leaving out what comes out negative."""
    used = list(range(terms.shape[1]))
    while True:
        found = torch.linalg.lstsq(terms[:, used], torch.ones(len(terms), 1, dtype=terms.dtype)).solution.flatten()
        if bool((found >= 0).all()):
            return terms.new_zeros(terms.shape[1]).index_copy_(0, torch.tensor(used), found)
        del used[int(found.argmin())]
