"""What criterion and compensation are worth at uniform rates: KL and perplexity of one plan, method by method.

python -m benchmarks.uniform --rate 0.2 --calibration wikitext2-train --sequences 32
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

from benchmarks.data import text
from selfpruner.api import config_of, default_cache
from selfpruner.search.job import session_of
from selfpruner.workers.runtime import Runtime

METHODS = (("flap", "bias"), ("flap", "least_squares"), ("wanda_sp", "none"), ("magnitude", "none"), ("obs", "least_squares"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--calibration", default="wikitext2-train", help="wikitext2-train, c4, self, or another source")
    parser.add_argument("--report", default="wikitext2-test")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--report-sequences", type=int, default=32)
    parser.add_argument("--methods", nargs="*", default=[f"{c}+{r}" for c, r in METHODS])
    parser.add_argument("--output", type=Path, help="append the figures as JSON lines")
    options = parser.parse_args()
    cache = default_cache()

    def source(name: str) -> dict[str, str]:
        return {"source": text(name, cache) if name.startswith(("wikitext2", "c4")) else name}

    config = config_of(
        {
            "model": options.model,
            "rate": options.rate,
            "preset": "evolution",
            "criterion": "flap",
            "compensation": "bias",
            "calibration": {"sources": [source(options.calibration)], "sequences": options.sequences, "length": options.length},
            "report_text": {"sources": [source(options.report)], "sequences": options.report_sequences, "length": 512},
        }
    )
    runtime, session = Runtime("auto"), session_of(config, cache)

    def run(kind: str, **payload: object) -> dict[str, object]:
        return runtime.handle(session, kind, payload, lambda _: None, lambda: False)

    prepared = run("prepare", texts=["calibration", "report"])
    blocks = prepared["space"]["blocks"]  # type: ignore[index]
    every = list(range(options.report_sequences))
    dense = run("evaluate", plans=[[0] * len(blocks)], text="report", sequences=every)["rows"][0]  # type: ignore[index]
    print(f"dense perplexity {math.exp(dense['nll']):.2f}; calibrated on {options.calibration}, judged on {options.report}")
    for method in options.methods:
        criterion, compensation = method.split("+")
        started = time.perf_counter()
        changes = {"criterion": criterion, "compensation": compensation}
        row = run("baseline", changes=changes, text="report", sequences=every)
        figures = {
            "method": method,
            "rate": options.rate,
            "calibration": options.calibration,
            "report": options.report,
            "sequences": options.sequences,
            "kl": round(row["kl"], 4),  # type: ignore[call-overload]
            "perplexity": round(math.exp(row["nll"]), 2),  # type: ignore[arg-type]
            "parameters": row["parameters"],
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(f"{method:24} KL {figures['kl']:.4f}  perplexity {figures['perplexity']:.2f}  {figures['seconds']} s", flush=True)
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
