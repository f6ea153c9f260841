"""One question for all workers of a pool: what is a sum over sequences is split by sequences, and comes out the same.

Every worker scores all plans, so that they go on sharing their first blocks. There are more tasks than workers: a slower worker
takes fewer of them, and one that dies costs its own. Where there are fewer sequences than workers, plans with a common beginning go
together. One worker is asked in a single task. Imports no torch.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from selfpruner.config import Role
from selfpruner.errors import OutOfMemoryError
from selfpruner.evaluation.race import Race
from selfpruner.evaluation.tally import Floats, Score, Tally
from selfpruner.progress import OnProgress
from selfpruner.workers.base import Session, WorkerPool
from selfpruner.workers.tasks import (
    BeginRequest,
    EvaluateRequest,
    EvaluateResult,
    ExpectRequest,
    GenerateRequest,
    GenerateResult,
    Levels,
    MakeRequest,
    PrepareRequest,
    PrepareResult,
    ScoreRow,
    SequenceSums,
    SlopesRequest,
    SlopesResult,
    StatisticsRequest,
)

# Tasks per worker, and the fewest tokens of one. On fewer, products are slower, and every task makes its levels anew
# (benchmarks/README.md).
PER_WORKER, LEAST_TOKENS = 2, 512
# Pieces per worker that the layers are cut into.
LAYERS_PER_WORKER = 3
# Fewest plans of a group.
LEAST_PLANS = 4
_TEXTS: dict[Role, str] = {"calibration": "calibration", "fitness": "fitness_text", "report": "report_text"}

T = TypeVar("T")


async def prepare(
    pool: WorkerPool, session: Session, request: PrepareRequest, on_progress: OnProgress | None = None
) -> PrepareResult:
    """Make every worker ready for ``session``, as far as other sessions let go of them."""
    await measure(pool, session, request, on_progress)
    found = await together(pool.run(session, request, on_progress) for _ in range(_workers(pool, session)))
    return found[0].model_copy(update={"peak_mib": max(result.peak_mib for result in found)})


async def measure(pool: WorkerPool, session: Session, request: PrepareRequest, on_progress: OnProgress | None = None) -> None:
    """Put into the cache what several workers can make of what is slow: texts side by side, statistics by sequences, whose sums
    merge exactly, and by layers what follows from a layer's statistics and weights. One worker does it when it is made ready."""
    workers = _workers(pool, session)
    if workers == 1 or session.plan is not None:
        return
    await pool.run(session, ExpectRequest(output=request.output), on_progress)  # the model is fetched and converted once
    roles = dict.fromkeys(("calibration", *request.texts))
    begun = await together(
        pool.run(session, BeginRequest(texts=(role,), workers=workers, output=request.output), on_progress) for role in roles
    )
    shares, layers = begun[0].shares, begun[0].layers
    await together(
        pool.run(session, StatisticsRequest(part=part, parts=shares), on_progress if part == 0 else None) for part in range(shares)
    )
    pieces = min(LAYERS_PER_WORKER * workers, len(layers))
    await together(
        pool.run(session, MakeRequest(layers=layers[piece::pieces], parts=shares), on_progress) for piece in range(pieces)
    )
    if shares:
        await pool.run(session, MakeRequest(layers=(), parts=shares))


async def evaluate(pool: WorkerPool, session: Session, request: EvaluateRequest) -> EvaluateResult:
    """Score plans on all workers. Where a device runs out of memory the plans of that task are halved, again and again; one that
    does not fit alone is ``too_large``.

    A race is decided here, after the same sequences as on one worker; more of them may be under way.
    """
    workers = _workers(pool, session)
    if workers == 1 or not request.plans:
        return await _fitting(pool, session, request)
    length = _length(session, request.text)
    rows, width = (1, length) if request.piece is None or request.piece >= length else (length // request.piece, request.piece)
    race = None if request.race is None else Race(request.race.keep, request.race.contenders, request.race.confidence)
    tally = Tally(request.plans, len(request.sequences) * rows, width, race)
    found: list[EvaluateResult] = []
    too_large: dict[Levels, ScoreRow] = {}
    while tally.due:
        due = max(-(-tally.due // rows), workers * -(-LEAST_TOKENS // length))
        plans = [tally.plans[index] for index in tally.running]
        shares = list(_shares(plans, request.sequences[tally.done // rows :][:due], length, rows, workers))
        results = await together(_fitting(pool, session, share.of(request, plans)) for share in shares)
        tally.add(*_joined(tally, shares, results))
        for share, result in zip(shares, results, strict=True):
            too_large |= {plans[place]: row for place, row in zip(share.plans, result.rows, strict=True) if row.too_large}
        found += results
    scores = tally.scores()
    return EvaluateResult(
        rows=tuple(too_large.get(plan) or row_of(score) for plan, score in zip(request.plans, scores, strict=True)),
        seconds=math.fsum(result.seconds for result in found) / min(workers, len(found)),
        passes=sum(result.passes for result in found),
        passes_without_sharing=sum(result.passes_without_sharing for result in found),
        tasks=sum(result.tasks for result in found),
        peak_mib=max(result.peak_mib for result in found),
    )


async def slopes(pool: WorkerPool, session: Session, request: SlopesRequest) -> SlopesResult:
    """The slopes of all sequences from those of parts."""
    workers = _workers(pool, session)
    if workers == 1:
        return await pool.run(session, request)
    parts = _parts(request.sequences, _length(session, request.text), workers)
    found = await together(pool.run(session, request.model_copy(update={"sequences": part})) for part in parts)
    tokens = sum(result.tokens for result in found)

    def mean(values: Iterable[float]) -> float:
        return math.fsum(value * result.tokens for value, result in zip(values, found, strict=True)) / tokens

    energy = [mean(result.energy[index] for result in found) for index in range(len(request.moves))]
    moved = [mean(result.size[index] * result.energy[index] for result in found) for index in range(len(request.moves))]
    return SlopesResult(
        kl=mean(result.kl for result in found),
        first=tuple(mean(result.first[index] for result in found) for index in range(len(request.moves))),
        size=tuple(part / max(whole, 1e-30) for part, whole in zip(moved, energy, strict=True)),
        energy=tuple(energy),
        tokens=tokens,
        seconds=math.fsum(result.seconds for result in found) / min(workers, len(found)),
        peak_mib=max(result.peak_mib for result in found),
    )


async def generate(pool: WorkerPool, session: Session, request: GenerateRequest) -> GenerateResult:
    """Every worker writes with some of the plans: what takes time is reading the weights once per word, however many prompts."""
    names = list(request.plans)
    workers = _workers(pool, session)
    shares = [names[start::workers] for start in range(min(workers, len(names)))]
    found = await together(
        pool.run(session, request.model_copy(update={"plans": {name: request.plans[name] for name in share}})) for share in shares
    )
    rates = {name: rate for result in found for name, rate in result.repetition.items()}
    return GenerateResult(
        repetition={name: rates[name] for name in names},
        seconds=max(result.seconds for result in found),
        peak_mib=max(result.peak_mib for result in found),
    )


async def together(work: Iterable[Coroutine[object, object, T]]) -> list[T]:
    """All results in order. The first failure, or being cancelled, cancels what is left and is raised once that has stopped."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        left = [task for task in tasks if not task.done()]
        for task in left:
            if not task.cancelling():  # a second time would keep it from waiting for its worker
                task.cancel()
        if left:
            await asyncio.wait(left)


def row_of(score: Score) -> ScoreRow:
    if math.isfinite(score.kl) and math.isfinite(score.nll):
        return ScoreRow(kl=score.kl, nll=score.nll, tokens=score.tokens, reason=None, rejected=score.rejected)
    reason = f"fitness is not finite (kl {score.kl}, nll {score.nll})"
    return ScoreRow(kl=None, nll=None, tokens=score.tokens, reason=reason, rejected=score.rejected)


# -- shares ----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Share:
    """Places of plans, sequences, and the rows of the sums (from, to) that these are."""

    plans: tuple[int, ...]
    sequences: tuple[int, ...]
    start: int
    stop: int

    def of(self, request: EvaluateRequest, plans: Sequence[Levels]) -> EvaluateRequest:
        own = tuple(plans[place] for place in self.plans)
        return request.model_copy(update={"plans": own, "sequences": self.sequences, "race": None, "sums": True})


def _workers(pool: WorkerPool, session: Session) -> int:
    """How many can share the work: one where the config names a GPU, on which all of them would put the model."""
    return 1 if str(session.config.get("device", "auto")).startswith("cuda") else pool.workers


def _length(session: Session, text: Role) -> int:
    """Tokens of a sequence of ``text``."""
    wanted = session.config[_TEXTS[text]]
    assert isinstance(wanted, dict)
    return int(wanted["length"])


def _parts(sequences: Sequence[int], length: int, workers: int) -> list[tuple[int, ...]]:
    """The sequences in order, in even parts: several for each worker where that leaves each enough tokens."""
    count = max(1, min(PER_WORKER, len(sequences) * length // (workers * LEAST_TOKENS))) * workers
    return [tuple(sequences[start:stop]) for start, stop in _even(len(sequences), count)]


def _groups(plans: Sequence[Levels], count: int) -> list[list[int]]:
    """Places of plans in at most ``count`` even groups, neighbours in the order of their levels together."""
    order = sorted(range(len(plans)), key=lambda index: plans[index])
    count = max(1, min(count, len(plans) // LEAST_PLANS))
    return [order[start:stop] for start, stop in _even(len(plans), count)]


def _even(size: int, count: int) -> Iterator[tuple[int, int]]:
    """Bounds that cut ``size`` things into ``count`` even parts, or one for each."""
    return pairwise(size * number // min(count, size) for number in range(min(count, size) + 1))


def _shares(plans: Sequence[Levels], sequences: Sequence[int], length: int, rows: int, workers: int) -> Iterator[_Share]:
    groups, start = _groups(plans, workers // len(sequences)), 0
    for part in _parts(sequences, length, workers):
        for group in groups:
            yield _Share(tuple(group), part, start, start + len(part) * rows)
        start += len(part) * rows


def _joined(tally: Tally, shares: Sequence[_Share], results: Sequence[EvaluateResult]) -> tuple[Floats, Floats]:
    """The sums of all shares as :meth:`Tally.add` takes them; NaN for a plan that did not fit."""
    rows = max(share.stop for share in shares)
    kl = np.full((len(tally.running), rows, tally.kl.shape[2]), np.nan)
    nll = np.full((len(tally.running), rows), np.nan)
    for share, result in zip(shares, results, strict=True):
        assert result.sums is not None
        for place, own_kl, own_nll in zip(share.plans, result.sums.kl, result.sums.nll, strict=True):
            if own_kl:
                kl[place, share.start : share.stop] = np.reshape(own_kl, (share.stop - share.start, -1))
                nll[place, share.start : share.stop] = own_nll
    return kl, nll


# -- memory ----------------------------------------------------------------------------------------------------------------
async def _fitting(pool: WorkerPool, session: Session, request: EvaluateRequest) -> EvaluateResult:
    """One task, or where the device has not the memory for it one after the other, each with half of the plans."""
    try:
        return await pool.run(session, request)
    except OutOfMemoryError as error:
        if len(request.plans) == 1:
            row = ScoreRow(kl=None, nll=None, tokens=0, reason=f"out of memory: {error.message}", too_large=True)
            sums = SequenceSums(length=0, kl=((),), nll=((),)) if request.sums else None
            return EvaluateResult(rows=(row,), seconds=0.0, passes=0, passes_without_sharing=0, sums=sums)
    middle = len(request.plans) // 2
    first = await _fitting(pool, session, _some(request, 0, middle))
    return _beside(first, await _fitting(pool, session, _some(request, middle, len(request.plans))))


def _some(request: EvaluateRequest, start: int, stop: int) -> EvaluateRequest:
    """The same of some of the plans. A race goes on among those of them that are in it, where more are than it keeps."""
    changes: dict[str, object] = {"plans": request.plans[start:stop]}
    if request.race is not None:
        contenders = tuple(index - start for index in request.race.contenders if start <= index < stop)
        racing = len(contenders) > request.race.keep
        changes["race"] = request.race.model_copy(update={"contenders": contenders}) if racing else None
    return request.model_copy(update=changes)


def _beside(first: EvaluateResult, second: EvaluateResult) -> EvaluateResult:
    sums = None
    if first.sums is not None and second.sums is not None:
        length = max(first.sums.length, second.sums.length)
        sums = SequenceSums(length=length, kl=first.sums.kl + second.sums.kl, nll=first.sums.nll + second.sums.nll)
    return EvaluateResult(
        rows=first.rows + second.rows,
        seconds=first.seconds + second.seconds,
        passes=first.passes + second.passes,
        passes_without_sharing=first.passes_without_sharing + second.passes_without_sharing,
        sums=sums,
        tasks=first.tasks + second.tasks,
        peak_mib=max(first.peak_mib, second.peak_mib),
    )
