"""What several workers are worth: a generation scored by two single-thread workers against one, in turn.

    OMP_NUM_THREADS=1 python -m benchmarks.workers --children 16 --tokens 2048

Children of one parent by level switch on the same tokens, fresh ones in every repetition; the same plans go to a pool of one
process and to one of several. Beside the wall time stands the processors' time: of one worker, and of the busiest of several. Where
others use the machine too, the ratio of these says what the split itself costs. ``--slopes``: also a survey's walk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.data import text
from benchmarks.engine import children_of
from selfpruner.api import config_of, default_cache
from selfpruner.config import SearchConfig
from selfpruner.evaluation import split
from selfpruner.jobs.run import session_of
from selfpruner.workers.process_pool import ProcessPool
from selfpruner.workers.tasks import EvaluateRequest, PrepareRequest, SlopesRequest

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--children", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--slopes", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/workers.json"))
    options = parser.parse_args()
    found = asyncio.run(_measured(options))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def _config(options: argparse.Namespace) -> SearchConfig:
    def of(name: str, sequences: int, length: int) -> dict[str, object]:
        return {"sources": [{"source": text(name, default_cache())}], "sequences": sequences, "length": length}

    count = options.tokens // options.length
    return config_of(
        {
            "model": options.model,
            "rate": options.rate,
            "preset": "evolution",
            "dtype": options.dtype,
            "calibration": of("wikitext2-train", 32, 512),
            "fitness_text": of("wikitext2-valid", max(84, (options.repetitions + 1) * count), options.length),
        }
    )


async def _measured(options: argparse.Namespace) -> dict[str, object]:
    session, count = session_of(_config(options), default_cache()), options.tokens // options.length
    pools = {"one": ProcessPool(["cpu"]), "several": ProcessPool(["cpu"] * options.workers)}
    try:
        space = (await split.prepare(pools["one"], session, PrepareRequest(texts=("fitness",)))).space
        await split.prepare(pools["several"], session, PrepareRequest(texts=("fitness",)))
        parent = space.project([options.rate] * space.layers)
        rows: list[dict[str, Any]] = []
        for repetition in range(-1, options.repetitions):
            plans = tuple(plan.levels for plan in children_of(space, parent, options.children, repetition))
            window = tuple(range((repetition + 1) * count, (repetition + 2) * count))
            asked = EvaluateRequest(plans=plans, text="fitness", sequences=window)
            moves = tuple(
                (block, level) for block, here in enumerate(parent.levels) for level in (here - 1, here + 1) if level >= 0
            )
            walk = SlopesRequest(plan=parent.levels, moves=moves, text="fitness", sequences=window)
            row: dict[str, Any] = {"load": os.getloadavg()[0]}
            scores = {}
            for name, pool in pools.items():
                scores[name], row[name] = await _timed(pool, split.evaluate(pool, session, asked))
                if options.slopes:
                    _, row[f"{name}_slopes"] = await _timed(pool, split.slopes(pool, session, walk))
            pairs = zip(scores["one"].rows, scores["several"].rows, strict=True)
            row["difference"] = max(abs(one.kl - other.kl) / one.kl for one, other in pairs if one.kl and other.kl)
            row["tasks"] = scores["several"].tasks
            print(json.dumps(row), flush=True)
            if repetition >= 0:  # the first warms up
                rows.append(row)
        return {"options": {**vars(options), "output": str(options.output)}, "rows": rows, "ratios": _ratios(rows)}
    finally:
        for pool in pools.values():
            await pool.close()


async def _timed(pool: ProcessPool, work: Coroutine[object, object, T]) -> tuple[T, dict[str, float]]:
    before, started = _cpu(pool), time.perf_counter()
    found = await work
    seconds = time.perf_counter() - started
    return found, {"wall": round(seconds, 2), "cpu": round(max(b - a for a, b in zip(before, _cpu(pool), strict=True)), 2)}


def _cpu(pool: ProcessPool) -> list[float]:
    """Processors' seconds of each worker so far."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pool.pids]
    return [(int(field[11]) + int(field[12])) / os.sysconf("SC_CLK_TCK") for field in fields]


def _ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """One over several: the ratios of minima and of medians, and the median ratio of a repetition."""
    found = {}
    for suffix in ("", "_slopes"):
        for kind in ("wall", "cpu"):
            ones, others = [
                [row[f"{name}{suffix}"][kind] for row in rows if f"{name}{suffix}" in row] for name in ("one", "several")
            ]
            if ones:
                found[f"{kind}{suffix}"] = {
                    "minima": round(min(ones) / min(others), 3),
                    "medians": round(statistics.median(ones) / statistics.median(others), 3),
                    "in turn": round(statistics.median(a / b for a, b in zip(ones, others, strict=True)), 3),
                }
    return found


if __name__ == "__main__":
    main()
