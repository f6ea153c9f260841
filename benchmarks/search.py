"""Who finds the better plan at equal cost: every method on the same model, text, criterion, compensation and fitness tokens.

    python -m benchmarks.search --model smollm2-135m --rate 0.2 0.3 --seeds 3 --budget-tokens 400000
    python -m benchmarks.search --compensation bias ...     # FLAP's criterion and bias instead of obs and least squares
    python -m benchmarks.search --quick                     # minutes: one rate, one seed, four methods
    python -m benchmarks.search --seeds 3 --kept            # runs nothing: the table of what there is

Calibration, fitness, curves and one held-out text are disjoint parts of the C4 documents; WikiText-2 test is held out as a whole.
Every result is kept as soon as it is there: the same command goes on where it stopped, and a change of settings or of a
method's config asks for new results. Where a method needs a good LLM it takes an OpenAI-compatible proposer of
SELFPRUNER_PROPOSERS; without one its row says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks import summary
from selfpruner.errors import SelfprunerError
from selfpruner.files import atomic
from selfpruner.models.memory import ENVIRONMENT
from selfpruner.tables import Screen

if TYPE_CHECKING:
    from benchmarks.judge import Bench, Settings
    from selfpruner.planning.space import Granularity
    from selfpruner.proposers.settings import ProposerSettings

CRITERIA = {"least_squares": "obs", "bias": "flap", "none": "obs"}
QUICK_METHODS = ("uniform", "ramp", "owl", "flap_global", "level_switch", "default")
# A quick look gives the product's searches small stages, so that the small budget pays for some generations; no benchmark.
QUICK_FIELDS = {
    "probe_tokens": 256,
    "final_tokens": 512,
    "stages": [{"tokens": 256, "keep": 4}, {"tokens": 512, "keep": 2}],
}


def main() -> None:
    for name, value in ENVIRONMENT.items():  # read once, when torch is imported
        os.environ.setdefault(name, value)
    from benchmarks.judge import Bench, Settings
    from benchmarks.peers import METHODS
    from selfpruner.api import default_cache

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rate", type=float, nargs="+")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--budget-tokens", type=int, help="fitness tokens per run, plans times tokens")
    parser.add_argument("--compensation", choices=list(CRITERIA), default="least_squares")
    parser.add_argument("--criterion", help="what goes with the compensation, unless given")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--kept", action="store_true", help="run nothing, report what is kept")
    parser.add_argument("--redo", nargs="*", choices=METHODS, default=[], metavar="METHOD", help="forget the results of these")
    parser.add_argument("--proposer", help="which of SELFPRUNER_PROPOSERS; default: the first OpenAI-compatible one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--held-out-tokens", type=int)
    parser.add_argument("--held-out-from", type=int, default=0, help="pass over so many tokens of every held-out text")
    parser.add_argument("--trace-tokens", type=int, default=8192, help="tokens that draw the curves")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--state", type=Path, help="where single results are kept; default: in the cache")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder of search.json and search.svg"
    )
    options = parser.parse_args()

    quick: dict[str, Any] = {"trace": options.trace_tokens}
    if options.quick:
        quick = {"calibration": (16, 256), "fitness": (128, 256), "trace": 2048}
    settings = Settings(
        options.model,
        options.criterion or CRITERIA[options.compensation],
        options.compensation,
        options.budget_tokens or (45_000 if options.quick else 400_000),
        held_out=options.held_out_tokens or (4096 if options.quick else 32_768),
        held_out_from=options.held_out_from,
        dtype=options.dtype,
        device=options.device,
        **quick,
    )
    rates = options.rate or ([0.2] if options.quick else [0.2, 0.3])
    seeds = list(range(options.seeds or (1 if options.quick else 3)))
    methods = options.methods or (QUICK_METHODS if options.quick else METHODS)
    store = Store(options.state or options.cache / "benchmarks" / "search")
    console = Screen()
    bench = Bench(settings, rates, options.cache)
    judge = Judge(
        bench, store, options.cache, proposer_of(options.proposer), QUICK_FIELDS if options.quick else {}, console, options.kept
    )
    try:
        results = asyncio.run(judge.all(rates, methods, seeds, options.redo))
    except SelfprunerError as error:
        raise SystemExit(f"{error.code}: {error.message}") from None
    name = "search" if options.compensation == "least_squares" else f"search-{settings.criterion}-{settings.compensation}"
    report(settings, results, options.output / (f"{name}-quick" if options.quick else name), console)


def proposer_of(name: str | None) -> tuple[str, ProposerSettings] | None:
    """The proposer of the LLM methods from SELFPRUNER_PROPOSERS: ``name``, or the first that is OpenAI-compatible."""
    from server.settings import load_settings

    known = load_settings().all_proposers
    if name is not None:
        if name not in known:
            raise SystemExit(f"SELFPRUNER_PROPOSERS has no {name!r}. Known: {', '.join(known)}.")
        return name, known[name]
    return next(((key, settings) for key, settings in known.items() if settings.kind == "openai"), None)


class Store:
    """Results on disk, one JSON file each, under a name that holds everything they depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, fingerprint: str, rate: float, method: str, seed: int) -> Path:
        return self.folder / f"{method}-{rate:g}-{seed}-{fingerprint}.json"

    def load(self, file: Path) -> dict[str, Any] | None:
        """What is there; None where nothing is, or what a process that died has left."""
        try:
            found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found

    def save(self, file: Path, result: Mapping[str, Any]) -> None:
        atomic.write_text(file, json.dumps(result) + "\n")


class Judge:
    """Runs what is missing, one (rate, method, seed) after the other, or nothing with ``kept``; ``fields`` are changes to the
    product's configs."""

    def __init__(
        self,
        bench: Bench,
        store: Store,
        cache: Path,
        proposer: tuple[str, ProposerSettings] | None,
        fields: Mapping[str, Any],
        console: Console,
        kept: bool = False,
    ) -> None:
        self.bench, self.store, self.cache, self.proposer, self.console = bench, store, cache, proposer, console
        self.fields, self.kept = dict(fields), kept

    async def all(
        self, rates: Sequence[float], methods: Sequence[str], seeds: Sequence[int], redo: Sequence[str] = ()
    ) -> dict[str, dict[str, list[dict[str, Any]] | str]]:
        """Results by rate and method, in seed order; a text where a method could not run."""
        from benchmarks.peers import FIXED, PRODUCT

        found: dict[str, dict[str, list[dict[str, Any]] | str]] = {}
        try:
            for rate in rates:
                rows = found.setdefault(f"{rate:g}", {})
                for method in methods:
                    if method in PRODUCT and PRODUCT[method].needs_llm and self.proposer is None:
                        rows[method] = summary.NO_LLM
                        continue
                    of_method = [
                        await self._one(rate, method, s, method in redo) for s in (seeds[:1] if method in FIXED else seeds)
                    ]
                    rows[method] = [result for result in of_method if result is not None]
        finally:
            await self.bench.close()
        return found

    async def _one(self, rate: float, method: str, seed: int, again: bool) -> dict[str, Any] | None:
        """The result, from the store or from a run; None where only what is kept counts and nothing is."""
        from benchmarks.judge import judged
        from benchmarks.peers import PEERS, PRODUCT

        settings = self.bench.settings
        granularity: Granularity = "block"
        if method in PRODUCT:
            product = PRODUCT[method]
            name, proposer = self.proposer or ("local", None)
            config = product.config(settings, self.cache, rate, seed, name, **self.fields)
            of_llm = [name, proposer.model if proposer else None] if product.needs_llm else None
            # Texts by what they are, not by where this machine keeps them: the settings say it all.
            places = {"model", "device", "calibration", "fitness_text", "report_text"}
            fingerprint = settings.fingerprint(config.model_dump(mode="json", exclude=places), of_llm)
            run_method, granularity = product.method(config, proposer), product.granularity
        else:
            fingerprint, run_method = settings.fingerprint(), PEERS[method]
        file = self.store.file(fingerprint, rate, method, seed)
        if not again and (known := self.store.load(file)) is not None:
            return known
        if self.kept:
            return None
        if self.bench.held is None:
            with self.console.status("preparing") as status:
                await self.bench.prepare(lambda message: status.update(message))
        with self.console.status(f"{method} at {rate:g}, seed {seed}"):
            result = await judged(self.bench, self.bench.run(rate, seed, granularity), run_method)
        result["method"] = method
        self.store.save(file, result)
        kls = ", ".join(f"{text} {row['kl']:.4f}" for text, row in result["held_out"].items())
        self.console.print(f"{rate:g} {method} seed {seed}: {result['tokens']:,} tokens, {result['seconds']:.0f} s; KL {kls}")
        return result


def report(
    settings: Settings, results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]] | str]], stem: Path, console: Console
) -> None:
    """Write ``stem``.json and .svg and print the tables."""
    rows = {rate: summary.summary(methods) for rate, methods in results.items()}
    title = f"{settings.model}, {settings.criterion} + {settings.compensation}, {settings.budget:,} fitness tokens"
    devices = {result["device"] for methods in results.values() for found in methods.values() for result in summary.listed(found)}
    body = {
        "settings": asdict(settings),
        "devices": sorted(devices),
        "rates": rows,
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(body, indent=1) + "\n", "utf-8")
    summary.write_chart(results, title, stem.with_suffix(".svg"))
    for rate, of_rate in rows.items():
        console.print(summary.table(rate, of_rate, title))
    console.print(f"Written: {stem.with_suffix('.json')} and {stem.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
