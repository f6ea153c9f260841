"""Criteria and compensations side by side: uniform plans of one model at several rates, each method in a process of its own.

Results go into ``compare.json`` of the output folder one by one, so the same call continues where it stopped. The table
(``compare.md``) and the picture (``compare.svg``) are made from that file.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from selfpruner import catalogue
from selfpruner.config import Part, SearchConfig, differences
from selfpruner.errors import ConfigError, SelfprunerError
from selfpruner.evaluation import split
from selfpruner.files import atomic
from selfpruner.jobs.run import session_of
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.workers.process_pool import ProcessPool
from selfpruner.workers.tasks import EvaluateRequest, PrepareRequest

if TYPE_CHECKING:
    import altair as alt

# Fields of a config that the figures of a method at a rate depend on: what is prepared, but for the method, the rate, the text that
# only a search uses and a bound that changes no figure.
_VARIED = {"pattern", "criterion", "compensation", "rate", "fitness_text", "level_bytes"}
SETTINGS = set(SearchConfig.fields_of(Part.PREPARATION, Part.REPORT)) - _VARIED


@dataclass(frozen=True, slots=True)
class Method:
    pattern: str
    criterion: str
    compensation: str

    @property
    def name(self) -> str:
        return f"{self.pattern}/{self.criterion}+{self.compensation}"


class PlainRow(TypedDict):
    """:class:`ComparisonRow` as it stands in compare.json."""

    pattern: str
    criterion: str
    compensation: str
    rate: float
    parameters: int
    kl: float | None
    perplexity: float | None
    seconds: float
    peak_mib: int
    error: str | None


class DenseRow(TypedDict):
    parameters: int
    perplexity: float


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One method at one rate, or ``error``. ``parameters`` that are not zero; ``kl`` in nats per token from the dense model;
    ``seconds`` from the text to the levels (0 where they were in the cache already); ``peak_mib`` of the whole process."""

    pattern: str
    criterion: str
    compensation: str
    rate: float
    parameters: int = 0
    kl: float | None = None
    perplexity: float | None = None
    seconds: float = 0.0
    peak_mib: int = 0
    error: str | None = None

    def plain(self) -> PlainRow:
        return {
            "pattern": self.pattern,
            "criterion": self.criterion,
            "compensation": self.compensation,
            "rate": self.rate,
            "parameters": self.parameters,
            "kl": self.kl,
            "perplexity": self.perplexity,
            "seconds": self.seconds,
            "peak_mib": self.peak_mib,
            "error": self.error,
        }


def methods_of(
    patterns: Sequence[str], criteria: Sequence[str] | None = None, compensations: Sequence[str] | None = None
) -> list[Method]:
    """All methods there are of these patterns, or those of the named criteria and compensations. Raises UnknownNameError; a
    criterion that knows none of the patterns is a ConfigError."""
    for pattern in patterns:
        catalogue.check("pattern", pattern, catalogue.PATTERNS)
    for name in compensations or ():
        catalogue.check("compensation", name, catalogue.COMPENSATIONS)
    for name in criteria or ():
        catalogue.check_criterion(name)
        if (known := catalogue.CRITERIA.get(name)) is not None and not set(known.patterns) & set(patterns):
            catalogue.check_pattern(name, patterns[0], known.patterns)
    methods = []
    for pattern in patterns:
        for criterion in criteria or catalogue.CRITERIA:
            if criterion in catalogue.CRITERIA and pattern not in catalogue.CRITERIA[criterion].patterns:
                continue
            able = catalogue.compensations_of(pattern)
            methods += [Method(pattern, criterion, name) for name in compensations or able if name in able]
    return methods


class ComparisonFile:
    """What was measured with these ``settings``, on disk after every row."""

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.file = folder / "compare.json"
        self.settings = dict(settings)
        self.rows: list[PlainRow] = []
        self.dense: DenseRow | None = None
        try:
            known = json.loads(self.file.read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return
        if changed := differences(known.get("settings") or {}, self.settings):
            raise ConfigError(
                f"{self.file} holds a comparison with other settings: {'; '.join(changed)}. Name another folder, or give the same "
                "settings to go on.",
                param="output",
            )
        self.rows, self.dense = known["rows"], known["dense"]

    def find(self, method: Method, rate: float) -> PlainRow | None:
        """A figure that is there already; a failure is tried again."""
        key = (method.pattern, method.criterion, method.compensation, rate)
        same = (row for row in self.rows if (row["pattern"], row["criterion"], row["compensation"], row["rate"]) == key)
        return next((row for row in same if row["error"] is None), None)

    def add(self, row: ComparisonRow) -> None:
        key = (row.pattern, row.criterion, row.compensation, row.rate)
        self.rows = [r for r in self.rows if (r["pattern"], r["criterion"], r["compensation"], r["rate"]) != key]
        self.rows.append(row.plain())
        self.save()

    def save(self) -> None:
        body = {"settings": self.settings, "dense": self.dense, "rows": self.rows}
        atomic.write_text(self.file, json.dumps(body, indent=1) + "\n")


async def measure(
    config: SearchConfig,
    methods: Sequence[Method],
    rates: Sequence[float],
    results: ComparisonFile,
    *,
    cache: Path,
    devices: Sequence[str],
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Fill ``results`` with what is missing. ``config`` gives model, texts and everything but the method. A method that fails
    leaves its reason in the table, and the others go on."""
    for method in methods:
        missing = [rate for rate in rates if results.find(method, rate) is None]
        if not missing:
            continue
        pool = ProcessPool(devices)
        try:
            for row in [row async for row in _rows(pool, config, method, missing, results, cache, progress)]:
                results.add(row)
        except SelfprunerError as error:
            for rate in missing:
                results.add(ComparisonRow(**asdict(method), rate=rate, error=error.message))
        finally:
            await pool.close()


async def _rows(
    pool: ProcessPool,
    config: SearchConfig,
    method: Method,
    rates: Sequence[float],
    results: ComparisonFile,
    cache: Path,
    progress: Callable[[str], None],
) -> AsyncIterator[ComparisonRow]:
    body = {**config.model_dump(), **asdict(method), "rate": min(rates)}
    own = SearchConfig.model_validate(body)
    session = session_of(own, cache)

    def tell(text: str) -> None:
        progress(f"{method.name}: {text}")

    prepared = await split.prepare(pool, session, PrepareRequest(texts=("calibration", "report")), tell)
    every = tuple(range(prepared.texts["report"].sequences))
    dense = prepared.model.parameters

    uniform: dict[float, tuple[SearchSpace, Plan]] = {}
    for rate in rates:
        try:
            space = replace(prepared.space, rate=rate)
            uniform[rate] = space, space.project([rate] * space.layers)
        except SelfprunerError as error:
            yield ComparisonRow(**asdict(method), rate=rate, error=error.message)
    if not uniform:
        return
    whole = [] if results.dense is not None else [prepared.space.dense]
    tell("scoring")
    plans = tuple(plan.levels for plan in (*whole, *(plan for _, plan in uniform.values())))
    found = await split.evaluate(pool, session, EvaluateRequest(plans=plans, text="report", sequences=every))
    scores = list(found.rows)
    if whole:
        nll = scores.pop(0).nll
        assert nll is not None, "a model that gives no numbers is refused while it is prepared"
        results.dense = {"parameters": dense, "perplexity": round(math.exp(nll), 3)}
    for (rate, (space, plan)), row in zip(uniform.items(), scores, strict=True):
        yield ComparisonRow(
            **asdict(method),
            rate=rate,
            parameters=dense - space.removed(plan),
            kl=None if row.kl is None else round(row.kl, 4),
            perplexity=None if row.nll is None else round(math.exp(min(row.nll, 700.0)), 3),
            seconds=round(prepared.seconds, 1),
            peak_mib=round(max(prepared.peak_mib, found.peak_mib)),
            error=row.reason,
        )


# -- showing ---------------------------------------------------------------------------------------------------------------
DASHES = {"none": [1, 3], "bias": [5, 3], "least_squares": [1, 0], "least_squares_weights": [8, 2]}
COLUMNS = ("criterion", "compensation", "parameters", "KL", "perplexity", "seconds", "peak MiB")


def sections(results: ComparisonFile) -> Iterator[tuple[str, list[tuple[str, ...]], list[str]]]:
    """(heading, rows of cells, why those failed that did) per pattern and rate, the best KL first, failures last."""
    groups = dict.fromkeys((row["pattern"], row["rate"]) for row in results.rows)
    for pattern, rate in sorted(groups, key=lambda group: (list(catalogue.PATTERNS).index(group[0]), group[1])):
        rows = [row for row in results.rows if (row["pattern"], row["rate"]) == (pattern, rate)]
        rows.sort(key=lambda row: (row["error"] is not None, math.inf if row["kl"] is None else row["kl"]))
        failures = [f"{row['criterion']} + {row['compensation']}: {row['error']}" for row in rows if row["error"] is not None]
        yield f"{pattern}, rate {rate:g}", [_cells(row) for row in rows], failures


def _cells(row: PlainRow) -> tuple[str, ...]:
    if row["error"] is not None:
        return (row["criterion"], row["compensation"], "", "failed", "", "", "")
    quality = (f"{row['kl']:.4f}", f"{row['perplexity']:.2f}")
    cost = (f"{row['seconds']:.0f}", f"{row['peak_mib']:,}")
    return (row["criterion"], row["compensation"], f"{row['parameters']:,}", *quality, *cost)


def markdown(results: ComparisonFile) -> str:
    """The table as Markdown."""
    lines = []
    if results.dense is not None:
        lines += [f"Dense: {results.dense['parameters']:,} parameters, perplexity {results.dense['perplexity']:.2f}.", ""]
    for heading, rows, failures in sections(results):
        lines += [f"### {heading}", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines += ["", *(f"- {failure}" for failure in failures), *([""] if failures else [])]
    return "\n".join(lines)


def chart(results: ComparisonFile) -> alt.HConcatChart:
    """KL over the rate, a line per method, a panel per pattern. Altair."""
    import altair as alt

    panels = []
    stroke = alt.Legend(symbolType="stroke", symbolStrokeWidth=2)
    dashes = alt.Scale(domain=list(DASHES), range=list(DASHES.values()))
    for pattern in dict.fromkeys(row["pattern"] for row in results.rows):
        points = [
            {"rate": row["rate"], "kl": row["kl"], "criterion": row["criterion"], "compensation": row["compensation"]}
            for row in results.rows
            if row["pattern"] == pattern and row["kl"] is not None
        ]
        panels.append(
            alt.Chart({"values": points})
            .mark_line(point=True)
            .encode(
                x=alt.X("rate:Q", title="removed", axis=alt.Axis(format="%")),
                y=alt.Y("kl:Q", title="KL, nats per token", scale=alt.Scale(type="log", nice=False)),
                color=alt.Color("criterion:N", scale=alt.Scale(scheme="category20"), legend=stroke),
                strokeDash=alt.StrokeDash(
                    "compensation:N", scale=dashes, legend=alt.Legend(symbolType="stroke", symbolStrokeColor="black")
                ),
            )
            .properties(width=420, height=320, title=pattern)
        )
    chart: alt.HConcatChart = alt.hconcat(*panels)
    return chart
