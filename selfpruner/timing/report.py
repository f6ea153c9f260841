"""Ratios of paired repetitions, their interval and their bound; a report as JSON data and as Markdown. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb

from selfpruner.timing.model_cost import ModelCost, decode_bound, prefill_bound

# Share of intervals that contain the true median, at least, where there are repetitions enough.
COVERAGE = 0.95


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked. ``batches`` of decoding; ``compiled``: decode steps by torch.compile with a cache of fixed size."""

    backend: str
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    batches: tuple[int, ...] = (1, 8)
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class TimedModel:
    """One model and what was seen of it. ``seconds``: per measure, one value a repetition; ``tokens`` likewise.

    ``peak_mib`` is of the whole process, of which ``base_mib`` were there before the model was loaded, or with ``peak_of`` "device"
    what the model and its work took on the GPU; None where it runs elsewhere.
    """

    name: str
    work: ModelCost
    device: str
    dtype: str
    threads: int | None
    peak_mib: float | None
    base_mib: float | None
    peak_of: str | None
    seconds: Mapping[str, Sequence[float]]
    tokens: Mapping[str, Sequence[int]]

    def rates(self, measure: str) -> list[float]:
        """Tokens per second, by repetition."""
        return [n / s for n, s in zip(self.tokens[measure], self.seconds[measure], strict=True)]

    def rate(self, measure: str) -> float:
        return statistics.median(self.rates(measure))


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster, in the median of the repetitions; ``low`` and ``high`` enclose the true median with probability
    ``coverage``. ``bound`` is what operations or bytes alone would give, ``achieved`` the ratio's share of it."""

    ratio: float
    low: float
    high: float
    coverage: float
    bound: float

    @property
    def achieved(self) -> float:
        return self.ratio / self.bound


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """All models of one run, in the order in which they were timed; the first is what the others are compared with."""

    settings: Settings
    subjects: tuple[TimedModel, ...]

    @property
    def measures(self) -> tuple[str, ...]:
        return ("prefill", "first_token", *(decode(batch) for batch in self.settings.batches))

    def ratio(self, subject: TimedModel, measure: str) -> Ratio:
        """``subject`` against the first model."""
        dense, asked = self.subjects[0], self.settings
        pairs = zip(subject.rates(measure), dense.rates(measure), strict=True)
        ratios = [mine / its for mine, its in pairs]
        low, high, coverage = interval(ratios)
        if measure in ("prefill", "first_token"):
            bound = prefill_bound(dense.work, subject.work, asked.prompt_tokens)
        else:
            batch = next(batch for batch in asked.batches if decode(batch) == measure)
            bound = decode_bound(dense.work, subject.work, batch, asked.prompt_tokens, asked.new_tokens)
        return Ratio(statistics.median(ratios), low, high, coverage, bound)

    def to_dict(self) -> dict[str, object]:
        """Everything, every repetition included, as JSON data."""
        models = []
        for subject in self.subjects:
            work = subject.work
            row = {
                **asdict(subject),
                "weight_bytes": work.weight_bytes,
                "cache_bytes_per_token": work.cache_bytes,
                "tokens_per_second": {measure: subject.rate(measure) for measure in self.measures if measure != "first_token"},
                "first_token_seconds": statistics.median(subject.seconds["first_token"]),
                "prefill_operations": work.prefill_operations(self.settings.prompt_tokens),
                "decode_step_bytes": {
                    decode(batch): work.decode_bytes(batch, self.settings.prompt_tokens, self.settings.new_tokens)
                    / self.settings.new_tokens
                    for batch in self.settings.batches
                },
            }
            models.append(row)
        ratios = [
            {
                "model": subject.name,
                "against": self.subjects[0].name,
                "measure": measure,
                **asdict(ratio),
                "achieved": ratio.achieved,
            }
            for subject in self.subjects[1:]
            for measure in self.measures
            for ratio in [self.ratio(subject, measure)]
        ]
        return {"settings": asdict(self.settings), "models": models, "ratios": ratios}

    def markdown(self) -> str:
        """A table per pruned model beside the first one; of a single model its own figures."""
        asked, first = self.settings, self.subjects[0]
        threads = f", {first.threads} threads" if first.threads is not None else ""
        compiled = ", decode steps compiled" if asked.compiled else ""
        lines = [f"{asked.backend}, {first.device}, {first.dtype}{threads}{compiled}; {asked.repetitions} repetitions in turn.", ""]
        if len(self.subjects) == 1:
            lines += ["| | " + _cell(first.name) + " |", "|---|---:|"]
            lines += [f"| {title} | {value(first)} |" for title, value, _ in _rows(self)]
            return "\n".join(lines) + "\n"
        for subject in self.subjects[1:]:
            lines += [
                f"| | {_cell(first.name)} | {_cell(subject.name)} | ratio | interval | bound | achieved |",
                "|---|---:|---:|---:|---:|---:|---:|",
            ]
            for title, value, measure in _rows(self):
                cells = [title, value(first), value(subject)]
                if measure is None:
                    cells += ["", "", "", ""]
                else:
                    ratio = self.ratio(subject, measure)
                    cells += [
                        f"{ratio.ratio:.3f}",
                        f"{ratio.low:.3f} to {ratio.high:.3f}",
                        f"{ratio.bound:.3f}",
                        f"{ratio.achieved:.2f}",
                    ]
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
        coverage = self.ratio(self.subjects[1], "prefill").coverage
        lines.append(
            f"Ratios are medians of paired repetitions; intervals hold the true median with {100 * coverage:.0f} %. The bound of "
            f"reading is the ratio of operations for {asked.prompt_tokens} tokens, the head once; that of writing is the ratio of "
            "bytes: the weights that a step reads, and the KV cache."
        )
        return "\n".join(lines) + "\n"


def decode(batch: int) -> str:
    """The name of the measure."""
    return f"decode_{batch}"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Order statistics that enclose the median of what ``values`` were drawn from, and with which probability: the narrowest
    symmetric pair with at least ``COVERAGE``, else the extremes. No assumption but independent draws (binomial, p = 1/2)."""
    ordered, count = sorted(values), len(values)
    best = (ordered[0], ordered[-1], 1 - 2 ** (1 - count))
    for out in range(1, (count + 1) // 2):
        coverage = 1 - 2 * sum(comb(count, k) for k in range(out + 1)) / 2**count
        if coverage < COVERAGE:
            break
        best = (ordered[out], ordered[-1 - out], coverage)
    return best


def _rows(report: BenchmarkReport) -> list[tuple[str, Callable[[TimedModel], str], str | None]]:
    """Title, how a model's cell is written, and the measure whose ratio follows."""

    def speed(measure: str) -> Callable[[TimedModel], str]:
        return lambda subject: _figure(subject.rate(measure))

    rows: list[tuple[str, Callable[[TimedModel], str], str | None]] = [
        (f"prefill of {report.settings.prompt_tokens} tokens, tokens/s", speed("prefill"), "prefill"),
        ("time to first token, ms", lambda s: _figure(1e3 * statistics.median(s.seconds["first_token"])), "first_token"),
    ]
    for batch in report.settings.batches:
        rows.append((f"decode at batch {batch}, tokens/s", speed(decode(batch)), decode(batch)))
    where = report.subjects[0].peak_of
    if where is not None:
        rows.append((f"peak memory of the {where}, MiB", lambda s: f"{s.peak_mib:,.0f}", None))
    rows.append(("weights, MB", lambda s: f"{s.work.weight_bytes / 1e6:,.1f}", None))
    rows.append(("KV cache per token, bytes", lambda s: f"{s.work.cache_bytes:,}", None))
    return rows


def _figure(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
