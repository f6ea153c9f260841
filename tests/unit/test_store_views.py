"""The six questions of a person who has only the sqlite3 shell, on a small history whose answers were worked out by hand."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfpruner.config import SearchConfig
from selfpruner.records import Candidate, CheckpointFacts, Evaluation, LlmCall, Progress
from selfpruner.stages import Stage
from selfpruner.store.store import Store

# What is the best plan of job X? Who were its parents? What did the LLM cost? What did each operator contribute?
# How did fitness fall by generation? Where did the time go?
QUESTIONS = {
    "best": """
        SELECT plan, operator, generation, relative, rates FROM best WHERE job_id = :job
    """,
    "parents": """
        SELECT depth, plan, operator, relative FROM lineage WHERE job_id = :job ORDER BY depth, relative
    """,
    "cost": """
        SELECT operator, calls, ok, failed, prompt_tokens + completion_tokens AS tokens, cost FROM llm_cost WHERE job_id = :job
    """,
    "operators": """
        SELECT operator, plans, evaluated, infeasible, failed, best_relative, improved, survived, seconds, credit
        FROM operator_report WHERE job_id = :job
    """,
    "fitness": """
        SELECT generation, min(relative) AS best, min(min(relative)) OVER (ORDER BY generation) AS so_far
        FROM population WHERE job_id = :job AND status = 'evaluated' GROUP BY generation
    """,
    "time": """
        SELECT stage, seconds, share, tokens, workers, peak_mib FROM stages WHERE job_id = :job
    """,
}


def plan(
    name: str, operator: str, generation: int, relative: float | None, parents: str = "", status: str = "evaluated"
) -> Candidate:
    fitness = relative * 0.3 if relative is not None and status == "evaluated" else None
    reason = None if status == "evaluated" else "no heads left"
    return Candidate(
        name, (1, 2), (0.123456, 0.2), generation, operator, tuple(parents), status, fitness, relative, "w0", 64, reason
    )  # fmt: skip


def believed(candidate: Candidate, predicted: float, credit: float) -> Candidate:
    return replace(candidate, predicted=predicted, credit=credit, informed_by=candidate.generation - 1, survived=True)


HISTORY = [
    plan("U", "uniform", 0, 1.0),
    plan("R", "ramp", 0, 0.95),  # better than U
    plan("S", "sensitivity", 0, 0.97),
    plan("I", "initialize", 0, None, status="infeasible"),
    believed(plan("M", "mutate", 1, 0.90, "R"), 0.875, 0.25),  # better than R
    believed(plan("L", "level_switch", 1, 0.93, "U"), 0.925, 0.5),
    believed(plan("C", "crossover", 2, 0.85, "ML"), 0.75, 0.125),  # better than M
    plan("X", "mutate", 2, None, "M", status="failed"),
    plan("P", "mutate", 2, None, "C", status="pending"),
]


def call(sequence: int, operator: str, outcome: str, prompt: int, completion: int, cost: float) -> LlmCall:
    return LlmCall(sequence, 1, operator, "openai", "gpt", (), "", outcome, prompt, completion, 0.5, cost)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def job(store: Store) -> str:
    for _ in range(2):  # the second job must not change the first one's answers
        job_id = store.create_job(SearchConfig(rate=0.2))[0].id
        recorder = store.recorder(job_id)
        recorder.save_candidates(HISTORY)
        seconds = {"M": 2.0, "X": 0.5, "C": 1.0}
        recorder.save_evaluations([Evaluation(name, "w0", 64, 0.3, 3.0, spent) for name, spent in seconds.items()])
        recorder.save_evaluations([Evaluation("M", "w1", 64, 0.3, 3.0, 4.0), Evaluation("M", "report.0", 64, 0.3, 3.0, 8.0)])
        recorder.event("generation-1", "search.generation", "Generation 1", data={"rank_correlation": 0.5})
        recorder.save_stages([Stage("statistics", 4.0, 2048, 1, 800.0), Stage("final", 1.0, 64, 2, 300.0)])
        recorder.save_stages([Stage("statistics", 6.0, 4096, 1, 900.0), Stage("waiting", 1.0)])
        recorder.save_llm_call(call(1, "mutate", "ok", 100, 20, 0.25))
        recorder.save_llm_call(call(2, "mutate", "timeout", 100, 0, 0.125))
        recorder.save_llm_call(call(3, "crossover", "repaired", 200, 40, 0.5))
    return job_id


def ask(store: Store, question: str, job_id: str = "") -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(store.path)) as shell:
        return shell.execute(question, {"job": job_id}).fetchall()


def test_the_best_plan(store: Store, job: str) -> None:
    assert ask(store, QUESTIONS["best"], job) == [("C", "crossover", 2, 0.85, "[0.1235,0.2]")]


def test_its_parents(store: Store, job: str) -> None:
    assert ask(store, QUESTIONS["parents"], job) == [
        (0, "C", "crossover", 0.85),
        (1, "M", "mutate", 0.90),
        (1, "L", "level_switch", 0.93),
        (2, "R", "ramp", 0.95),
        (2, "U", "uniform", 1.0),
    ]


def test_what_the_llm_cost(store: Store, job: str) -> None:
    assert ask(store, QUESTIONS["cost"], job) == [("crossover", 1, 1, 0, 240, 0.5), ("mutate", 2, 1, 1, 220, 0.375)]
    seconds = "SELECT job_id, proposer, model, seconds FROM llm_cost WHERE operator = 'mutate' AND job_id = :job"
    assert ask(store, seconds, job) == [(job, "openai", "gpt", 1.0)]


def test_where_the_time_went(store: Store, job: str) -> None:
    assert ask(store, QUESTIONS["time"], job) == [
        ("statistics", 6.0, 0.75, 4096, 1, 900.0),
        ("final", 1.0, 0.125, 64, 2, 300.0),
        ("waiting", 1.0, 0.125, 0, 0, 0.0),
    ]


def test_what_each_operator_contributed(store: Store, job: str) -> None:
    assert ask(store, QUESTIONS["operators"], job) == [
        ("crossover", 1, 1, 0, 0, 0.85, 1, 1, 1.0, 0.125),
        ("initialize", 1, 0, 1, 0, None, 0, 0, 0.0, None),
        ("level_switch", 1, 1, 0, 0, 0.93, 0, 1, 0.0, 0.5),
        ("mutate", 3, 1, 0, 1, 0.90, 1, 1, 6.5, 0.25),
        ("ramp", 1, 1, 0, 0, 0.95, 1, 0, 0.0, None),
        ("sensitivity", 1, 1, 0, 0, 0.97, 0, 0, 0.0, None),
        ("uniform", 1, 1, 0, 0, 1.0, 0, 0, 0.0, None),
    ]


def test_how_well_it_was_foreseen(store: Store, job: str) -> None:
    question = "SELECT generation, children, predicted, round(measured, 6), rank_correlation FROM foresight WHERE job_id = :job"
    assert ask(store, question, job) == [(1, 2, 0.9, 0.915, 0.5), (2, 1, 0.75, 0.85, None)]
    assert ask(store, "SELECT plan, predicted FROM population WHERE job_id = :job AND predicted < 0.9", job) == [
        ("C", 0.75), ("M", 0.875)
    ]  # fmt: skip


def test_a_plan_rejected_early_is_no_best_plan(store: Store, job: str) -> None:
    """Its fitness is an estimate from few tokens, however good it looks."""
    early = replace(plan("E", "mutate", 2, 0.5, "M"), rejected=True, reason="a race", predicted=0.9)
    store.recorder(job).save_candidates([early])
    assert ask(store, QUESTIONS["best"], job) == [("C", "crossover", 2, 0.85, "[0.1235,0.2]")]
    assert ask(store, "SELECT rank, rejected FROM population WHERE job_id = :job AND plan = 'E'", job) == [(7, 1)]
    counts = "SELECT plans, evaluated, rejected, best_relative, improved FROM operator_report WHERE job_id = :job"
    assert ask(store, f"{counts} AND operator = 'mutate'", job) == [(4, 2, 1, 0.90, 1)]
    assert ask(store, "SELECT children FROM foresight WHERE job_id = :job AND generation = 2", job) == [(1,)]
    assert [row.plan_hash for row in store.candidates(job, order="fitness").data][:7] == [*"CMLRSU", "E"]


def test_how_fitness_fell(store: Store, job: str) -> None:
    assert ask(store, QUESTIONS["fitness"], job) == [(0, 0.95, 0.95), (1, 0.90, 0.90), (2, 0.85, 0.85)]


def test_the_population_is_ranked(store: Store, job: str) -> None:
    rows = ask(store, "SELECT plan, rank, parents, status, survived FROM population WHERE job_id = :job ORDER BY sequence", job)
    assert [(row[0], row[1]) for row in rows] == [
        ("U", 6), ("R", 4), ("S", 5), ("I", None), ("M", 2), ("L", 3), ("C", 1), ("X", None), ("P", None)
    ]  # fmt: skip
    assert rows[6][2:] == ('["M","L"]', "evaluated", 1)


def test_the_result_decides_which_plan_is_best(store: Store, job: str) -> None:
    ours: CheckpointFacts = {
        "plan_hash": "M",
        "path": "/c",
        "parameters": 1,
        "bytes": 1,
        "manifest_sha256": "0" * 64,
        "verification": {},
        "metrics": {},
    }
    checkpoint = store.add_checkpoint(job, ours)
    store.set_result(job, {"best_plan": "M"})
    assert ask(store, "SELECT plan, model, rate, checkpoint, path FROM best WHERE job_id = :job", job) == [
        ("M", "smollm2-135m", 0.2, checkpoint.id, "/c")
    ]
    assert [row[1] for row in ask(store, QUESTIONS["parents"], job)] == ["M", "R"]
    store.set_result(job, {"best_plan": "not a candidate"})
    assert ask(store, "SELECT plan FROM best WHERE job_id = :job", job) == [("C",)]


FINAL = [
    # Low figures on the few tokens of a generation; the final saw none of these plans.
    replace(plan("A", "mutate", 1, 0.60), window="g1.0"),
    replace(plan("B", "mutate", 2, 0.65), window="g2.0"),
    replace(plan("O", "front", 2, None, status="evaluated"), window="final", fitness=0.01),  # a front's plan of another rate
    replace(plan("K", "crossover", 2, 0.70), window="final", survived=True),
    replace(plan("W", "mutate", 1, 0.72), window="final", survived=True),  # decided: K writes badly
    replace(plan("U", "uniform", 0, 1.0), window="final"),
    replace(plan("E", "mutate", 2, 0.5), window="g2.0", rejected=True),
]


def orders(store: Store, job_id: str) -> set[str]:
    """The plans, best first, as every place that has an order gives them."""
    listed = "".join(row.plan_hash for row in store.candidates(job_id, order="fitness").data)
    paged, after = "", None
    while True:
        page = store.candidates(job_id, after, 2, order="fitness")
        paged += "".join(row.plan_hash for row in page.data)
        if not page.has_more:
            break
        after = page.data[-1].plan_hash
    ranked = "".join(plan for (plan,) in ask(store, "SELECT plan FROM population WHERE job_id = :job ORDER BY rank", job_id))
    plain = "".join(plan for (plan,) in ask(store, "SELECT plan FROM population WHERE job_id = :job", job_id))
    ((best,),) = ask(store, "SELECT plan FROM best WHERE job_id = :job", job_id)
    assert best == listed[0]
    return {listed, paged, ranked, plain}


def test_one_order_everywhere(store: Store) -> None:
    job_id = store.create_job(SearchConfig(rate=0.2))[0].id
    recorder = store.recorder(job_id)
    recorder.save_candidates(FINAL)
    assert orders(store, job_id) == {"KWUABOE"}, "the same tokens before other tokens"
    recorder.progress(Progress("searching", best_plan="B"))
    assert orders(store, job_id) == {"BKWUAOE"}, "a search that runs says who leads"
    recorder.event("final", "search.finished", "Best plan W", data={"best": "W"})
    assert orders(store, job_id) == {"WKUABOE"}, "the final decides"
    store.set_result(job_id, {"best_plan": "K"})
    assert orders(store, job_id) == {"KWUABOE"}, "a front may have decided again"


def test_the_population_comes_before_what_it_left_out(store: Store) -> None:
    job_id = store.create_job(SearchConfig(rate=0.2))[0].id
    rows = [replace(plan(name, "mutate", 1, relative), window="g1.0") for name, relative in (("A", 0.6), ("B", 0.7))]
    store.recorder(job_id).save_candidates([*rows, replace(plan("P", "mutate", 0, 0.8), window="g1.0", survived=True)])
    assert orders(store, job_id) == {"PAB"}


def test_a_file_with_older_views_gives_the_same_order(store: Store) -> None:
    job_id = store.create_job(SearchConfig(rate=0.2))[0].id
    store.recorder(job_id).save_candidates(FINAL)
    with closing(sqlite3.connect(store.path)) as shell:
        shell.executescript("DROP VIEW best; DROP VIEW population; DROP VIEW ranking")
    with Store(store.path, read_only=True) as reader:
        assert "".join(row.plan_hash for row in reader.candidates(job_id, order="fitness").data) == "KWUABOE"


def test_without_relative_fitness_decides(store: Store) -> None:
    job_id = store.create_job(SearchConfig(rate=0.2, preset="self-pruner"))[0].id
    assert ask(store, "SELECT count(*) FROM best") == [(0,)]
    rows = [
        Candidate(name, (1,), (0.2,), 0, "initialize", (), "evaluated", fitness)
        for name, fitness in (("a", 3.0), ("b", 2.5), ("c", 2.75))
    ]
    store.recorder(job_id).save_candidates(rows)
    assert ask(store, "SELECT plan, fitness FROM best") == [("b", 2.5)]
    assert ask(store, "SELECT plan FROM population ORDER BY rank") == [("b",), ("c",), ("a",)]
    assert ask(store, "SELECT evaluated, best_relative, improved FROM operator_report") == [(3, None, 1)]


def test_lineage_ends_even_where_parents_form_a_circle(store: Store) -> None:
    recorder = store.recorder(store.create_job(SearchConfig(rate=0.2))[0].id)
    recorder.save_candidates([plan("A", "mutate", 0, 0.9, "B"), plan("B", "mutate", 0, 0.95, "A")])
    assert ask(store, "SELECT plan, depth FROM lineage") == [("A", 0), ("B", 1)]
