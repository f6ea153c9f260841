"""Where a search writes its history: :class:`selfpruner.records.Recorder` on the store.

Resume is replay: everything is written as if for the first time, and what is already there stays. An evaluation, an LLM call and an
event keep their first content. A candidate keeps its origin and what was believed of it then, and takes its latest score. A stage
grows by what each run of the job takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from sqlalchemy import func
from sqlalchemy.dialects.sqlite import insert
from sqlmodel import col, select

from selfpruner.errors import StoreError
from selfpruner.records import Candidate, Evaluation, LlmCall, Progress, Severity, StoredProgress
from selfpruner.stages import STAGES, Stage
from selfpruner.store.database import Database
from selfpruner.store.tables import CandidateRow, EvaluationRow, Event, LlmCallRow, StageRow
from selfpruner.store.transaction import Transaction, storable

# What later writes of a candidate change; the rest is its origin and what was believed of it then.
SCORE = {"status", "fitness", "relative", "window", "tokens", "reason", "survived", "rejected"}
Transactions = Callable[[], AbstractContextManager[Transaction]]


class JobRecorder:
    """Writes are durable when they return and harmless when repeated. Raises StoreError for a row no job can have (a fitness that
    is not finite, an infeasible plan without its reason) and DiskFullError; then nothing of that call was written."""

    def __init__(self, database: Database, transactions: Transactions, job_id: str) -> None:
        self.job_id = job_id
        self._database = database
        self._transactions = transactions
        self._progress: Progress | None = None

    def find_evaluation(self, plan_hash: str, window: str) -> Evaluation | None:
        with self._database.reading() as session:
            row = session.get(EvaluationRow, (self.job_id, plan_hash, window))
        if row is None:
            return None
        return Evaluation(**row.model_dump(exclude={"job_id", "created_at"}))

    def save_evaluations(self, rows: Sequence[Evaluation]) -> None:
        if not rows:
            return
        with self._transactions() as write:
            origin = {"job_id": self.job_id, "created_at": write.now}
            for row in rows:
                _refuse_nan(row)
            values = [{**_fields(row), **origin, "reason": _text(row.reason)} for row in rows]
            write.session.execute(insert(EvaluationRow).on_conflict_do_nothing(), values)

    def find_llm_call(self, sequence: int) -> LlmCall | None:
        with self._database.reading() as session:
            row = session.get(LlmCallRow, (self.job_id, sequence))
        if row is None:
            return None
        fields = row.model_dump(exclude={"job_id", "created_at"})
        return LlmCall(**{**fields, "messages": tuple(row.messages)})

    def save_llm_call(self, call: LlmCall) -> None:
        _refuse_nan(call)
        texts = {"reply": storable(call.reply), "detail": storable(call.detail)}
        with self._transactions() as write:
            origin = {"job_id": self.job_id, "created_at": write.now, "messages": [dict(message) for message in call.messages]}
            write.session.execute(insert(LlmCallRow).on_conflict_do_nothing(), {**_fields(call), **origin, **texts})

    def save_candidates(self, rows: Sequence[Candidate]) -> None:
        """Insert, or update the row of the same plan. A replay announces its plans as pending again: that overwrites nothing."""
        if not rows:
            return
        with self._transactions() as write:
            query = select(CandidateRow).where(CandidateRow.job_id == self.job_id)
            wanted = col(CandidateRow.plan_hash).in_([row.plan_hash for row in rows])
            known = {row.plan_hash: row for row in write.session.exec(query.where(wanted))}
            highest = select(func.max(col(CandidateRow.sequence))).where(CandidateRow.job_id == self.job_id)
            sequence = write.session.exec(highest).one() or 0
            for candidate in rows:
                made = _row(candidate, self.job_id, sequence + 1, write.now)
                row = known.setdefault(candidate.plan_hash, made)
                if row is made:
                    sequence += 1
                    write.session.add(made)
                elif candidate.status != "pending":
                    row.sqlmodel_update(made.model_dump(include=SCORE))

    def event(
        self, key: str, type: str, message: str, *, level: Severity = "info", data: Mapping[str, object] | None = None
    ) -> None:
        with self._transactions() as write:
            write.event(self.job_id, key, type, message, level=level, data=data)

    def find_event(self, key: str) -> Mapping[str, object] | None:
        with self._database.reading() as session:
            return session.exec(select(Event.data).where(Event.job_id == self.job_id, Event.key == key)).first()

    def find_stages(self) -> list[Stage]:
        with self._database.reading() as session:
            found = session.exec(select(StageRow).where(StageRow.job_id == self.job_id))
            rows = {row.name: row.model_dump(exclude={"job_id"}) for row in found}
        return [Stage(**rows[name]) for name in STAGES if name in rows]

    def save_stages(self, stages: Sequence[Stage]) -> None:
        if not stages:
            return
        with self._transactions() as write:
            statement = insert(StageRow)
            fresh = {name: statement.excluded[name] for name in ("seconds", "tokens", "workers", "peak_mib")}
            for stage in stages:
                _refuse_nan(stage)
            values = [{"job_id": self.job_id, **_fields(stage)} for stage in stages]
            write.session.execute(statement.on_conflict_do_update(index_elements=["job_id", "name"], set_=fresh), values)

    def progress(self, progress: Progress) -> None:
        """Kept on the job; saying the same again writes nothing."""
        if progress == self._progress:
            return
        with self._transactions() as write:
            write.job(self.job_id).progress = _stored(progress)
            write.progressed.append(self.job_id)
        self._progress = progress


def _refuse_nan(record: Evaluation | Candidate | LlmCall | Progress | Stage) -> None:
    """SQLite would store it as NULL and nobody would know."""
    for name, value in _fields(record).items():
        if isinstance(value, float) and math.isnan(value):
            raise StoreError(f"{type(record).__name__}.{name} is NaN. Give None and a reason instead.")


def _fields(record: Evaluation | Candidate | LlmCall | Progress | Stage) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _text(text: str | None) -> str | None:
    return None if text is None else storable(text)


def _row(candidate: Candidate, job_id: str, sequence: int, now: int) -> CandidateRow:
    _refuse_nan(candidate)
    return CandidateRow(
        job_id=job_id,
        plan_hash=candidate.plan_hash,
        sequence=sequence,
        created_at=now,
        generation=candidate.generation,
        operator=candidate.operator,
        parents=list(candidate.parents),
        levels=list(candidate.levels),
        rates=list(candidate.rates),
        status=candidate.status,
        fitness=candidate.fitness,
        relative=candidate.relative,
        window=candidate.window,
        tokens=candidate.tokens,
        reason=_text(candidate.reason),
        survived=candidate.survived,
        rejected=candidate.rejected,
        predicted=candidate.predicted,
        credit=candidate.credit,
        informed_by=candidate.informed_by,
    )


def _stored(progress: Progress) -> StoredProgress:
    _refuse_nan(progress)
    return {
        "stage": progress.stage,
        "generation": progress.generation,
        "generations": progress.generations,
        "evaluations": progress.evaluations,
        "plans": progress.plans,
        "best_fitness": progress.best_fitness,
        "best_relative": progress.best_relative,
        "best_plan": progress.best_plan,
        "message": progress.message,
        "data": progress.data,
    }
