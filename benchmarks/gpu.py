"""All that only a GPU can show, in one run of at most eight minutes; nothing is downloaded, weights are random.

    make test-gpu
    python -m benchmarks.gpu --device cpu --only engine two_workers

Every section is a process of its own with a time limit. One that fails, or takes too long, is a row of the table and ends no other;
the exit code is 1 then. On a CPU shapes are tiny and the figures mean nothing: that run keeps the code from rotting. What only CUDA
has is said so there. Results are kept in benchmarks/results/gpu.json, which ``--only`` adds to.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from selfpruner.workers.lifeline import tied

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from benchmarks.engine import Case
    from selfpruner.workers.base import Session

Figures = dict[str, Any]
OUTPUT = Path("benchmarks/results/gpu.json")
SECONDS = 470  # of all sections together: what is not begun by then is left out
# Dense bfloat16 products a second, from NVIDIA's data sheets, by a part of the device's name.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
# What Self-Pruner (arXiv 2502.14413) reports for Llama-2-70B on an A100.
PAPER = {0.3: 1.39, 0.5: 1.70}


@dataclass(frozen=True)
class Scale:
    """What a section works on: a real shape on a GPU, a tiny one on a CPU."""

    device: str

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")

    def pick(self, large: Any, tiny: Any) -> Any:
        return large if self.gpu else tiny


@dataclass(frozen=True)
class Section:
    title: str
    limit: float  # seconds
    run: Callable[[Scale], Figures]
    row: Callable[[Figures], str]
    cuda_only: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one", choices=[*SECTIONS, "worker"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    scale = Scale(options.device)
    if options.one:
        found = generations_per_second(scale) if options.one == "worker" else SECTIONS[options.one].run(scale)
        print(json.dumps(found))
        return 0
    import torch

    if scale.gpu and not torch.cuda.is_available():
        print("No CUDA device is here. `--device cpu` runs what can run on tiny shapes.", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(scale.device) if scale.gpu else "cpu"
    body: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    body = {"sections": body.get("sections", {}) if body.get("device") == name else {}, "device": name, "torch": torch.__version__}
    slack = scale.pick(1, 10)  # limits are those of a machine with a GPU
    ended = time.monotonic() + SECONDS * slack
    print(f"{name}, torch {torch.__version__}\n\n| section | seconds | found |\n|---|---:|---|")
    failed = False
    for key in options.only:
        started = time.monotonic()
        body["sections"][key] = found = _section(key, scale, min(SECTIONS[key].limit * slack, ended - started))
        found["seconds"] = round(time.monotonic() - started, 1)
        failed |= found["status"] == "failed"
        shown = SECTIONS[key].row(found["figures"]) if found["status"] == "ok" else f"{found['status']}: {found['why']}"
        print(f"| {SECTIONS[key].title} | {found['seconds']:.0f} | {shown} |", flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(body, indent=1) + "\n")
    return int(failed)


def _section(key: str, scale: Scale, limit: float) -> dict[str, Any]:
    """``status``: ok, failed, or left out; ``figures`` or ``why``."""
    if SECTIONS[key].cuda_only and not scale.gpu:
        return {"status": "left out", "why": "only CUDA has it"}
    if limit < 5:
        return {"status": "left out", "why": f"the {SECONDS} s of the whole run are over"}
    try:
        done = subprocess.run(
            tied("-m", "benchmarks.gpu", "--one", key, "--device", scale.device),
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "why": f"took more than {limit:.0f} s"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return {"status": "failed", "why": " / ".join(said[-2:])[:300].replace("|", "/")}
    return {"status": "ok", "figures": json.loads(done.stdout.splitlines()[-1])}


def _call(module: str, *arguments: str) -> None:
    """Another benchmark, in a process of its own; what it says goes to stderr, so that the last line is what a failure says."""
    done = subprocess.run(tied("-m", module, *arguments), stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{module} ended with {done.returncode}")


def _sync(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device, repetitions: int = 5) -> float:
    """The fastest of a few runs, after one that is not counted."""
    run()
    taken = []
    for _ in range(repetitions):
        _sync(device)
        started = time.perf_counter()
        run()
        _sync(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def random_model(shape: dict[str, int], scale: Scale, dtype: torch.dtype, tokens: int = 2048, length: int = 256) -> Case:
    from benchmarks.engine import random_case
    from selfpruner import models

    options = argparse.Namespace(rate=0.2, length=length, tokens=tokens)
    return random_case(shape, options, models.choose_device(scale.device), dtype)


def shape_of(scale: Scale, layers: int) -> dict[str, int]:
    """So many layers of Llama-2-7B, or tiny ones."""
    from benchmarks.streaming import SHAPES

    return {**SHAPES[scale.pick("llama-2-7b", "tiny")], "num_hidden_layers": layers}


# -- the sections ----------------------------------------------------------------------------------------------------------------
def conformance(scale: Scale) -> Figures:
    """The suites as they are, on this device. Those of operators and formats have no tensors on one, and run all the same."""
    which = ["-n", "8", "--dist", "loadfile", "tests/conformance"] if scale.gpu else ["tests/conformance/test_patterns.py"]
    done = subprocess.run(
        tied("-m", "pytest", "-q", "-p", "no:cacheprovider", *which),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SELFPRUNER_TEST_DEVICE": scale.device},
    )
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout[-300:])}
    broken = [line.split(" - ")[0].removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode not in (0, 1):
        raise SystemExit((done.stdout + done.stderr).strip().splitlines()[-1])
    return {"passed": counts.get("passed", 0), "failed": counts.get("failed", 0) + counts.get("error", 0), "broken": broken[:40]}


def engine(scale: Scale) -> Figures:
    """A generation by the engine, by naive copies and by masks; how much of the card's products it uses."""
    import torch

    from benchmarks.streaming import SHAPES

    shape, children, tokens, length = scale.pick(("llama-2-7b", 16, 2048, 256), ("tiny", 3, 128, 64))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "engine.json"
        _call(
            *("benchmarks.engine", "--random-shape", shape, "--device", scale.device, "--only", "time", "--repetitions", "2"),
            *("--children", str(children), "--tokens", str(tokens), "--length", str(length), "--output", str(output)),
        )
        (row,) = json.loads(output.read_text()).values()
    sizes = SHAPES[shape]
    heads = sizes["num_attention_heads"] + sizes["num_key_value_heads"]
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    layer = sizes["hidden_size"] * (2 * heads * head_dim + 3 * sizes["intermediate_size"])
    # Products of the blocks' weights, dense model and children at the rate; attention itself and the head come on top.
    passes = (children + 1) * (1 - row["saved_passes"])
    flops = 2 * tokens * layer * sizes["num_hidden_layers"] * passes * (1 - 0.2)
    rate = row["candidates_per_second"]["engine"] / children
    name = torch.cuda.get_device_name(scale.device) if scale.gpu else ""
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    return {
        "shape": shape,
        "ratio_naive": row["ratio_naive"],
        "ratio_late": row["ratio_late"],
        "ratio_race": row["ratio_early_rejection"],
        "plan_tokens_per_second": round(rate * children * tokens),
        "share_of_peak": None if peak is None else round(flops * rate / peak, 3),
        "fitness_difference": row["fitness_difference"],
    }


def streaming(scale: Scale) -> Figures:
    """Half of Llama-2-13B's layers, so that writing its files leaves time for the rest; the ceiling is a quarter of that."""
    shape, layers = scale.pick(("llama-2-13b", 20), ("tiny", 16))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "streaming.json"
        _call(
            *("benchmarks.streaming", "--random", shape, "--layers", str(layers), "--folder", f"{folder}/model"),
            *("--device", scale.device, "--dtype", scale.pick("bfloat16", "float32"), "--share", scale.pick("0.25", "0.6")),
            *("--repeats", "1", "--rounds", "1", "--calibration-sequences", "1", "--output", str(output)),
            *scale.pick((), ("--children", "2", "--sequences", "1", "--length", "32")),
        )
        body = json.loads(output.read_text())
    streamed = body["streamed"]
    kept = ("slower", "weights_mib", "largest_relative_difference_of_kl")
    return {
        **{name: body[name] for name in kept},
        "shape": f"{shape}, {layers} layers",
        "ceiling_mib": streamed["ceiling_mib"],
        "peak_mib": streamed["evaluate_peak_mib"],
        "within": streamed["evaluate_peak_mib"] <= streamed["ceiling_mib"],
    }


class EnginePool:
    """Scores with an engine that asks for more than there is. On a CPU, which never refuses, it refuses more than two plans."""

    def __init__(self, case: Case, *, refuses: int | None) -> None:
        from selfpruner.evaluation.engine import Engine

        self.case, self.refuses = case, refuses
        self.engine = Engine(case.arch, case.blocks, memory_bytes=1 << 42)
        self.sizes: list[int] = []
        self.refused = 0
        self.workers = 1

    async def run(self, session: Session, request: Any, on_progress: object = None) -> Any:  # noqa: ARG002
        import torch

        from selfpruner.errors import OutOfMemoryError
        from selfpruner.planning.space import Plan
        from selfpruner.workers.tasks import EvaluateResult, ScoreRow

        self.sizes.append(len(request.plans))
        try:
            if self.refuses is not None and len(request.plans) > self.refuses:
                raise torch.OutOfMemoryError("pretended")
            scores = self.engine.evaluate([Plan(levels) for levels in request.plans], self.case.tokens[list(request.sequences)])
        except torch.OutOfMemoryError as error:
            self.refused += 1
            torch.cuda.empty_cache()
            raise OutOfMemoryError(str(error)) from error
        rows = tuple(ScoreRow(kl=score.kl, nll=score.nll, tokens=score.tokens) for score in scores)
        return EvaluateResult(rows=rows, seconds=0.0, passes=0, passes_without_sharing=0, peak_mib=0.0)

    async def close(self) -> None: ...


def out_of_memory(scale: Scale) -> Figures:
    """A generation too large for what the card may give: the batch is halved until it fits, and the scores are the same."""
    import asyncio

    import torch

    from benchmarks.engine import children_of
    from benchmarks.judge import Run, TraceRecorder
    from selfpruner.evolution.evaluator import Evaluator
    from selfpruner.records import Window
    from selfpruner.workers.base import Session

    shape = shape_of(scale, scale.pick(8, 2))
    case = random_model(shape, scale, scale.pick(torch.bfloat16, torch.float32), length=scale.pick(512, 32))
    parent = case.space.project([0.2] * case.space.layers)
    plans = children_of(case.space, parent, 8, 0)
    sequences = tuple(range(scale.pick(32, 2)))
    whole = EnginePool(case, refuses=None)
    window = Window("w", "fitness", sequences)

    def scored(pool: EnginePool) -> dict[str, float]:
        session = Session("s", {}, "")
        evaluator = Evaluator(pool, session, TraceRecorder(cast(Run, None)))
        return {name: fitness.kl for name, fitness in asyncio.run(evaluator.score(plans, [window])).items()}

    expected = scored(whole)
    if scale.gpu:
        # The streams of all plans, and what is computed from them, do not fit; those of a few do.
        device = case.arch.device
        torch.cuda.empty_cache()
        used, total = torch.cuda.memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        peak = torch.cuda.max_memory_allocated(device) - used
        torch.cuda.set_per_process_memory_fraction((used + 0.6 * peak) / total, device)
    halved = EnginePool(case, refuses=None if scale.gpu else 2)
    found = scored(halved)
    return {
        "refused": halved.refused,
        "sizes": halved.sizes,
        "largest_relative_difference": max(abs(found[name] / value - 1) for name, value in expected.items()),
    }


def gradients(scale: Scale) -> Figures:
    """Gradient statistics on the device against the CPU's, float32."""
    import torch

    from benchmarks.streaming import SHAPES
    from selfpruner.architectures import describe
    from selfpruner.calibration.gradients import layer_gradients

    case = random_model(
        {**SHAPES[scale.pick("wide", "tiny")], "num_hidden_layers": 2}, scale, torch.float32, length=scale.pick(256, 32)
    )
    tokens = case.tokens[: scale.pick(4, 2)]
    started = time.perf_counter()
    ours = {layer: {k: g.absolute.cpu() for k, g in by_name.items()} for layer, by_name in layer_gradients(case.arch, tokens)}
    _sync(case.arch.device)
    taken = time.perf_counter() - started
    on_cpu = _copy_on_cpu(case.arch.model)
    theirs = dict(layer_gradients(describe(on_cpu), tokens))
    worst = max(
        float((ours[layer][name] - sums.absolute).abs().max() / sums.absolute.abs().max())
        for layer, by_name in theirs.items()
        for name, sums in by_name.items()
    )
    return {"tokens_per_second": round(tokens.numel() / taken), "largest_relative_difference": worst}


def levels(scale: Scale) -> Figures:
    """Statistics, the order of units, repairs and N:M masks of one layer on the device, timed, and a narrow one against the CPU."""
    import torch

    from selfpruner import compensation, criteria
    from selfpruner.architectures import describe
    from selfpruner.calibration.statistics import Accumulator, layer_statistics
    from selfpruner.criteria import Matrix, UnitCriterion, WeightCriterion
    from selfpruner.criteria.masks import Sparsity
    from selfpruner.pruning.patterns import measure_attention, measure_ffn

    how: tuple[Any, Any] = (criteria.create("obs"), compensation.create("least_squares"))
    assert isinstance(how[0], UnitCriterion)
    case = random_model(shape_of(scale, 1), scale, scale.pick(torch.bfloat16, torch.float32))
    device, figures = case.arch.device, {}
    rows = scale.pick(8192, 256)
    for site, width in (("attention", case.arch.heads * case.arch.head_dim), ("ffn", case.arch.channels)):
        X = torch.randn(4, rows // 4, width, device=device)
        X.mul_(torch.linspace(0.1, 2, width, device=device))

        def gathered(X: Tensor = X, width: int = width) -> Accumulator:
            made = Accumulator(width, device)
            made.add(X)
            return made

        figures[f"{site}_statistics_s"] = seconds_of(gathered, device, 2)
        stats = gathered().finish()
        measure = measure_attention if site == "attention" else measure_ffn
        figures[f"{site}_order_and_repair_s"] = seconds_of(partial(measure, case.arch, 0, stats, *how), device, 1)
    # The same numbers as on the CPU, where a card's own rounding would show: narrow, in float32.
    small = random_model({**shape_of(Scale("cpu"), 2)}, scale, torch.float32)
    tokens = small.tokens[:4, :32]
    pairs = []
    for model in (small.arch.model, _copy_on_cpu(small.arch.model)):
        arch = describe(model)
        stats = next(iter(layer_statistics(arch, tokens)))["ffn"]
        errors = measure_ffn(arch, 0, stats, *how).errors.double().cpu()
        wanda = criteria.create("wanda", "n_m")
        assert isinstance(wanda, WeightCriterion)
        (mask,) = wanda.masks(Matrix("down", arch.ffn(0).down.float(), stats), [Sparsity.n_m(2, 4)])
        pairs.append((errors, mask.cpu()))
    (errors, mask), (expected, wanted) = pairs
    middle = slice(len(errors) // 8, -len(errors) // 8)
    figures["largest_relative_difference_of_errors"] = float((errors / expected - 1)[middle].abs().max())
    figures["same_n_m_weights"] = float((mask == wanted).double().mean())
    figures["statistics_tokens"] = rows
    return figures


def two_four(scale: Scale) -> Figures:
    """Products with 2:4 weights by the product's own conversion, against dense ones, at Llama-2-7B's FFN."""
    import torch
    from torch import nn

    from selfpruner.export.semi_structured import convert

    device = torch.device(scale.device)
    torch.manual_seed(0)
    found: Figures = {"ratio": {}}
    dense = nn.Linear(4096, 11008, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device, dtype=torch.bfloat16).repeat(1024)
    dense.weight.mul_(keep)
    sparse = nn.Sequential(copy.deepcopy(dense))
    convert(sparse)
    worst = 0.0
    for tokens in (1, 16, 256, 4096):
        x = torch.randn(tokens, 4096, device=device, dtype=torch.bfloat16)
        plain, halved = (seconds_of(partial(each, x), device, 20) for each in (dense, sparse))
        found["ratio"][str(tokens)] = round(plain / halved, 3)
        expected = dense(x).float()
        worst = max(worst, float((sparse(x).float() - expected).abs().max() / expected.abs().max()))
    return {**found, "largest_relative_difference": worst}


def graphs(scale: Scale) -> Figures:
    """One layer of the engine's walk as it is, compiled, and as a CUDA graph: what launching kernels costs at few tokens."""
    import torch

    case = random_model(shape_of(scale, 2), scale, scale.pick(torch.bfloat16, torch.float32))
    arch, device = case.arch, case.arch.device
    level = [len(block.options) // 4 for block in case.blocks]
    weights = [block.weights(number) for block, number in zip(case.blocks, level, strict=True)]
    length = scale.pick(256, 32)
    rope = arch.rope(length)

    def walk(x: Tensor) -> Tensor:
        for layer in range(arch.layers):
            x = arch.attend(layer, x, cast(Any, weights[2 * layer]), rope)
            x = arch.feed_forward(layer, x, cast(Any, weights[2 * layer + 1]))
        return x

    found: Figures = {}
    with torch.no_grad():
        for sequences in (1, 8):
            x = torch.randn(sequences, length, arch.hidden, device=device)
            eager = seconds_of(partial(walk, x), device)
            row = {"eager_ms": 1e3 * eager / arch.layers}
            torch.compiler.reset()
            compiled = torch.compile(walk, dynamic=False, backend=scale.pick("inductor", "aot_eager"))
            started = time.perf_counter()
            compiled(x)
            row["compile_s"] = time.perf_counter() - started
            row["compiled_over_eager"] = eager / seconds_of(partial(compiled, x), device)
            if scale.gpu:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    walk(x)
                row["graph_over_eager"] = eager / seconds_of(graph.replay, device)
            found[str(sequences * length)] = {name: round(value, 3) for name, value in row.items()}
    return found


def speed(scale: Scale) -> Figures:
    """Pruned against dense at 30 and 50 %, widths in multiples, beside the paper's."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "speed.json"
        _call(
            *("benchmarks.speed", "--random-shape", scale.pick("llama-2-7b", "tiny"), "--device", scale.device),
            *("--layers", scale.pick("8", "2"), "--repetitions", scale.pick("5", "3"), "--output", str(output)),
            *("--rates", *scale.pick(("0.3", "0.5"), ("0.3",)), "--multiples", *scale.pick(("8", "64", "128", "256"), ("8",))),
            *scale.pick((), ("--prompt-tokens", "16", "--new-tokens", "4")),
        )
        rows = json.loads(output.read_text())["rows"]
    found = []
    for row in rows:
        ratios = {each["measure"]: round(each["ratio"], 3) for each in row["ratios"] if each["measure"] != "first_token"}
        found.append({"rate": row["rate"], "multiple": row["multiple"], "paper": PAPER.get(row["rate"]), **ratios})
    return {"rows": found}


def two_workers(scale: Scale) -> Figures:
    """Two processes on one device, each with its own model, against one."""
    command = tied("-m", "benchmarks.gpu", "--one", "worker", "--device", scale.device)

    def rates(count: int) -> list[float]:
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        said = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit("a worker failed")
        return [json.loads(text.splitlines()[-1])["per_second"] for text in said]

    alone, both = rates(1)[0], rates(2)
    return {"alone_per_second": alone, "both_per_second": both, "gain": round(sum(both) / alone, 3)}


def generations_per_second(scale: Scale) -> Figures:
    """A worker's share of :func:`two_workers`: generations of 16 children for a while. Begins together with the other one: what is
    counted lies between two moments of the clock that both see."""
    import torch

    from benchmarks.engine import children_of
    from selfpruner.evaluation.engine import Engine

    case = random_model(
        shape_of(scale, scale.pick(8, 2)), scale, scale.pick(torch.bfloat16, torch.float32), length=scale.pick(256, 32)
    )
    scorer = Engine(case.arch, case.blocks, memory_bytes=scale.pick(8 << 30, 64 << 20))
    plans = children_of(case.space, case.space.project([0.2] * case.space.layers), scale.pick(16, 2), 0)
    window = case.tokens[: scale.pick(8, 1)]
    scorer.evaluate(plans, window, exact=False)
    period = scale.pick(10, 1)
    time.sleep(period - time.time() % period)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < scale.pick(8, 0.5):
        scorer.evaluate(plans, window, exact=False)
        _sync(case.arch.device)
        done += 1
    return {"per_second": round(done / (time.perf_counter() - started), 3)}


def _copy_on_cpu(model: nn.Module) -> Any:
    return copy.deepcopy(model).cpu()


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.0f} %"


def _speed_row(found: Figures) -> str:
    parts = []
    for row in found["rows"]:
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in row.items() if name not in ("rate", "multiple", "paper"))
        parts.append(f"{row['rate']:.0%} in {row['multiple']}s: {ratios} (paper {row['paper']})")
    return "; ".join(parts)


SECTIONS: dict[str, Section] = {
    "conformance": Section(
        "conformance suites",
        150,
        conformance,
        lambda f: f"{f['passed']} passed, {f['failed']} failed" + (": " + ", ".join(f["broken"][:3]) if f["broken"] else ""),
    ),
    "engine": Section(
        "engine against naive copies",
        80,
        engine,
        lambda f: (
            f"{f['shape']}: {f['ratio_naive']:.2f} times naive, late {f['ratio_late']:.2f}, race {f['ratio_race']:.2f}; "
            f"{f['plan_tokens_per_second']:,} plan-tokens/s, {_percent(f['share_of_peak'])} of the bf16 peak"
        ),
    ),
    "streaming": Section(
        "streaming under a ceiling",
        110,
        streaming,
        lambda f: (
            f"{f['shape']}: {f['weights_mib']:,.0f} MiB of weights, peak {f['peak_mib']:,.0f} of {f['ceiling_mib']:,.0f} MiB, "
            f"{f['slower']:.2f} times as slow, KL within {f['largest_relative_difference_of_kl']:.1e}"
        ),
    ),
    "out_of_memory": Section(
        "out of memory, halved",
        40,
        out_of_memory,
        lambda f: f"batches {f['sizes']}, {f['refused']} refused, KL within {f['largest_relative_difference']:.1e}",
    ),
    "gradients": Section(
        "gradients",
        40,
        gradients,
        lambda f: f"{f['tokens_per_second']:,} tokens/s, within {f['largest_relative_difference']:.1e} of the CPU's",
    ),
    "levels": Section(
        "statistics, order, repairs, N:M",
        60,
        levels,
        lambda f: (
            f"FFN: {f['statistics_tokens'] / f['ffn_statistics_s']:,.0f} tokens/s of statistics, order and repair "
            f"{f['ffn_order_and_repair_s']:.2f} s; attention {f['statistics_tokens'] / f['attention_statistics_s']:,.0f} and "
            f"{f['attention_order_and_repair_s']:.2f} s; errors within {f['largest_relative_difference_of_errors']:.1e}, "
            f"{f['same_n_m_weights']:.2%} of 2:4 the same"
        ),
    ),
    "two_four": Section(
        "2:4 kernels",
        30,
        two_four,
        lambda f: "over dense: " + ", ".join(f"{n} tokens {r:.2f}" for n, r in f["ratio"].items()),
        cuda_only=True,
    ),
    "graphs": Section(
        "torch.compile and CUDA graphs",
        60,
        graphs,
        lambda f: "; ".join(
            f"{tokens} tokens: eager {row['eager_ms']:.2f} ms a layer, compiled {row['compiled_over_eager']:.2f} times that, after "
            f"{row['compile_s']:.1f} s" + (f", graph {row['graph_over_eager']:.2f}" if "graph_over_eager" in row else "")
            for tokens, row in f.items()
        ),
    ),
    "two_workers": Section(
        "two workers on one device",
        70,
        two_workers,
        lambda f: f"{f['gain']:.2f} times one ({f['alone_per_second']:.2f} generations/s)",
    ),
    "speed": Section("pruned against dense", 120, speed, _speed_row),
}


if __name__ == "__main__":
    sys.exit(main())
