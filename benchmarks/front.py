"""One search with a front against a search per rate: what both cost, what both find, and whether predicted latencies come true.

    python -m benchmarks.front --rate 0.2 --rates 0.1 0.15 --generations 3 --separate

Model, texts and criterion are those of benchmarks.search; every plan is judged on C4 text that no search saw. What was evaluated is
kept in the cache, so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.judge import Settings
from selfpruner.api import default_cache
from selfpruner.config import SearchConfig
from selfpruner.evolution.evaluator import Evaluator
from selfpruner.evolution.extras import Extras
from selfpruner.evolution.front import Front, Member
from selfpruner.evolution.loop import Search
from selfpruner.evolution.outcome import Outcome
from selfpruner.evolution.windows import Windows, report_windows
from selfpruner.files.report import FrontRow
from selfpruner.jobs.front_report import front_rows, latencies_of
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import session_of
from selfpruner.jobs.running_job import RunningJob
from selfpruner.planning.allocation import cheapest, predicted_losses
from selfpruner.planning.landscape import spearman
from selfpruner.planning.space import Plan
from selfpruner.records import Window
from selfpruner.store.store import Store
from selfpruner.tables import Screen, Table
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.tasks import PrepareRequest, PrepareResult
from selfpruner.workers.thread_pool import InProcessPool


class Subject:
    """A prepared model, and a store of everything that was evaluated on it."""

    def __init__(self, pool: WorkerPool, session: Session, prepared: PrepareResult, store: Store, held_out: int) -> None:
        self.pool, self.session, self.prepared, self.store = pool, session, prepared, store
        self.held_out: list[Window] = report_windows(held_out)

    def search(self, config: SearchConfig) -> tuple[Search, Front]:
        body = config.model_dump(mode="json")
        known = next((job for job in self.store.jobs(limit=100).data if job.config == body), None)
        recorder = self.store.recorder((known or self.store.create_job(config)[0]).id)
        space = replace(self.prepared.space, rate=config.rate)
        windows = Windows.of(config)
        evaluator = Evaluator(self.pool, self.session, recorder)
        search = Search(config, space, evaluator, recorder, windows, None, self.prepared.signals)
        return search, Front(config, space, evaluator, recorder, windows)

    async def kl(self, search: Search, plan: Plan) -> float:
        return (await search.evaluator.score([plan], self.held_out))[plan.hash].kl


async def compare(subject: Subject, config: SearchConfig, separate: bool, console: Console) -> dict[str, Any]:
    """The figures; see the module."""
    search, front = subject.search(config)
    latencies = None
    if "latency" in config.objective:
        latencies = await latencies_of(subject.pool, subject.session, config.report_text.length, console.print)
    outcome = await search.run()
    console.print(f"search at {config.rate:g}: {outcome.tokens:,} tokens")
    whole, members = await front.make(search.state, outcome, latencies, console.print)
    job = RunningJob(
        id="",
        config=config,
        pool=subject.pool,
        session=subject.session,
        recorder=search.recorder,
        prepared=subject.prepared,
        space=search.space,
        evaluator=search.evaluator,
        extras=Extras(search.recorder),
        outcome=whole,
    )
    rows = await front_rows(job, members, subject.held_out)
    losses = predicted_losses(search.space, search.state.sensitivities, search.state.probe_levels)
    rates: dict[str, dict[str, Any]] = {}
    for rate, space in front.spaces.items():
        figures = {
            "front": min((row["kl"] for row in rows if row["rate"] == rate and row["kl"] is not None), default=None),
            "sensitivity": await subject.kl(search, cheapest(space, losses)),
            "uniform": await subject.kl(search, space.project([rate] * space.layers)),
        }
        if separate:
            alone, _ = subject.search(config.model_copy(update={"rate": rate, "objective": ("quality",), "rates": ()}))
            found: Outcome = await alone.run()
            figures |= {"alone": await subject.kl(alone, Plan(found.best.levels)), "alone_tokens": found.tokens}
        rates[f"{rate:g}"] = figures
        console.print(f"rate {rate:g}: {figures}")
    return {
        "rate": config.rate,
        "objective": config.objective,
        "search_tokens": outcome.tokens,
        "front_tokens": whole.tokens - outcome.tokens,
        "rates": rates,
        "members": [{key: value for key, value in row.items() if key not in ("levels", "layer_rates")} for row in rows],
        "latency": None if latencies is None else _latency(members, rows, latencies.of(search.space.dense)),
    }


def _latency(members: list[Member], rows: list[FrontRow], dense: float) -> dict[str, float | None] | None:
    """How predicted speedups over the dense model and measured ones agree."""
    timed = [(dense / row["latency_us"], row["speedup"]) for row in rows if "speedup" in row]
    if len(timed) < 3:
        return None
    predicted, measured = zip(*timed, strict=True)
    ranks = spearman(predicted, measured)
    return {
        "members": len(members),
        "pearson": round(statistics.correlation(predicted, measured), 3),
        "spearman": None if ranks is None else round(ranks, 3),
        "mean_error": round(statistics.fmean(abs(p / m - 1) for p, m in timed), 3),
    }


def table(result: dict[str, Any]) -> Table:
    names = [name for name in ("front", "alone", "sensitivity", "uniform") if name in next(iter(result["rates"].values()))]
    shown = Table("rate", *(f"{name}, KL" for name in names))
    for rate, row in result["rates"].items():
        shown.add_row(rate, *("" if row[name] is None else f"{row[name]:.4f}" for name in names))
    return shown


async def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    cache = default_cache()
    settings = Settings(options.model, "obs", "least_squares", 0)
    fields = {"objective": options.objective, "rates": options.rates, "generations": options.generations}
    if "parameters" not in options.objective:
        del fields["rates"]
    config = settings.config(cache, options.rate, **fields, seed=options.seed)
    session = session_of(config, cache)
    pool = InProcessPool(lambda: SessionHandler(settings.device))
    folder = cache / "benchmarks" / "front"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with console.status("preparing"), Store(folder / "selfpruner.db") as store:
            prepared = await pool.run(session, PrepareRequest(texts=("fitness", "report")))
            subject = Subject(pool, session, prepared, store, options.held_out)
            return await compare(subject, config, options.separate, console)
    finally:
        await pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--rates", type=float, nargs="*", default=[0.1, 0.15])
    parser.add_argument("--objective", default="quality,parameters,latency")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=32, help="sequences of 512 tokens that judge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--separate", action="store_true", help="also search at every rate alone")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/front.json"))
    options = parser.parse_args()
    console = Screen()
    result = asyncio.run(measure(options, console))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    console.print(table(result))
    console.print(f"search {result['search_tokens']:,} tokens, its front {result['front_tokens']:,} more")
    if result["latency"]:
        console.print(f"predicted against measured speedups: {result['latency']}")
    console.print(f"Written: {options.output}")


if __name__ == "__main__":
    main()
