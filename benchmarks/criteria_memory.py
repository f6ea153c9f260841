"""What every criterion takes beyond the model: peaks of a process while it collects its statistics and while it decides.

    MALLOC_ARENA_MAX=1 ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 OMP_NUM_THREADS=1 python -m benchmarks.criteria_memory
    ... python -m benchmarks.criteria_memory --random-shape wide --folder /data/wide

Each criterion is a process of its own with an empty cache. Peaks are anonymous resident memory, looked at every millisecond, beyond
what the process held when the model was loaded; pages of files are none, the system takes them back. ``statistics`` is the largest
layer's: a float64 matrix of second moments per place that the criterion looks at, and for gradients three float32 sums per weight.
Asked is at most 1.5 times that. ``--random-shape`` writes a model of random weights in that shape into ``--folder`` first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from benchmarks.streaming import SHAPES, write_random
from selfpruner import catalogue
from selfpruner.workers.lifeline import tied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--random-shape", choices=SHAPES, help="a model of random weights instead")
    parser.add_argument("--folder", type=Path, help="where the random model is, or is written to")
    parser.add_argument("--sequences", type=int, default=4, help="of 512 tokens, of the calibration text")
    parser.add_argument("--criteria", nargs="+", default=list(catalogue.CRITERIA))
    parser.add_argument("--compensation", default="none")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/criteria_memory.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.random_shape:
        if options.folder is None:
            parser.error("--random-shape needs --folder")
        options.model = str(options.folder)
        if not (options.folder / "tokenizer_config.json").is_file():
            write_random(options.folder, SHAPES[options.random_shape])
    if options.one:
        print(json.dumps(_one(options, *options.one)))
        return
    rows = []
    for criterion in options.criteria:
        for pattern in catalogue.CRITERIA[criterion].patterns:
            command = tied("-m", "benchmarks.criteria_memory", *sys.argv[1:], "--one", pattern, criterion)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"criterion": criterion, "pattern": pattern, **json.loads(done.stdout.splitlines()[-1])})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    known = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
    known.setdefault(options.random_shape or options.model, {})[options.compensation] = rows
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print("| criterion | pattern | statistics | while collecting | while deciding | over statistics |\n|" + "---|" * 6)
    for row in rows:
        cells = " | ".join(f"{row[key]:.1f}" for key in ("statistics", "collecting", "deciding"))
        print(f"| {row['criterion']} | {row['pattern']} | {cells} | {max(row['deciding'], 0) / row['statistics']:.2f} |")


def _one(options: argparse.Namespace, pattern: str, criterion: str) -> dict[str, float]:
    """MiB."""
    import torch

    from benchmarks.data import text
    from benchmarks.streaming import warm_up
    from selfpruner import criteria, models
    from selfpruner.api import config_of, default_cache
    from selfpruner.architectures import describe
    from selfpruner.calibration.cache import cached_gradients, cached_statistics
    from selfpruner.calibration.statistics import OUTPUTS, SITES
    from selfpruner.calibration.texts import token_batches
    from selfpruner.models import checks
    from selfpruner.models.memory import release
    from selfpruner.pruning.blocks import prepare_blocks

    cache = default_cache()
    source = models.resolve(options.model, cache)
    config = config_of(
        {
            "rate": 0.5,
            "preset": "evolution",
            "pattern": pattern,
            "criterion": criterion,
            "compensation": options.compensation,
            "sparsity_step": 0.25,
            "calibration": {"sources": [{"source": text("c4", cache)}], "sequences": options.sequences, "length": 512},
        }
    )
    device = torch.device("cpu")
    dtype = models.choose_dtype("auto", device, stored=checks.stored_dtype(source.folder))
    warm_up(source.folder, device, dtype)
    loaded = models.load(source, "cpu")
    arch = describe(loaded.model)
    batches = token_batches(config.calibration, "calibration", loaded, cache, 0)
    with torch.inference_mode():
        loaded.model(batches.tokens[:1])  # every kernel and its scratch space once
    rule = criteria.create(criterion, pattern)
    fingerprint = f"{loaded.source.fingerprint}:{batches.fingerprint}"
    sites = SITES if catalogue.PATTERNS[pattern].zeros else OUTPUTS
    widths = {"qkv": arch.hidden, "attention": arch.heads * arch.head_dim, "gate_up": arch.hidden, "ffn": arch.channels}
    statistics = sum(8 * widths[site] ** 2 for site in sites)
    if "gradients" in rule.needs:
        statistics += sum(
            3 * 4 * getattr(weights, name).numel() for weights in (arch.attention(0), arch.ffn(0)) for name in weights.matrices
        )
    release()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        place = Path(folder)
        with Tracer() as collecting:
            if "gradients" in rule.needs:
                cached_gradients(arch, batches.tokens, place / "statistics", fingerprint)
            for _ in cached_statistics(arch, batches.tokens, place / "statistics", fingerprint, sites):
                release()
        release()
        quiet = (lambda _: None), (lambda: False)
        with Tracer() as deciding:
            prepare_blocks(config, arch, loaded, batches, place, *quiet)
    return {"statistics": statistics / 2**20, "collecting": collecting.peak, "deciding": deciding.peak}


class Tracer:
    """The largest anonymous resident memory while it is on, in MiB beyond that at its start: ``peak``."""

    def __enter__(self) -> Tracer:
        self.peak, self._base, self._over = 0.0, _anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.peak = max(self.peak, _anonymous() - self._base)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _anonymous() -> float:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
