"""Which calibration text lasts: one plan pruned with statistics of each text, judged on two texts that none of them holds.

    python -m benchmarks.calibration --rate 0.2 --texts c4 wikitext2-train self c4+wikitext2-train c4:3+self:1@128x512

A text is names joined by ``+``, each with ``:WEIGHT`` if it is not 1, then ``@COUNTxLENGTH`` where it is not 64x512. Names are
those of ``benchmarks.data`` and the product's own (``self``, ``pydoc``). Judged on sequences of 512 tokens of WikiText-2 test
and of C4's report part; the last column is the geometric mean of the two perplexities over that of the first text in the list.
Results are kept one by one, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from benchmarks.data import FILES, text
from selfpruner.api import config_of, default_cache
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import session_of
from selfpruner.workers.tasks import EvaluateRequest, PrepareRequest

JUDGES = ("wikitext2-test", "c4")


def calibration(spec: str, cache: Path) -> dict[str, Any]:
    """A TextConfig's fields for a text as the command line writes it."""
    names, _, size = spec.partition("@")
    count, _, length = (size or "64x512").partition("x")
    sources = []
    for part in names.split("+"):
        name, _, weight = part.partition(":")
        sources.append({"source": text(name, cache) if name in FILES else name, "weight": float(weight or 1)})
    return {"sources": sources, "sequences": int(count), "length": int(length)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--criterion", default="obs")
    parser.add_argument("--compensation", default="least_squares")
    parser.add_argument("--texts", nargs="+", default=["c4", "wikitext2-train", "self", "c4+wikitext2-train", "c4+self"])
    parser.add_argument("--sequences", type=int, default=32, help="of each held-out text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/calibration.json"))
    options = parser.parse_args()
    cache = default_cache()
    key = f"{options.model} {options.criterion}+{options.compensation} {options.sequences} seed {options.seed} rate {options.rate}"
    known: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows = known.setdefault(key, {})
    handler = SessionHandler("auto")
    for spec in options.texts:
        if spec not in rows:
            rows[spec] = measure(handler, options, calibration(spec, cache), cache)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(spec, rows[spec], flush=True)
    print(table({spec: rows[spec] for spec in options.texts}))


def measure(handler: SessionHandler, options: argparse.Namespace, wanted: dict[str, Any], cache: Path) -> dict[str, Any]:
    row: dict[str, Any] = {}
    started = time.perf_counter()
    for judge in JUDGES:
        config = config_of(
            {
                "model": options.model,
                "rate": options.rate,
                "preset": "evolution",
                "seed": options.seed,
                "criterion": options.criterion,
                "compensation": options.compensation,
                "calibration": wanted,
                "report_text": {"sources": [{"source": text(judge, cache)}], "sequences": options.sequences, "length": 512},
            }
        )
        session = session_of(config, cache)
        asked = PrepareRequest(texts=("calibration", "report"))
        prepared = handler.handle(session, asked, lambda _: None, lambda: False)
        if "seconds" not in row:
            row["seconds"] = round(time.perf_counter() - started, 1)
        plan = prepared.space.project([options.rate] * prepared.space.layers)
        every = tuple(range(options.sequences))
        scored = EvaluateRequest(plans=(plan.levels,), text="report", sequences=every)
        found = handler.handle(session, scored, lambda _: None, lambda: False).rows[0]
        if found.kl is None or found.nll is None:
            raise SystemExit(f"The uniform plan cannot be scored: {found.reason}")
        row[judge] = {"kl": round(found.kl, 4), "perplexity": round(math.exp(found.nll), 3)}
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| calibration | " + " | ".join(f"{judge}: KL | perplexity" for judge in JUDGES) + " | geometric mean |"]
    lines.append("|" + "---|" * (2 * len(JUDGES) + 2))
    means = {spec: math.prod(row[judge]["perplexity"] for judge in JUDGES) ** (1 / len(JUDGES)) for spec, row in rows.items()}
    first = next(iter(means.values()))
    for spec, row in rows.items():
        cells = " | ".join(f"{row[judge]['kl']:.4f} | {row[judge]['perplexity']:.2f}" for judge in JUDGES)
        lines.append(f"| {spec} | {cells} | {means[spec]:.2f} ({means[spec] / first - 1:+.1%}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
