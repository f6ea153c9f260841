"""An evaluation that is split over workers gives what one worker gives, whatever the split."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch
from safetensors.torch import load_file

from selfpruner.config import SearchConfig, TextConfig
from selfpruner.errors import OutOfMemoryError, WorkerError
from selfpruner.evaluation import split
from selfpruner.jobs.run import session_of
from selfpruner.judging.handler import JudgeHandler
from selfpruner.judging.held_out import held_out
from selfpruner.judging.tasks import HeldOutResult, Judged
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.progress import OnProgress
from selfpruner.testing.tiny_models import sample_text, tiny_model
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import (
    EvaluateRequest,
    EvaluateResult,
    GenerateRequest,
    PrepareRequest,
    R,
    RaceTerms,
    SlopesRequest,
    TaskRequest,
)
from tests.helpers.pruned import random_plans
from tests.helpers.several_workers import SeveralWorkers
from tests.helpers.small_jobs import config_of

T = TypeVar("T")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("split")
    (folder / "text.txt").write_text(sample_text(30_000, seed=3))
    config = config_of(tiny_model(folder / "model", "llama", layers=4, ffn=96), folder / "text.txt")
    longer = {"sources": [{"source": str(folder / "text.txt")}], "sequences": 24, "length": 160}
    return session_of(SearchConfig.model_validate({**config.model_dump(), "fitness_text": longer}), folder / "cache")


@pytest.fixture(scope="module")
def space(session: Session) -> SearchSpace:
    return with_workers(1, lambda pool: split.prepare(pool, session, PrepareRequest())).space


def with_workers(workers: int, ask: Callable[[SeveralWorkers], Awaitable[T]]) -> T:
    async def go() -> T:
        pool = SeveralWorkers(workers)
        try:
            return await ask(pool)
        finally:
            await pool.close()

    return asyncio.run(go())


def asks(plans: list[Plan], sequences: int, **more: Any) -> EvaluateRequest:
    """The last sequences first: their order is kept."""
    numbers = tuple(reversed(range(sequences)))
    return EvaluateRequest(plans=tuple(plan.levels for plan in plans), text="fitness", sequences=numbers, **more)


def scores(session: Session, request: EvaluateRequest, workers: int) -> EvaluateResult:
    return with_workers(workers, lambda pool: split.evaluate(pool, session, request))


@pytest.mark.parametrize("piece", [None, 32])
@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_scores_in_pieces(session: Session, space: SearchSpace, workers: int, piece: int | None) -> None:
    plans = random_plans(space, 5)
    request = asks([*plans, plans[1]], 13, piece=piece)
    whole, parts = scores(session, request, 1), scores(session, request, workers)
    assert whole.tasks == 1
    assert parts.tasks >= workers
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert other.kl == pytest.approx(one.kl, rel=1e-6)
        assert other.nll == pytest.approx(one.nll, rel=1e-6)
        assert (other.tokens, other.rejected, other.reason) == (one.tokens, False, None)
    assert parts.rows[1] == parts.rows[-1]
    assert parts.peak_mib > 0


def test_more_workers_than_sequences_share_the_plans(session: Session, space: SearchSpace) -> None:
    plans = random_plans(space, 9)
    request = asks(plans, 2, exact=True)
    whole, parts = scores(session, request, 1), scores(session, request, 5)
    assert parts.tasks == 4
    assert [row.kl for row in parts.rows] == pytest.approx([row.kl for row in whole.rows], rel=1e-6)
    assert scores(session, asks(plans[:3], 1), 4).tasks == 1, "too few plans to part them"


def ladder(space: SearchSpace) -> list[Plan]:
    """From mild to hard."""
    last = len(space.blocks) - 1
    plans = [Plan((0,) * last + (level,)) for level in range(1, 7)]
    return [*plans, Plan(tuple(len(block.options) - 1 for block in space.blocks))]


@pytest.mark.parametrize("workers", [2, 3])
def test_a_race_comes_out_the_same(session: Session, space: SearchSpace, workers: int) -> None:
    request = asks(ladder(space), 24, race=RaceTerms(keep=2, contenders=(1, 2, 3, 4, 5, 6)))
    whole = scores(session, request, 1)
    pool = SeveralWorkers(workers)
    parts = asyncio.run(split.evaluate(pool, session, request))
    assert [row.rejected for row in whole.rows].count(True) >= 2
    assert [(row.rejected, row.tokens) for row in parts.rows] == [(row.rejected, row.tokens) for row in whole.rows]
    assert [row.kl for row in parts.rows] == pytest.approx([row.kl for row in whole.rows], rel=1e-5)
    asked = [len(piece.plans) for piece in pool.asked if isinstance(piece, EvaluateRequest)]
    assert asked[-1] < asked[0], "who was dropped is not scored any more"


def test_slopes_in_pieces(session: Session, space: SearchSpace) -> None:
    plan = random_plans(space, 1)[0]
    moves = tuple((block, level) for block in range(len(space.blocks)) for level in (0, 1))
    request = SlopesRequest(plan=plan.levels, moves=moves, text="fitness", sequences=tuple(range(11)))
    whole, parts = [with_workers(count, lambda pool: split.slopes(pool, session, request)) for count in (1, 3)]
    assert parts.tokens == whole.tokens == 11 * 160
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    for name in ("first", "size", "energy"):
        one, other = getattr(whole, name), getattr(parts, name)
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6 * max(map(abs, one))), name


def test_plans_write_on_different_workers(session: Session, space: SearchSpace) -> None:
    plans = {"dense": (0,) * len(space.blocks), "best": random_plans(space, 1)[0].levels}
    request = GenerateRequest(plans=plans, text="fitness", sequences=(0, 3), prompt=16, new_tokens=24)
    whole, parts = [with_workers(count, lambda pool: split.generate(pool, session, request)) for count in (1, 2)]
    assert parts.repetition == whole.repetition
    assert list(parts.repetition) == ["dense", "best"]


def test_held_out_text_in_parts(session: Session, tmp_path: Path) -> None:
    folder = Path(str(session.config["model"]))
    wanted = TextConfig.model_validate({**cast("dict[str, Any]", session.config["fitness_text"]), "sequences": 7})
    judged = Judged(model=str(folder), device="cpu", dtype="float32", memory=None, tokens=wanted.length)
    asked = Session("judged", judged.to_json(), str(tmp_path / "cache"))
    other = tiny_model(tmp_path / "other", "llama", layers=2)

    def score(workers: int) -> HeldOutResult:
        pool = SeveralWorkers(workers, JudgeHandler)
        return asyncio.run(held_out(pool, asked, wanted, str(other), lambda _: None))

    whole, parts = score(1), score(3)
    assert parts.tokens == whole.tokens == 7 * 160
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    assert (parts.parameters, parts.sources) == (whole.parameters, whole.sources)


class Tight(SeveralWorkers):
    """Runs out of memory with more than ``room`` plans on the sequence 0, and with those that it ``refuses``."""

    room = 2
    refuses: tuple[int, ...] = ()

    async def run(self, session: Session, request: TaskRequest[R], on_progress: OnProgress | None = None) -> R:
        if isinstance(request, EvaluateRequest) and (
            (0 in request.sequences and len(request.plans) > self.room) or self.refuses in request.plans
        ):
            self.asked.append(request)
            raise OutOfMemoryError("no room")
        return await super().run(session, request, on_progress)


def test_a_piece_that_does_not_fit_is_halved(session: Session, space: SearchSpace) -> None:
    plans = random_plans(space, 5)
    request = asks(plans, 12, exact=True)
    pool = Tight(2)
    found = asyncio.run(split.evaluate(pool, session, request))
    whole = scores(session, request, 1)
    assert [row.kl for row in found.rows] == pytest.approx([row.kl for row in whole.rows], rel=1e-6)
    asked = [(len(piece.plans), 0 in piece.sequences) for piece in pool.asked if isinstance(piece, EvaluateRequest)]
    assert sorted(count for count, first in asked if first) == [1, 2, 2, 3, 5], "5 are 2 and 3, 3 are 1 and 2"
    assert {count for count, first in asked if not first} == {5}, "other pieces stay whole"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_plan_that_does_not_fit_alone_is_told(session: Session, space: SearchSpace, workers: int) -> None:
    plans = random_plans(space, 4)
    pool = Tight(workers)
    pool.room, pool.refuses = 99, plans[2].levels
    found = asyncio.run(split.evaluate(pool, session, asks(plans, 8)))
    assert [row.too_large for row in found.rows] == [False, False, True, False]
    assert (found.rows[2].kl, found.rows[2].reason) == (None, "out of memory: no room")
    assert all(row.kl for row in found.rows if not row.too_large)


OTHERS = [
    {},
    {"criterion": "flap", "compensation": "bias"},
    {"pattern": "unstructured", "criterion": "wanda", "compensation": "none"},
]


@pytest.mark.parametrize("changes", OTHERS, ids=("obs", "flap", "wanda"))
def test_workers_prepare_together_what_one_prepares_alone(session: Session, tmp_path: Path, changes: dict[str, str]) -> None:
    config = {**session.config, **changes}
    places = [tmp_path / name for name in ("alone", "together")]
    alone, cut = (Session(f"{session.key}-{place.name}", config, str(place)) for place in places)
    one = with_workers(1, lambda pool: split.prepare(pool, alone, PrepareRequest()))
    pool = SeveralWorkers(3)
    several = asyncio.run(split.prepare(pool, cut, PrepareRequest()))
    assert pool.asked[0].kind == "expect", "the model is fetched and converted once"
    # Sixteen sequences make two parts of eight; then each of four layers is for itself, and the parts are removed.
    asked = Counter(request.kind for request in pool.asked)
    assert asked == {"expect": 1, "begin": 3, "statistics": 2, "make": 5, "prepare": 3}
    assert len({id(inner._handler) for inner in pool._pools if inner._handler is not None}) == 3
    made = [{str(file.relative_to(place)): file for file in place.rglob("layer-*.safetensors")} for place in places]
    assert made[0].keys() == made[1].keys()
    for name, file in made[0].items():
        ours, theirs = load_file(file), load_file(made[1][name])
        for part, tensor in ours.items():
            if tensor.is_floating_point() and tensor.numel():
                assert (tensor - theirs[part]).abs().max() <= 1e-5 * tensor.abs().max(), (name, part)
            else:
                assert torch.equal(tensor, theirs[part]), (name, part)
    assert one.space.target == several.space.target
    for block, other in zip(one.space.blocks, several.space.blocks, strict=True):
        assert [replace(option, error=0.0) for option in block.options] == [replace(option, error=0.0) for option in other.options]
        assert [option.error for option in block.options] == pytest.approx(
            [option.error for option in other.options], rel=1e-4, abs=1e-6
        )


def test_workers_find_what_is_there(session: Session, tmp_path: Path) -> None:
    ready = Session(session.key, session.config, str(tmp_path / "cache"))
    with_workers(1, lambda pool: split.prepare(pool, ready, PrepareRequest()))
    pool = SeveralWorkers(2)
    asyncio.run(split.prepare(pool, ready, PrepareRequest()))
    assert Counter(request.kind for request in pool.asked) == {"expect": 1, "begin": 3, "prepare": 2}


def test_a_config_that_names_a_gpu_has_one_worker(session: Session) -> None:
    pool = SeveralWorkers(4)
    assert split._workers(pool, session) == 4
    assert split._workers(pool, Session("s", {**session.config, "device": "cuda:1"}, "")) == 1


def test_the_first_failure_ends_the_others() -> None:
    ended: list[int] = []

    async def work(number: int) -> int:
        try:
            await asyncio.sleep(0 if number == 1 else 60)
        finally:
            ended.append(number)
        if number == 1:
            raise WorkerError("gone")
        return number

    with pytest.raises(WorkerError, match="gone"):
        asyncio.run(split.together(work(number) for number in range(3)))
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize(
    ("sequences", "length", "workers", "sizes"),
    [
        (8, 256, 2, [2, 2, 2, 2]),
        (4, 256, 2, [2, 2]),
        (32, 256, 2, [8, 8, 8, 8]),
        (5, 2048, 2, [1, 1, 1, 2]),
        (3, 64, 2, [1, 2]),
        (2, 512, 8, [1, 1]),
    ],
)
def test_pieces_are_even_and_not_too_small(sequences: int, length: int, workers: int, sizes: list[int]) -> None:
    parts = split._parts(range(sequences), length, workers)
    assert [number for part in parts for number in part] == list(range(sequences))
    assert sorted(map(len, parts)) == sorted(sizes)
