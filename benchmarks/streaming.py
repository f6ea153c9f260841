"""What streaming costs: one generation of a search, scored with the model in memory and with its weights in their files.

    python -m benchmarks.streaming --model smollm2-135m --share 0.25
    python -m benchmarks.streaming --random llama-2-7b --folder /data/random-7b --device cuda:0 --dtype bfloat16 --share 0.25

Every run is a process of its own, resident and streamed in turn. Peaks are what a process took beyond its libraries (on a GPU what
torch allocated), phase by phase; orders and repairs were made before, by another process. ``--random`` writes a model of random
weights in that shape into ``--folder`` first, and uses random tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from selfpruner.workers.lifeline import tied

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000},
    "llama-2-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    | {"num_key_value_heads": 40, "vocab_size": 32000},
    # Two layers as wide as those of a model of a billion parameters.
    "wide": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "vocab_size": 4096},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 16, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 4096},
}
PHASES = ("load", "prepare", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--random", choices=SHAPES, help="a model of random weights instead")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, where disk or time are short")
    parser.add_argument("--folder", type=Path, help="where the random model is, or is written to")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--share", type=float, default=0.25, help="the ceiling as a share of the weights")
    parser.add_argument("--children", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--calibration-sequences", type=int, default=32)
    parser.add_argument("--criterion", default=None, help="obs, or magnitude for a random model")
    parser.add_argument("--compensation", default=None, help="least_squares, or none for a random model")
    parser.add_argument("--rounds", type=int, default=2, help="generations per process, after one that is not counted")
    parser.add_argument("--repeats", type=int, default=2, help="processes per mode")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=("prepare", "resident", "streamed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.criterion = options.criterion or ("magnitude" if options.random else "obs")
    options.compensation = options.compensation or ("none" if options.random else "least_squares")
    if options.one:
        print(json.dumps(_one(options)))
        return
    if options.random:
        if options.folder is None:
            parser.error("--random needs --folder")
        if not (options.folder / "tokenizer_config.json").is_file():
            shape = SHAPES[options.random]
            write_random(options.folder, shape if options.layers is None else {**shape, "num_hidden_layers": options.layers})
    _child("prepare")
    runs: dict[str, list[dict[str, Any]]] = {"resident": [], "streamed": []}
    for _ in range(options.repeats):
        for mode, found in runs.items():
            found.append(_child(mode))
            print(mode, json.dumps(found[-1]), file=sys.stderr, flush=True)
    body = _summary(options, runs)
    if options.output:
        options.output.write_text(json.dumps(body, indent=2) + "\n")
    print(json.dumps(body, indent=2))


def _child(mode: str) -> dict[str, Any]:
    command = tied("-m", "benchmarks.streaming", *sys.argv[1:], "--one", mode)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the {mode} process failed with code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _summary(options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    body: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items() if v is not None}}
    for mode, found in runs.items():
        seconds = [second for run in found for second in run["seconds"]]
        body[mode] = {
            "seconds": round(statistics.median(seconds), 3),
            "candidates_per_second": round(options.children / statistics.median(seconds), 3),
            **{f"{phase}_seconds": round(min(run[phase] for run in found), 2) for phase in PHASES[:2]},
            **{f"{phase}_peak_mib": round(max(run["peaks"][phase] for run in found), 1) for phase in PHASES},
            "ceiling_mib": found[0]["ceiling_mib"],
        }
    body["weights_mib"] = runs["resident"][0]["weights_mib"]
    body["slower"] = round(body["streamed"]["seconds"] / body["resident"]["seconds"], 3)
    for mode in runs:
        body[mode]["peak_of_weights"] = round(body[mode]["evaluate_peak_mib"] / body["weights_mib"], 3)
    pairs = zip(runs["resident"][0]["kl"], runs["streamed"][0]["kl"], strict=True)
    body["largest_relative_difference_of_kl"] = max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)
    return body


def _one(options: argparse.Namespace) -> dict[str, Any]:
    """One process: load, prepare, score a generation again and again."""
    import torch

    from benchmarks.data import text
    from selfpruner import models
    from selfpruner.api import config_of, default_cache
    from selfpruner.architectures import describe
    from selfpruner.calibration.texts import TokenBatches, token_batches
    from selfpruner.config import TextConfig
    from selfpruner.evaluation.session import make_engine
    from selfpruner.models import checks
    from selfpruner.models.memory import release
    from selfpruner.operators.evolution import switch
    from selfpruner.planning.space import Plan
    from selfpruner.pruning.blocks import prepare_blocks
    from selfpruner.pruning.search_space import space_of

    cache = default_cache()
    source = models.resolve(str(options.folder) if options.random else options.model, cache)
    device = models.choose_device(options.device)
    dtype = models.choose_dtype(options.dtype, device, stored=checks.stored_dtype(source.folder))
    weights, _ = checks.weight_bytes(source.folder, dtype.itemsize)
    ceiling = int(weights * options.share) if options.one == "streamed" else None
    config = config_of(
        {
            "rate": 0.2,
            "preset": "evolution",
            "criterion": options.criterion,
            "compensation": options.compensation,
            "memory": ceiling,
            "calibration": {"sequences": options.calibration_sequences, "length": 512},
        }
    )
    if device.type == "cuda":
        torch.zeros(1, device=device)
    warm_up(source.folder, device, dtype)
    memory = Memory(device)
    out: dict[str, Any] = {"weights_mib": round(weights / 2**20, 1), "ceiling_mib": ceiling and round(ceiling / 2**20, 1)}
    out |= {"libraries_mib": round(memory.base / 2**20, 1), "peaks": {}}

    started = time.perf_counter()
    loaded = models.load(source, str(device), str(dtype).removeprefix("torch."), ceiling)
    out["load"] = time.perf_counter() - started
    out["peaks"]["load"] = memory.peak()
    arch = describe(loaded.model)

    def tokens(name: str, sequences: int, length: int, role: Any) -> TokenBatches:
        if options.random:
            drawn = torch.randint(arch.vocabulary, (sequences, length), generator=torch.Generator().manual_seed(len(role)))
            return TokenBatches(drawn, (), f"{role} {sequences} {length}")
        wanted = TextConfig.model_validate({"sources": [{"source": text(name, cache)}], "sequences": sequences, "length": length})
        return token_batches(wanted, role, loaded, cache, 0)

    calibration = tokens("wikitext2-train", options.calibration_sequences, 512, "calibration")
    judged = tokens("wikitext2-train", options.sequences, options.length, "fitness").tokens
    started = time.perf_counter()
    quiet = (lambda _: None), (lambda: False)
    blocks, _ = prepare_blocks(config, arch, loaded, calibration, cache, *quiet)
    space = space_of(config, arch, blocks)
    out["prepare"] = time.perf_counter() - started
    out["peaks"]["prepare"] = memory.peak()
    if options.one == "prepare":
        return out
    engine = make_engine(arch, loaded, blocks)
    chance = random.Random(0)
    parent = space.project([0.2] * space.layers)
    plans: Iterable[Plan] = [
        switch(space, parent, chance, min(chance.randint(1, 3), chance.randint(1, 3))) for _ in range(options.children)
    ]
    out["seconds"] = []
    for round_ in range(options.rounds + 1):
        started = time.perf_counter()
        scores = engine.evaluate(list(plans), judged)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if round_:
            out["seconds"].append(time.perf_counter() - started)
        release()
    out["kl"] = [score.kl for score in scores]
    out["peaks"]["evaluate"] = memory.peak()
    return out


def warm_up(folder: Path, device: Any, dtype: Any) -> None:
    """Use once what loads or compiles itself at first use: the tokenizer's library, transformers' modules, kernels."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig
    from transformers.models.auto import AutoModelForCausalLM

    AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    model(torch.zeros(1, 256, dtype=torch.long, device=device))
    torch.linalg.cholesky(torch.eye(600, dtype=torch.float64)) @ torch.eye(600, dtype=torch.float64)


class Memory:
    """Peaks since the last look, in MiB beyond what there was at the start."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.base = 0 if device.type == "cuda" else self._status("VmRSS")
        self.peak()

    @staticmethod
    def _status(field: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024

    def peak(self) -> float:
        if self.device.type == "cuda":
            import torch

            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            peak = self._status("VmHWM")
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        return (peak - self.base) / 2**20


def write_random(folder: Path, shape: dict[str, int]) -> None:
    """A Llama of random bfloat16 weights, written a few rows at a time."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.auto import AutoModelForCausalLM

    from selfpruner.files.tensors import held_shapes, write_tensors
    from selfpruner.testing.tiny_models import tiny_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16")  # type: ignore[arg-type]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = model.state_dict()
    # Rows of one long draw, from another place for every piece: drawing all of them would take longer than writing them.
    drawn = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    places = random.Random(0)

    def rows(name: str) -> Iterable[torch.Tensor]:
        size = tensors[name].shape
        for start in range(0, size[0], 1024):
            part = (min(1024, size[0] - start), *size[1:])
            place = places.randrange(len(drawn) - math.prod(part))
            piece = drawn[place : place + math.prod(part)].view(part)
            yield piece if len(size) > 1 else 1 + 5 * piece

    write_tensors(folder / "model.safetensors", held_shapes(tensors), rows, {"format": "pt"})
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main()
