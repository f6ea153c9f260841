"""Quality the way papers report it: dense, uniform and found checkpoints on seven zero-shot tasks, two texts and what they write.

    .venv-evaluate/bin/python -m benchmarks.quality --limit 1000 --seqlen 128 512 2048

Checkpoints are made where they are not there yet, all from the same calibration text: the head of WikiText-2 train and the first
800 documents of C4, half and half, of which the texts that judge hold nothing. ``found-R`` is ``selfpruner search`` at rate R
(``--preset``), ``uniform-R`` one plan without a search. A row of one's own is ``NAME=FOLDER``. Everything goes on where it stopped:
searches, checkpoints, single measurements. ``make test-evaluate`` makes the environment. Texts and tasks come from SELFPRUNER_DATA.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.data import c4_calibration, text
from selfpruner import api, catalogue
from selfpruner.files import manifest
from selfpruner.judging.quality import MeasurementFile, Quality, markdown

ROWS = ("dense", "uniform-0.2", "found-0.2", "uniform-0.3", "found-0.3")
BEGIN, END = "<!-- tables -->", "<!-- /tables -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--preset", default="evolution", help="of the searches")
    parser.add_argument("--tasks", nargs="*", default=catalogue.ZERO_SHOT_TASKS)
    parser.add_argument("--texts", nargs="*", default=tuple(catalogue.PERPLEXITY_TEXTS))
    parser.add_argument("--seqlen", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--limit", type=int, default=1000, help="documents per task; 0 for all")
    parser.add_argument("--windows", type=int, default=0, help="windows per text; 0 for all")
    parser.add_argument("--work", type=Path, help="where checkpoints are made (default: in the cache)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quality.json"))
    parser.add_argument("--page", type=Path, default=Path("benchmarks/quality.md"))
    options = parser.parse_args()
    cache = api.default_cache()
    work = options.work or cache / "benchmarks" / "quality"
    MeasurementFile(options.output)  # a file that holds something else is found before hours are spent
    places = {row.partition("=")[0]: place(row, options.model, options.preset, work, cache) for row in options.rows}
    found = api.quality(
        list(places.values()),
        options.output,
        tasks=options.tasks,
        perplexity=options.texts,
        seqlen=options.seqlen,
        generation=True,
        limit=options.limit or None,
        windows=options.windows or None,
        progress=_Progress(),
    )
    tables = "\n".join(written(found, places))
    print(tables)
    if options.page.exists():
        options.page.write_text(filled(options.page.read_text("utf-8"), tables), "utf-8")


def place(row: str, model: str, preset: str, work: Path, cache: Path) -> str:
    """The model of a row, made if it is not there: a name or a folder."""
    name, _, folder = row.partition("=")
    if folder or name == "dense":
        return folder or model
    kind, _, rate = name.partition("-")
    target = work / Path(model).name / (name if kind == "uniform" else f"{name}-{preset}")
    checkpoint = target / "checkpoint"
    if (checkpoint / manifest.NAME).is_file():
        return str(checkpoint)
    words = {"sources": [{"source": c4_calibration(cache)}, {"source": text("wikitext2-train", cache)}]}
    fields: dict[str, Any] = {
        "model": model,
        "calibration": {**words, "sequences": 64, "length": 512},
        "fitness_text": {**words, "sequences": 84, "length": 256},
        "report_text": {**words, "sequences": 32, "length": 512},
    }
    print(f"making {target}", flush=True)
    if kind == "uniform":
        api.prune(checkpoint, rate=float(rate), cache=cache, **fields)
    elif kind == "found":
        api.search(float(rate), target, cache=cache, preset=preset, **fields)
    else:
        raise SystemExit(f"A row is dense, uniform-RATE, found-RATE or NAME=FOLDER, not {row}.")
    return str(checkpoint)


def written(found: Quality, places: dict[str, str]) -> Iterator[str]:
    """All rows against the first, then every found plan against the uniform one of its rate."""
    called = {folder: name for name, folder in places.items()}

    def table(models: list[str]) -> str:
        named = {called[model]: found.found[model] for model in models}
        return markdown(Quality(tuple(named), called[models[0]], named))

    yield f"In brackets the difference from {called[found.against]}.\n\n{table(list(found.models))}"
    for name, folder in places.items():
        uniform = name.replace("found-", "uniform-")
        if name.startswith("found-") and uniform in places:
            yield f"{name} in brackets against {uniform}, in pairs.\n\n{table([places[uniform], folder])}"
    yield "| seconds (CPU seconds) | " + " | ".join(places) + " |\n|---|" + "---:|" * len(places)
    for measure in found.found[found.against]:
        spent = [found.found[folder][measure] for folder in places.values()]
        yield f"| {measure} | " + " | ".join(f"{r['seconds']:,.0f} ({r['cpu_seconds']:,.0f})" for r in spent) + " |"


def filled(page: str, tables: str) -> str:
    """``page`` with the part between its two marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


class _Progress:
    """A line per stage; what goes on within one is not worth a log line."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, message: str) -> None:
        stage = ":".join(message.split(":")[:2])
        if stage != self._last:
            print(stage, flush=True)
            self._last = stage


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
