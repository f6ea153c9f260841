"""Models side by side, the way papers report them: the file that holds what was measured, and the table made from it.

A result is in the file as soon as it exists, under the model's content and the measure's setting. So the same call continues where
it stopped, and a changed model or setting adds another result beside the old one. Comparisons are in pairs, over the same
documents, windows or prompts. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal, TypedDict

from pydantic import JsonValue

from selfpruner.errors import ConfigError
from selfpruner.evaluation import split
from selfpruner.files import atomic
from selfpruner.judging.estimates import Estimate, average, mean, paired
from selfpruner.judging.measures import Figures, Measure
from selfpruner.judging.tasks import AskedMeasure, IdentifyRequest, JudgeRequest
from selfpruner.workers.base import Session, WorkerPool

_FORMAT = "selfpruner evaluate 1"
TaskMetric = Literal["acc", "acc_norm"]
_METRICS: tuple[TaskMetric, ...] = ("acc", "acc_norm")


class Record(TypedDict):
    """One measure of one model: what the figures belong to (``fingerprint`` and ``setting``), what they are, and what they took."""

    model: str
    fingerprint: str
    parameters: int
    measure: str
    setting: dict[str, JsonValue]
    seconds: float
    cpu_seconds: float
    result: Figures


class MeasurementFile:
    """The records in ``file``. Raises ConfigError where it holds something else."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: list[Record] = []
        if not file.exists():
            return
        try:
            body = json.loads(file.read_text("utf-8"))
            if body["format"] != _FORMAT:
                raise ValueError(body["format"])
            self.records = body["records"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is there and holds no results of `selfpruner evaluate`. Name another file.", param="output"
            ) from error

    def find(self, fingerprint: str, setting: Mapping[str, JsonValue]) -> Record | None:
        return next((r for r in self.records if r["fingerprint"] == fingerprint and r["setting"] == setting), None)

    def add(self, record: Record) -> None:
        self.records.append(record)
        # A record is a line, so that differences between versions of the file can be read.
        lines = ",\n".join(json.dumps(record, allow_nan=False) for record in self.records)
        atomic.write_text(self.file, f'{{"format": {json.dumps(_FORMAT)}, "records": [\n{lines}\n]}}\n')


@dataclass(frozen=True, slots=True)
class Quality:
    """What was asked for: ``found[model][measure]`` is a record, ``against`` the model that the others are compared with."""

    models: tuple[str, ...]
    against: str
    found: Mapping[str, Mapping[str, Record]]

    @property
    def rows(self) -> list[MeasurementRow]:
        return list(_rows(self))


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure of one model, and its difference from ``against`` on the same documents (None for that model itself)."""

    value: Estimate
    difference: Estimate | None = None


@dataclass(frozen=True, slots=True)
class MeasurementRow:
    """One figure of all models. ``kind`` says how it is read: ``share`` (0 to 1, differences in the same), ``perplexity``
    (differences of the NLL in nats), ``plain``."""

    name: str
    kind: str
    higher_is_better: bool
    cells: tuple[Cell, ...]


async def measure(
    pool: WorkerPool,
    sessions: Mapping[str, Session],
    measures: Sequence[Measure],
    results: MeasurementFile,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, Record]]:
    """Fill ``results`` with what is missing, model by model (``sessions`` by their names), as many at a time as there are workers.
    A model is loaded only if something is. Raises what measuring raises: what is finished stays."""
    asked = {measure.name: AskedMeasure.of(measure) for measure in measures}
    free = asyncio.Semaphore(pool.workers)

    async def of(name: str, session: Session) -> dict[str, Record]:
        def tell(text: str) -> None:
            progress(f"{name}: {text}")

        found = {}
        async with free:
            known = await pool.run(session, IdentifyRequest(measures=tuple(asked.values())))
            for (title, measure), setting in zip(asked.items(), known.settings, strict=True):
                record = results.find(known.fingerprint, setting)
                if record is None:
                    judged = await pool.run(session, JudgeRequest(measure=measure), tell)
                    record = {
                        "model": name,
                        "fingerprint": known.fingerprint,
                        "parameters": judged.parameters,
                        "measure": title,
                        "setting": setting,
                        "seconds": judged.seconds,
                        "cpu_seconds": judged.cpu_seconds,
                        "result": judged.result,
                    }
                    results.add(record)
                found[title] = record
        return found

    measured = await split.together(of(name, session) for name, session in sessions.items())
    return dict(zip(sessions, measured, strict=True))


# -- comparing -----------------------------------------------------------------------------------------------------------
def _rows(quality: Quality) -> Iterator[MeasurementRow]:
    measures = list(quality.found[quality.models[0]])
    tasks = [name for name in measures if "acc" in quality.found[quality.models[0]][name]["result"]]

    def row(name: str, kind: str, better: bool, of: Callable[[Record], Sequence[float]], measure: str) -> MeasurementRow:
        reference = of(quality.found[quality.against][measure])
        cells = []
        for model in quality.models:
            values = of(quality.found[model][measure])
            cells.append(Cell(mean(values), None if model == quality.against else paired(values, reference)))
        return MeasurementRow(name, kind, better, tuple(cells))

    chosen: dict[TaskMetric, list[MeasurementRow]] = {"acc": [], "acc_norm": []}
    for task in tasks:
        metrics = [metric for metric in _METRICS if metric in quality.found[quality.against][task]["result"]]
        for metric in metrics:
            made = row(f"{task} {metric}", "share", True, _digits(metric), task)
            chosen[metric].append(made)
            yield made
        if "acc_norm" not in metrics:  # the mean takes acc instead, as papers do
            chosen["acc_norm"].append(made)
    if len(tasks) > 1:
        for metric, parts in chosen.items():
            cells = []
            for index in range(len(quality.models)):
                differences = [d for part in parts if (d := part.cells[index].difference) is not None]
                value = average([part.cells[index].value for part in parts])
                cells.append(Cell(value, average(differences) if differences else None))
            yield MeasurementRow(f"mean of {len(parts)} {metric}", "share", True, tuple(cells))
    for name in measures:
        if "nll" in quality.found[quality.against][name]["result"]:
            yield row(name, "perplexity", False, lambda record: record["result"]["outcomes"]["nll"], name)
    if "generation" in measures:
        yield row("repetition", "share", False, lambda record: record["result"]["outcomes"]["repetition"], "generation")
        found = (quality.found[model]["generation"]["result"] for model in quality.models)
        results = [figures for figures in found if "repetition" in figures]
        distinct = {
            "distinct-1": [figures["distinct_1"] for figures in results],
            "distinct-2": [figures["distinct_2"] for figures in results],
            "distinct-3": [figures["distinct_3"] for figures in results],
        }
        for name, values in distinct.items():
            yield MeasurementRow(name, "plain", True, tuple(Cell(Estimate(value, None)) for value in values))
        base = quality.found[quality.against]["generation"]["result"]["outcomes"]["text"]
        same = [Cell(mean([agreement(a, b) for a, b in zip(r["outcomes"]["text"], base, strict=True)])) for r in results]
        label = labels(quality.models)[quality.models.index(quality.against)]
        yield MeasurementRow(f"words as {label}", "share", True, tuple(same))


def _digits(metric: TaskMetric) -> Callable[[Record], Sequence[float]]:
    return lambda record: [int(digit) for digit in record["result"]["outcomes"][metric]]


def agreement(text: str, reference: str) -> float:
    """The share of the words of ``reference`` that ``text`` begins with; 1 where there is none."""
    words, wanted = text.split(), reference.split()
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, wanted, strict=False)))
    return same / len(wanted) if wanted else 1.0


# -- showing -------------------------------------------------------------------------------------------------------------
def shown(cell: Cell, kind: str) -> tuple[str, str]:
    """A figure and its difference, each with its standard error; shares in percent, perplexities' differences as ratios."""
    value, change = cell.value, cell.difference
    if kind == "perplexity":
        level = math.exp(min(value.value, 700.0))
        error = None if value.stderr is None else level * value.stderr
        figure = _plus_minus(level, error, 2)
        if change is None:
            return figure, ""
        ratio = math.exp(min(change.value, 700.0))
        return figure, _plus_minus(100 * (ratio - 1), None if change.stderr is None else 100 * ratio * change.stderr, 1, "+") + " %"
    if kind == "plain":
        return f"{value.value:.3f}", ""
    figure = _plus_minus(100 * value.value, None if value.stderr is None else 100 * value.stderr, 1)
    if change is None:
        return figure, ""
    return figure, _plus_minus(100 * change.value, None if change.stderr is None else 100 * change.stderr, 1, "+")


def _plus_minus(value: float, error: float | None, digits: int, sign: str = "") -> str:
    return f"{value:{sign},.{digits}f}" + ("" if error is None else f" ±{error:,.{digits}f}")


def cells(quality: Quality) -> Iterator[tuple[str, ...]]:
    """The table as text: a heading, then a row per figure; differences in brackets."""
    yield ("", *labels(quality.models))
    sizes = [next(iter(quality.found[model].values()))["parameters"] for model in quality.models]
    yield ("parameters", *(f"{size:,}" for size in sizes))
    for row in quality.rows:
        texts = []
        for cell in row.cells:
            figure, change = shown(cell, row.kind)
            texts.append(f"{figure} ({change})" if change else figure)
        yield (row.name, *texts)


def labels(models: Sequence[str]) -> list[str]:
    """Short names of models for headings: as many of the last parts of their paths as tell them apart; searches call every folder
    ``checkpoint``, which says nothing."""
    paths = [path.parent if path.name == "checkpoint" and path.parent.name else path for path in map(Path, models)]
    parts = max(len(path.parts) for path in paths)
    for count in range(1, parts):
        short = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(short)) == len(short):
            return short
    return list(models)


def markdown(quality: Quality) -> str:
    heading, *rows = cells(quality)
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * len(quality.models)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def plain(quality: Quality) -> dict[str, object]:
    """Everything as plain data, for ``--json``."""
    records = [record for model in quality.models for record in quality.found[model].values()]
    return {
        "models": list(quality.models),
        "against": quality.against,
        "rows": [asdict(row) for row in quality.rows],
        "records": records,
    }
