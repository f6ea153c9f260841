"""How long a whole default search takes for models that do not fit here, by simulation; written to benchmarks/scale.md.

    python -m benchmarks.scale > benchmarks/scale.md
    python -m benchmarks.scale --check

A model of costs: products of weights (every pass of a token through a block), products of inputs (statistics), orders and repairs,
bytes read, streamed, moved and written, and a task's overhead. What a search consists of is taken from the config's defaults; which
share of a child's passes is its own, and what a survey takes, from a search that was counted. H100 figures are those of NVIDIA's
data sheet times an assumed share of them. ``--check`` measures the costs of one thread here by themselves, in CPU time, and
compares what they foresee of a search of SmolLM2-135M (preset ``evolution``, two generations) with what that took, stage by stage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TypeVar

from selfpruner.config import SearchConfig

RESULTS = Path("benchmarks/results/scale.json")
R = TypeVar("R")
# Tokens that are written at once, and the steps that one such stretch takes: see selfpruner.calibration.
STRETCHES, STEPS = 128, 256


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    name: str
    layers: int
    hidden: int
    channels: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    bytes: int = 2  # per weight

    @property
    def decoder(self) -> int:
        each = 2 * (self.heads + self.groups) * self.head_dim + 3 * self.channels
        return self.layers * self.hidden * each

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> int:
        return self.bytes * (self.decoder + 2 * self.head)

    @property
    def widths(self) -> tuple[int, int]:
        """Of the inputs whose products are summed: of attention's and the FFN's output matrix."""
        return self.heads * self.head_dim, self.channels


@dataclass(frozen=True)
class Machine:
    """What one worker does in a second: operations in products of weights, of inputs (statistics), in orders and repairs (of
    4 n^3 + 2 d n^2); bytes from its memory, from the host, to another worker, and of its disk. ``room``: bytes that weights
    may take; ``task``: seconds that a task costs besides."""

    name: str
    products: float
    inputs: float
    factors: float
    memory: float
    host: float
    wire: float
    disk: float
    room: float
    task: float


# NVIDIA's data sheet of the H100 SXM: 989e12 operations a second in bfloat16 and 67e12 in float32, 3.35e12 bytes a second of
# memory, 900e9 of NVLink and 128e9 of PCIe, both ways together; 80e9 bytes.
# Assumed: 40 % of the bfloat16 rate in products of weights and 20 % in those of inputs (`make test-gpu` will say), a tenth of the
# float32 rate in orders and repairs, 80 % of the memory's and of PCIe's one way, an eighth of NVLink's one way (a cache folder and
# copies lie between), 5e9 of disk, 0.05 s a task.
H100 = Machine("H100", 0.4 * 989e12, 0.2 * 989e12, 0.1 * 67e12, 0.8 * 3.35e12, 0.8 * 64e9, 450e9 / 8, 5e9, 64e9, 0.05)

SHAPES = (
    Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256),
    Shape("Llama-3.1-405B", 126, 16384, 53248, 128, 8, 128, 128256),
)
SMOLLM2 = Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152)


@dataclass(frozen=True)
class Work:
    """What a search asks for. ``own``: the share of a child's passes that no other plan has; ``survey``: passes of the whole model
    that a survey costs, per token."""

    calibration: tuple[int, int]  # sequences, length
    length: int  # of the fitness text
    probe: int
    surveys: int
    survey_tokens: int
    generations: int
    tokens: int
    plans: int  # scored in a generation: children, and the population again
    final: int
    finalists: int
    report: tuple[int, int]
    written: int  # tokens, where the model writes its text itself
    own: float
    survey: float


def work_of(config: SearchConfig, own: float, survey: float) -> Work:
    written = sum(text.sequences * text.length for text in (config.calibration, config.fitness_text))
    return Work(
        (config.calibration.sequences, config.calibration.length),
        config.fitness_text.length,
        config.probe_tokens,
        config.surveys,
        config.survey_tokens,
        config.generations,
        config.stages[-1].tokens,
        config.population + config.crossover_offspring + config.mutation_offspring,
        config.final_tokens,
        config.population + 2,
        (config.report_text.sequences, config.report_text.length),
        written,
        own,
        survey,
    )


def walk(
    machine: Machine, shape: Shape, workers: int, sequences: int, length: int, plans: int, own: float, exact: bool = False
) -> float:
    """Seconds of scoring ``plans`` on so many sequences: split by sequences first, then by groups of plans."""
    parts = min(workers, sequences)
    groups = max(1, min(workers // parts, plans))
    tokens, mine = ceil(sequences / parts) * length, ceil(plans / groups)
    passes = 1 + mine * own
    compared = 1 + mine * (1 if exact else 1 / 64)  # a position in 64 is compared over the whole vocabulary
    seconds = 2 * tokens * (shape.decoder * passes + shape.head * compared) / machine.products
    return max(seconds, reading(machine, shape)) + machine.task


def reading(machine: Machine, shape: Shape) -> float:
    """All weights once: from the device's memory, or from the host's where they do not fit."""
    return shape.weight_bytes / (machine.memory if shape.weight_bytes <= machine.room else machine.host)


def stages(machine: Machine, shape: Shape, work: Work, workers: int) -> dict[str, float]:
    """Seconds of every stage on so many workers."""
    sequences, length = work.calibration
    tokens = ceil(sequences / workers) * length
    squares = sum(width**2 for width in shape.widths)
    # Half of every symmetric product, and a sixth of the sequences judge the repair: they are summed apart, but once.
    statistics = max(2 * tokens * shape.decoder / machine.products, reading(machine, shape))
    statistics += tokens * shape.layers * squares / machine.inputs
    # Every worker's sums go to the owner of the layer, and every owner has its share of the layers.
    moved = 0.0 if workers == 1 else 4 * ceil(shape.layers / workers) * (workers - 1) * squares / machine.wire
    a_layer = sum(4 * width**3 + 2 * shape.hidden * width**2 for width in shape.widths) / machine.factors
    count = 2 * shape.layers

    def scored(tokens: int, plans: int, own: float) -> float:
        return walk(machine, shape, workers, ceil(tokens / work.length), work.length, plans, own)

    # Pieces of text take as long as whole sequences; a block pruned alone shares on average half of the layers.
    probes = scored(work.probe, count, 0.5) + scored(ceil(work.probe / 2), count, 0.5)
    steps = ceil(ceil(work.written / STEPS) / STRETCHES) * STEPS  # by one worker
    return {
        "loading": shape.weight_bytes / machine.disk,
        "texts": steps * max(reading(machine, shape), 2 * STRETCHES * (shape.decoder + shape.head) / machine.products),
        "statistics": statistics + moved + machine.task,
        "orders and repairs": ceil(shape.layers / workers) * a_layer + machine.task,
        "probes": probes,
        "surveys": work.surveys * scored(work.survey_tokens, 1, work.survey),
        "generations": work.generations * scored(work.tokens, work.plans, work.own),
        "final": scored(work.final, work.finalists, work.own),
        "report": walk(machine, shape, workers, *work.report, 2, 1.0, exact=True),
        "export and proof": 3 * shape.weight_bytes * 0.8 / machine.disk,
    }


# -- what is printed -------------------------------------------------------------------------------------------------------------
def page(own: float, survey: float) -> str:
    """Markdown: the tables, and what bounds them."""
    work = work_of(SearchConfig(rate=0.2), own, survey)
    lines = [
        HEAD.format(own=own, survey=survey),
        "",
        "| model | GPUs | text from files | gain over one | text it writes (`self`) |",
        "|---|---:|---:|---:|---:|",
    ]
    details = []
    for shape in SHAPES:
        one = 0.0
        rows = {workers: stages(H100, shape, work, workers) for workers in (1, 8, 64)}
        for workers, row in rows.items():
            written = sum(row.values())
            whole = written - row["texts"]
            one = one or whole
            cells = [shape.name, str(workers), minutes(whole), f"{one / whole:.1f}", minutes(written)]
            lines.append("| " + " | ".join(cells) + " |")
        details += ["", f"## {shape.name}", "", f"{shape.weight_bytes / 1e9:,.0f} GB of weights, " + placed(shape), ""]
        details += [
            "| stage | " + " | ".join(f"{workers} GPU{'s' * (workers > 1)}" for workers in rows) + " |",
            "|---|" + "---:|" * len(rows),
        ]
        details += ["| " + " | ".join([name, *(f"{row[name]:,.1f} s" for row in rows.values())]) + " |" for name in rows[1]]
    return "\n".join([*lines, *details, "", TAIL])


HEAD = """# A default search at scale, by simulation

    python -m benchmarks.scale > benchmarks/scale.md

Nothing here was measured on a GPU. H100 SXM as in its data sheet: 989 TFLOP/s in bfloat16 and 67 in float32, 3.35 TB/s, 80 GB,
NVLink 450 GB/s and PCIe 64 GB/s each way. Assumed: 40 % of the bfloat16 rate in products of weights and 20 % in statistics, 10 %
of the float32 rate in orders and repairs, 80 % of memory's and PCIe's, 56 GB/s between workers, a disk of 5 GB/s, 0.05 s per task.
The LLM that operators ask answers meanwhile, somewhere else. A child has {own:.2f} of its passes to itself and a survey costs
{survey:.1f} passes of the model, as counted in a search of SmolLM2-135M here (results/scale.json)."""

TAIL = """## Where it stops paying

- A model that writes its text (`self`, the default without a hub) reads all weights once for every position, on one worker. That is
  seconds while they are in the device's memory, and most of the search where they come from the host: give such a model a file.
- A generation is 1,024 tokens, four sequences: beyond four workers only groups of plans can be split, and every group goes
  through the dense model again. A streamed model reads all its weights in every walk, however few tokens a worker has left: that
  takes as long on 64 GPUs as on one. More GPUs would pay there if their memory together held the weights, layer by layer, which
  the engine cannot use.
- Statistics, orders and repairs go down with the number of workers, up to a sequence (64) and a layer each; what is moved for
  them grows with the square of the width, and does not go down.
- Loading, export and proof read and write the model on one worker: with few seconds left for all else, they are what remains."""


def placed(shape: Shape) -> str:
    return "in each GPU's memory." if shape.weight_bytes <= H100.room else "streamed from the host's memory in every walk."


def minutes(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


# -- measured here ---------------------------------------------------------------------------------------------------------------
def cpu_of(run: Callable[[], R], repetitions: int = 3) -> float:
    """CPU seconds of the cheapest of a few runs, after one that is not counted."""
    run()
    taken = []
    for _ in range(repetitions):
        busy = time.process_time()
        run()
        taken.append(time.process_time() - busy)
    return min(taken)


def measured() -> Machine:
    """One thread of this machine, on random weights in SmolLM2's shape; bytes cost nothing here."""
    import torch

    from benchmarks.engine import children_of, random_case
    from selfpruner import compensation, criteria, models
    from selfpruner.calibration.statistics import Accumulator
    from selfpruner.criteria import UnitCriterion
    from selfpruner.evaluation.engine import Engine
    from selfpruner.pruning.patterns import measure_attention, measure_ffn

    torch.set_num_threads(1)
    shape, layers = SMOLLM2, 6
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.channels,
        "num_attention_heads": shape.heads,
        "vocab_size": 4096,
    }
    sizes |= {"num_key_value_heads": shape.groups, "head_dim": shape.head_dim, "num_hidden_layers": layers}
    device = torch.device("cpu")
    options = argparse.Namespace(rate=0.2, length=256)
    case = random_case(sizes, options, device, models.choose_dtype("auto", device, stored="bfloat16"))
    engine = Engine(case.arch, case.blocks)
    plans = children_of(case.space, case.space.project([0.2] * layers), 8, 0)
    tokens = case.tokens[:4]
    before = engine.work.passes
    engine.evaluate(plans, tokens, exact=False)
    passes = engine.work.passes - before
    seconds = cpu_of(lambda: engine.evaluate(plans, tokens, exact=False))
    small = replace(shape, layers=layers, vocabulary=4096)
    done = 2 * tokens.numel() * (small.decoder * passes / (2 * layers) + small.head * (1 + len(plans) / 64))
    how = criteria.create("obs"), compensation.create("least_squares")
    assert isinstance(how[0], UnitCriterion)
    summed = ordered = 0.0
    rows = 2048
    for width, measure in zip(shape.widths, (measure_attention, measure_ffn), strict=True):
        X = torch.randn(4, rows // 4, width).mul_(torch.linspace(0.1, 2, width)).to(case.arch.dtype)

        def gathered(X: torch.Tensor = X, width: int = width) -> Accumulator:
            made = Accumulator(width, device)
            made.add(X)
            return made

        summed += cpu_of(gathered)
        stats, judge = gathered(), gathered()
        found = stats.finish(judge)
        ordered += cpu_of(lambda m=measure, s=found: m(case.arch, 0, s, how[0], how[1]), 2)  # type: ignore[misc]
    squares = sum(width**2 for width in shape.widths)
    factors = sum(4 * width**3 + 2 * shape.hidden * width**2 for width in shape.widths)
    far = 1e15
    return Machine("one thread", done / seconds, rows * squares / summed, factors / ordered, far, far, far, far, far, 0.0)


def check(texts: Path) -> dict[str, object]:
    """A search of SmolLM2-135M on one thread: what every stage took of CPU time, and what the costs by themselves foresee of it."""
    import torch

    import selfpruner
    from selfpruner.errors import CancelledTaskError, SelfprunerError
    from selfpruner.evolution.evaluator import SLOPE_PASSES
    from selfpruner.jobs.handler import SessionHandler
    from selfpruner.progress import Cancelled, OnProgress
    from selfpruner.workers.base import Session
    from selfpruner.workers.tasks import (
        BaselineRequest,
        EvaluateRequest,
        ExportRequest,
        MeasureRequest,
        SlopesRequest,
        TaskRequest,
        TaskResult,
    )

    torch.set_num_threads(1)
    done: list[tuple[TaskRequest[TaskResult], float, int]] = []
    marks: list[tuple[str, float]] = []
    over: list[str] = []
    inner = SessionHandler.handle

    def handle(
        self: SessionHandler, session: Session, request: TaskRequest[TaskResult], progress: OnProgress, cancelled: Cancelled
    ) -> TaskResult:
        def marked(text: str) -> None:
            marks.append((text, time.process_time()))
            progress(text)

        if isinstance(request, MeasureRequest | BaselineRequest | ExportRequest) or getattr(request, "text", "") == "report":
            over.append(request.kind)
            raise CancelledTaskError("The search is over, and the report is not compared.")
        busy = time.process_time()
        result = inner(self, session, request, marked, cancelled)
        done.append((request, time.process_time() - busy, getattr(result, "passes", 0)))
        return result

    def text(sequences: int, length: int) -> dict[str, object]:
        return {"sources": [{"source": str(texts)}], "sequences": sequences, "length": length}

    fields: dict[str, object] = {
        "rate": 0.2,
        "model": "smollm2-135m",
        "preset": "evolution",
        "device": "cpu",
        "generation_probe": False,
        "calibration": text(8, 512),
        "fitness_text": text(16, 256),
        "report_text": text(2, 512),
        "probe_tokens": 512,
        "generations": 2,
        "surveys": 1,
        "survey_tokens": 1024,
        "final_tokens": 1024,
    }
    config = SearchConfig.model_validate(fields)
    with tempfile.TemporaryDirectory() as folder:
        SessionHandler.handle = handle  # type: ignore[method-assign, assignment]

        def said(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        fields.pop("rate")
        try:
            selfpruner.search(
                config.rate,
                f"{folder}/out",
                cache=Path(folder) / "cache",
                progress=said,
                **fields,  # type: ignore[arg-type]
            )
        except SelfprunerError:
            if not over:
                raise
    count, last = 2 * SMOLLM2.layers, config.fitness_text.sequences - 1
    taken = dict.fromkeys(("probes", "generations", "final"), 0.0)
    scored: list[tuple[int, int]] = []
    own: list[float] = []
    for request, seconds, passes in done:
        if isinstance(request, EvaluateRequest) and request.text == "fitness":
            stage = "probes" if len(request.plans) > count // 2 else "final" if last in request.sequences else "generations"
            taken[stage] += seconds
            if stage == "generations" and passes:
                scored.append((len(request.plans), len(request.sequences)))
                own.append((passes / count - 1) / len(request.plans))
    slopes = [(request, seconds) for request, seconds, _ in done if isinstance(request, SlopesRequest)]
    survey = sum(SLOPE_PASSES + len(request.moves) / count for request, _ in slopes) / max(len(slopes), 1)
    taken["surveys"] = sum(seconds for _, seconds in slopes)
    begun = next(at for line, at in marks if line.startswith("statistics of layer 1/"))
    taken["statistics, orders and repairs"] = (
        next(at for line, at in marks if line.startswith("reading factors of layer 1/")) - begun
    )
    machine = measured()
    work = work_of(config, sum(own) / max(len(own), 1), survey)
    work = replace(work, generations=len(scored), plans=round(sum(plans for plans, _ in scored) / max(len(scored), 1)))
    by_stage = stages(machine, SMOLLM2, work, 1)
    by_stage["statistics, orders and repairs"] = by_stage["statistics"] + by_stage["orders and repairs"]
    rows = {name: {"measured": round(seconds, 2), "foreseen": round(by_stage[name], 2)} for name, seconds in taken.items()}
    whole = {side: sum(row[side] for row in rows.values()) for side in ("measured", "foreseen")}
    return {
        "own": round(work.own, 3),
        "survey": round(survey, 2),
        "machine": {name: float(f"{getattr(machine, name):.3g}") for name in ("products", "inputs", "factors")},
        "load_average": os.getloadavg()[0],
        "cpu_seconds": {**rows, "together": whole, "error": round(whole["foreseen"] / whole["measured"] - 1, 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure here instead, and keep it in benchmarks/results/scale.json")
    options = parser.parse_args()
    if options.check:
        from benchmarks.data import text
        from selfpruner.api import default_cache

        found = check(Path(text("wikitext2-train", default_cache())))
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
    else:
        counted = json.loads(RESULTS.read_text())
        print(page(counted["own"], counted["survey"]))


if __name__ == "__main__":
    main()
