"""The judge of searches: what is counted, what is traced, how results add up, and that a rerun repeats nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import peers, summary, time_spent
from benchmarks.judge import Bench, BudgetSpentError, JudgeRequest, JudgeResult, Meter, Run, Settings, judged
from benchmarks.search import Judge, Store, report
from selfpruner.errors import SelfprunerError
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.progress import OnProgress
from selfpruner.proposers import ProposerSettings
from selfpruner.testing.spaces import space_of
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import EvaluateRequest, PrepareRequest, ScoreRow, TaskRequest
from tests.helpers.fake_openai import FakeOpenAI
from tests.helpers.searching import AnalyticPool, prepared_of

# What the product's searches are given here: everything small, so that a budget of a few thousand tokens pays for generations.
SMALL = {
    "population": 3,
    "crossover_offspring": 2,
    "mutation_offspring": 4,
    "probe_tokens": 32,
    "final_tokens": 64,
    "stages": [{"tokens": 32, "keep": 3}, {"tokens": 64, "keep": 2}],
}
CLASSICAL = [name for name in peers.METHODS if name not in ("self-pruner", "default+llm")]


class JudgedPool(AnalyticPool):
    """The analytic pool, with what a worker says when it prepares and how it judges WikiText-2."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__(space)
        self.kinds: list[str] = []
        self.judged: list[JudgeRequest] = []

    async def run(self, session: Session, request: TaskRequest[Any], on_progress: OnProgress | None = None) -> Any:
        self.kinds.append(request.kind)
        if isinstance(request, PrepareRequest):
            flap = [[0.01 * index + level for level in range(len(b.options))] for index, b in enumerate(self.space.blocks)]
            ratios = [0.01 * (layer + 1) for layer in range(self.space.layers)]
            return prepared_of(self.space, outlier_ratio=ratios, spectral_exponents=ratios, flap_thresholds=flap)
        if isinstance(request, JudgeRequest):
            self.judged.append(request)
            return JudgeResult(rows=tuple(ScoreRow(kl=self.kl(Plan(levels)), nll=3.0, tokens=16) for levels in request.plans))
        return await super().run(session, request, on_progress)


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the right names; the analytic pool never reads them."""
    for name in ("c4/c4_en_train_first1000.jsonl", "wikitext2/wiki.test.raw"):
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True)
        file.write_text('{"text": "a"}\n')
    monkeypatch.setenv("SELFPRUNER_DATA", str(tmp_path / "data"))


def settings_of(**changes: Any) -> Settings:
    return dataclasses.replace(
        Settings("tiny", "obs", "least_squares", 16_000, fitness=(200, 16), held_out=4096, trace=1024), **changes
    )


def bench_of(tmp_path: Path, settings: Settings | None = None) -> tuple[Bench, JudgedPool]:
    pool = JudgedPool(space_of(layers=6, channels=192, rate=0.2))
    return Bench(settings or settings_of(), [0.2], tmp_path / "cache", pool), pool


def judge_of(tmp_path: Path, settings: Settings | None = None, **changes: Any) -> tuple[Judge, JudgedPool]:
    bench, pool = bench_of(tmp_path, settings)
    proposer = changes.get("proposer")
    return Judge(bench, Store(tmp_path / "state"), tmp_path / "cache", proposer, SMALL, Console(quiet=True)), pool


def all_results(judge: Judge, methods: Sequence[str], seeds: Sequence[int] = (0,), redo: Sequence[str] = ()) -> dict[str, Any]:
    return asyncio.run(judge.all([0.2], methods, seeds, redo))["0.2"]


# -- methods -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", CLASSICAL)
def test_every_method_stays_within_the_budget_and_leaves_a_trace(method: str, tmp_path: Path) -> None:
    judge, pool = judge_of(tmp_path)
    (result,) = all_results(judge, [method])[method]
    plan = Plan(tuple(result["plan"]))
    assert pool.space.meets_budget(plan)
    if method != "sensitivity":  # its answer is charged at the moment it was made
        assert result["tokens"] == pool.tokens["fitness"]
    assert result["tokens"] <= 16_000
    trace = result["trace"]
    assert trace[0]["tokens"] == 0
    assert trace[0]["levels"] == list(pool.space.project([0.2] * 6).levels)
    assert [p["tokens"] for p in trace] == sorted(p["tokens"] for p in trace)
    assert trace[-1]["levels"] == result["plan"]
    assert all(point["kl"] > 0 for point in trace)
    assert set(result["held_out"]) == {"wikitext2-512", "wikitext2-2048", "c4-512"}


@pytest.mark.parametrize(("method", "budget"), [("random", 30_000), ("level_switch", 30_000), ("ga", 30_000), ("default", 10_000)])
def test_searches_find_more_than_uniform_and_follow_their_seed(method: str, budget: int, tmp_path: Path) -> None:
    settings = settings_of(budget=budget)
    judge, _ = judge_of(tmp_path / "a", settings)
    one, other = all_results(judge, [method], [0, 1])[method]
    again, _ = judge_of(tmp_path / "b", settings)
    (repeated,) = all_results(again, [method])[method]
    assert one["held_out"]["wikitext2-512"]["kl"] < summary_of_uniform(judge)
    assert one["plan"] == repeated["plan"]
    assert [p["levels"] for p in one["trace"]] == [p["levels"] for p in repeated["trace"]]
    assert one["trace"] != other["trace"]


def summary_of_uniform(judge: Judge) -> float:
    pool = judge.bench.pool
    assert isinstance(pool, JudgedPool)
    return pool.kl(pool.space.project([0.2] * 6))


def test_level_switch_is_evopress(tmp_path: Path) -> None:
    """16 children on few tokens, 2 survivors and the parent on more, never the same tokens again, and never a worse parent."""
    bench, pool = bench_of(tmp_path, settings_of(fitness=(2000, 16), budget=60_000))
    windows: list[tuple[int, tuple[int, ...]]] = []

    async def go() -> Run:
        await bench.prepare(lambda _: None)
        pool.seen.clear()
        pool.tasks.clear()
        run = bench.run(0.2, 0)
        original = run.score

        async def watched(plans: Sequence[Plan], sequences: Sequence[int]) -> list[float]:
            windows.append((len(plans), tuple(sequences)))
            assert len({plan.hash for plan in plans}) == len(plans)
            return await original(plans, sequences)

        run.score = watched  # type: ignore[method-assign]
        await peers.level_switch(run)
        return run

    run = asyncio.run(go())
    assert [count for count, _ in windows] == [16, 3] * (len(windows) // 2)
    assert [len(sequences) for _, sequences in windows[:2]] == [512 // 16, 2048 // 16]
    seen: set[int] = set()
    for _, sequences in windows[:10]:
        assert not seen & set(sequences)
        seen |= set(sequences)
    kls = [pool.kl(Plan(point.levels)) for point in run.trace]
    assert kls == sorted(kls, reverse=True)  # elitist: the pool's noise is common to all plans of a window
    assert 60_000 - run.pool.tokens < 16 * 512 + 3 * 2048


def test_the_meter_refuses_what_would_pass_the_budget(tmp_path: Path) -> None:
    pool = JudgedPool(space_of())
    meter = Meter(pool, 16, budget=100)
    asked = EvaluateRequest(plans=((0,) * 8,) * 2, text="fitness", sequences=(0, 1))

    async def go() -> None:
        session = Session("k", {}, str(tmp_path))
        await meter.run(session, asked)
        assert (meter.tokens, meter.evaluations) == (64, 2)
        await meter.run(session, asked.model_copy(update={"text": "report"}))
        with pytest.raises(BudgetSpentError):
            await meter.run(session, asked)
        assert meter.tokens == 64

    asyncio.run(go())


def test_a_method_that_runs_out_answers_with_its_best_plan_so_far(tmp_path: Path) -> None:
    bench, pool = bench_of(tmp_path)
    better = pool.space.project([0.05, 0.2, 0.2, 0.2, 0.2, 0.35])

    async def greedy(run: Run) -> Plan:
        run.note(better)
        while True:
            await run.score([better], run.fresh(1000))

    async def go() -> dict[str, Any]:
        await bench.prepare(lambda _: None)
        return await judged(bench, bench.run(0.2, 0), greedy)

    result = asyncio.run(go())
    assert result["plan"] == list(better.levels)
    assert result["tokens"] <= 16_000


def test_held_out_trace_and_fitness_text_are_apart(tmp_path: Path) -> None:
    bench, _ = bench_of(tmp_path)
    assert not set(bench._trace) & set(bench._held_out)
    assert len(bench._trace) == 1024 // 512
    assert len(bench._held_out) == 4096 // 512


def test_held_out_text_that_was_looked_at_is_passed_over(tmp_path: Path) -> None:
    bench, pool = bench_of(tmp_path, settings_of(held_out_from=6144))
    assert len(bench._held_out) == 4096 // 512
    assert min(bench._held_out) >= 6144 // 512
    asyncio.run(bench.held_out(Plan((0,) * 12)))
    assert [(asked.length, asked.first, asked.sequences) for asked in pool.judged] == [(512, 12, 8), (2048, 3, 2)]


# -- resuming ------------------------------------------------------------------------------------------------------------
def test_the_table_of_what_is_kept_runs_nothing(tmp_path: Path) -> None:
    first, _ = judge_of(tmp_path)
    (done,) = all_results(first, ["ramp"])["ramp"]
    again, pool = judge_of(tmp_path)
    again.kept = True
    assert all_results(again, ["ramp", "level_switch"], [0, 1]) == {"ramp": [done], "level_switch": []}
    assert not pool.kinds


def test_a_rerun_repeats_nothing(tmp_path: Path) -> None:
    methods = ["uniform", "ramp", "level_switch", "default"]
    first, pool = judge_of(tmp_path)
    found = all_results(first, methods, [0, 1])
    assert [len(found[m]) for m in methods] == [1, 2, 2, 2]
    assert pool.kinds.count("prepare") == 1
    again, idle = judge_of(tmp_path)
    assert json.dumps(all_results(again, methods, [0, 1])) == json.dumps(found)
    assert idle.kinds == []
    more, busy = judge_of(tmp_path)
    assert len(all_results(more, ["ramp"], [0, 1, 2])["ramp"]) == 3
    assert sum(16 * len(s) * n for (_, text, s), n in busy.seen.items() if text == "fitness") <= 16_000


def test_what_a_result_depends_on_asks_for_a_new_one(tmp_path: Path) -> None:
    def ran(methods: Sequence[str], settings: Settings | None = None, redo: Sequence[str] = (), **fields: Any) -> bool:
        judge, pool = judge_of(tmp_path, settings)
        judge.fields |= fields
        all_results(judge, methods, redo=redo)
        return bool(pool.kinds)

    assert ran(["ramp", "default"])
    assert not ran(["ramp", "default"])
    assert ran(["ramp"], settings_of(budget=9000))
    assert ran(["ramp"], settings_of(compensation="bias", criterion="flap"))
    assert ran(["default"], population=4)
    assert not ran(["ramp"], population=4)
    assert ran(["ramp"], redo=["ramp"])


def test_a_torn_result_is_made_again(tmp_path: Path) -> None:
    judge, _ = judge_of(tmp_path)
    found = all_results(judge, ["uniform"])
    (file,) = (tmp_path / "state").iterdir()
    file.write_text(file.read_text()[:40])
    again, pool = judge_of(tmp_path)
    assert all_results(again, ["uniform"])["uniform"][0]["plan"] == found["uniform"][0]["plan"]
    assert pool.kinds


# -- the LLM -------------------------------------------------------------------------------------------------------------
def test_without_an_llm_its_rows_say_so(tmp_path: Path) -> None:
    judge, pool = judge_of(tmp_path)
    assert all_results(judge, ["self-pruner", "default+llm"]) == dict.fromkeys(["self-pruner", "default+llm"], summary.NO_LLM)
    assert pool.kinds == []


@pytest.mark.parametrize("method", ["self-pruner", "default+llm"])
def test_a_configured_llm_is_asked(method: str, tmp_path: Path, fake_openai: FakeOpenAI) -> None:
    proposer = ProposerSettings(kind="openai", base_url=fake_openai.base_url, model="scripted", timeout=5, max_retries=0)
    judge, pool = judge_of(tmp_path, settings_of(budget=16_000), proposer=("mine", proposer))
    judge.fields["limits"] = {"calls": 5}
    (result,) = all_results(judge, [method])[method]
    assert 0 < result["llm_calls"] <= 6
    assert result["tokens"] <= 16_000
    assert pool.space.meets_budget(Plan(tuple(result["plan"])))


# -- adding up -----------------------------------------------------------------------------------------------------------
def result_of(seed: int, points: Sequence[tuple[int, float, float]], kl: float) -> dict[str, Any]:
    return {
        "seed": seed,
        "device": "cpu",
        "tokens": points[-1][0] + 10,
        "evaluations": 7,
        "seconds": points[-1][1] + 1,
        "llm_calls": 0,
        "plan": [seed],
        "layer_rates": [0.2],
        "removed": 5,
        "held_out": {"c4-512": {"kl": kl, "perplexity": 10 + kl}},
        "trace": [{"tokens": t, "seconds": s, "levels": [t], "kl": k} for t, s, k in points],
    }


SWITCH = [result_of(0, [(0, 0, 1.0), (100, 10, 0.6)], 0.5), result_of(1, [(0, 0, 1.0), (200, 10, 0.4)], 0.7)]
OURS = [result_of(0, [(0, 0, 1.0), (50, 5, 0.6), (90, 9, 0.2)], 0.4), result_of(1, [(0, 0, 1.0), (60, 5, 0.5)], 0.3)]


def test_curves_are_means_of_steps() -> None:
    assert summary.mean_curve(SWITCH, "tokens") == [(0, 1.0), (100, 0.8), (200, 0.5), (210, 0.5)]
    assert summary.mean_curve(SWITCH, "seconds") == [(0, 1.0), (10, 0.5), (11, 0.5)]


def test_rows_hold_means_extremes_and_tokens_to_level_switch() -> None:
    worse = [result_of(0, [(0, 0, 1.0), (300, 1, 0.9)], 0.9)]
    rows = summary.summary({"level_switch": SWITCH, "default": OURS, "ramp": worse, "self-pruner": summary.NO_LLM})
    assert rows["self-pruner"] == {"note": "no LLM configured"}
    assert rows["default"]["held_out"]["c4-512"]["kl"] == pytest.approx({"mean": 0.35, "min": 0.3, "max": 0.4})
    assert rows["default"]["tokens"] == 85.0
    assert rows["default"]["plans"]["1"]["plan"] == [1]
    assert rows["level_switch"]["tokens_to_level_switch"] == 200  # the goal is its own final mean, 0.5
    assert rows["default"]["tokens_to_level_switch"] == 90  # (0.2 + 0.5) / 2
    assert rows["ramp"]["tokens_to_level_switch"] is None
    assert summary.summary({"default": OURS})["default"]["tokens_to_level_switch"] is None


def test_the_report_is_json_table_and_picture(tmp_path: Path) -> None:
    judge, _ = judge_of(tmp_path)
    results = asyncio.run(judge.all([0.2], ["uniform", "level_switch", "default", "self-pruner"], [0, 1]))
    printed = tmp_path / "printed.txt"
    with printed.open("w") as file:
        report(judge.bench.settings, results, tmp_path / "out" / "search", Console(file=file, width=200))
    body = json.loads((tmp_path / "out" / "search.json").read_text())
    row = body["rates"]["0.2"]["default"]
    assert {"tokens", "evaluations", "seconds", "plans", "held_out", "tokens_to_level_switch", "curves"} <= set(row)
    assert set(row["held_out"]["wikitext2-2048"]["kl"]) == {"mean", "min", "max"}
    assert body["settings"]["budget"] == 16_000
    assert body["devices"] == [results["0.2"]["default"][0]["device"]]
    assert (tmp_path / "out" / "search.svg").read_text().startswith("<svg")
    text = printed.read_text()
    assert all(method in text for method in ("uniform", "level_switch", "default", "no LLM configured"))


# -- texts and a real model ----------------------------------------------------------------------------------------------
def test_missing_texts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFPRUNER_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(SystemExit, match="elsewhere"):
        bench_of(tmp_path)
    monkeypatch.delenv("SELFPRUNER_DATA")
    with pytest.raises(SystemExit, match="set SELFPRUNER_DATA"):
        bench_of(tmp_path)


def test_a_real_model_is_judged(tmp_path: Path, tiny_llama: Path, sample_text: Any) -> None:
    data = tmp_path / "data"
    lines = [json.dumps({"text": sample_text(200, seed)}) for seed in range(60)]
    (data / "c4/c4_en_train_first1000.jsonl").write_text("\n".join(lines))
    (data / "wikitext2/wiki.test.raw").write_text("".join(f" {sample_text(300, seed)} \n \n" for seed in range(8)))
    settings = Settings(str(tiny_llama), "flap", "bias", 4000, (4, 64), (24, 64), held_out=2048, trace=512, device="cpu")
    bench = Bench(settings, [0.2, 0.3], tmp_path / "cache")
    judge = Judge(bench, Store(tmp_path / "state"), tmp_path / "cache", None, {}, Console(quiet=True))
    methods = ["uniform", "flap_global", "owl", "random"]
    results = asyncio.run(judge.all([0.2, 0.3], methods, [0]))
    for rate, found in results.items():
        space = bench.space(float(rate))
        for (result,) in found.values():
            assert space.meets_budget(Plan(tuple(result["plan"])))
            assert all(row["kl"] > 0 and row["perplexity"] > 1 for row in result["held_out"].values())
    kls = [results[rate]["uniform"][0]["held_out"]["c4-512"]["kl"] for rate in ("0.2", "0.3")]
    assert kls[0] < kls[1]


def test_no_score_is_an_error(tmp_path: Path) -> None:
    bench, pool = bench_of(tmp_path)
    pool.broken.add(pool.space.project([0.2] * 6).hash)

    async def go() -> None:
        await bench.prepare(lambda _: None)
        await judged(bench, bench.run(0.2, 0), peers.uniform)

    with pytest.raises(SelfprunerError, match="held-out"):
        asyncio.run(go())


def test_where_the_time_went_is_a_table() -> None:
    report: time_spent.Found = {
        "seconds": 300.4,
        "plans": 60,
        "tokens": 327_680,
        "peak_worker_mib": 2_286,
        "stages": [
            {"stage": "writing", "seconds": 34.04, "share": 0.1133, "tokens": 1_536, "workers": 2, "peak_mib": 2_286},
            {"stage": "other", "seconds": 1.0, "share": 0.0033, "tokens": 0, "workers": 0, "peak_mib": 0},
        ],
    }
    assert time_spent.section("make demo", report).splitlines()[2:] == [
        "300 s; 60 plans on 327,680 plan-tokens, largest worker 2,286 MiB.",
        "",
        "| stage | seconds | share | tokens | workers | peak MiB |",
        "|---|---:|---:|---:|---:|---:|",
        "| writing probe | 34.0 | 11.3 % | 1,536 | 2 | 2,286 |",
        "| other | 1.0 | 0.3 % |  |  |  |",
    ]
    beside = time_spent.section("make demo", {**report, "cores": 2, "load_average": 0.25})
    assert "300 s on 2 cores, load average 0.2 before; 60 plans" in beside
