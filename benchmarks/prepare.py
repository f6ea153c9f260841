"""What `selfpruner prune` of a model takes, stage by stage: loading, statistics, ordering, the checkpoint and its proof.

    python -m benchmarks.prepare --folder /data/qwen-0.5b --text wiki.txt
    python -m benchmarks.prepare --folder /data/qwen-0.5b-4 --text wiki.txt --layers 4

A model of random bfloat16 weights in the shape of Qwen2.5-0.5B is written to ``--folder`` first, if none is there. `busy` is CPU
time over wall-clock time: 2.0 on two cores that never wait. Peaks are resident MiB, libraries (`libraries`) and the model
(`model`) included; nothing is taken from a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from selfpruner.api import config_of
from selfpruner.jobs.card import card
from selfpruner.jobs.run import session_of
from selfpruner.models.memory import ENVIRONMENT, fresh_peak_mib
from selfpruner.stages import Stages, collecting
from selfpruner.workers.tasks import ExportRequest, PrepareRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random model is, or is written to")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rate", type=float, default=0.25)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # before torch is imported, as on the command line
    if not (options.folder / "tokenizer_config.json").is_file():
        write_random(options.folder, options.layers)
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as scratch:
        found = measure(options, Path(scratch))
    print(json.dumps(found, indent=2))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    from selfpruner.jobs.handler import SessionHandler

    text = {"sources": [{"source": str(options.text)}], "sequences": options.sequences, "length": 512}
    config = config_of(
        {"model": str(options.folder), "rate": options.rate, "preset": "evolution", "calibration": text, "device": "cpu"}
    )
    fresh_peak_mib()  # of writing the model
    libraries, handler, session = fresh_peak_mib(), SessionHandler("cpu"), session_of(config, scratch / "cache")
    stages, wall, cpu = Stages(peak=fresh_peak_mib), time.perf_counter(), _cpu()
    with collecting(stages):
        prepared = handler.handle(session, PrepareRequest(texts=("calibration",)), print, lambda: False)
        plan = prepared.space.project([options.rate] * prepared.space.layers)
        told = card(config, prepared, prepared.space, plan, job_id=None)
        request = ExportRequest(plan=plan.levels, directory=str(scratch / "pruned"), card=told)
        handler.handle(session, request, print, lambda: False)
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    return {
        "load": [round(load, 1) for load in os.getloadavg()],
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "busy": round(cpu / wall, 2),
        "libraries": round(libraries),
        "model": round(sum(file.stat().st_size for file in options.folder.glob("*.safetensors")) / 2**20),
        "stages": {row.name: {"seconds": round(row.seconds, 1), "peak_mib": round(row.peak_mib)} for row in stages.rows()},
    }


def _cpu() -> float:
    """Of this process and of those that it waited for, which prove the checkpoint."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def write_random(folder: Path, layers: int) -> None:
    import torch
    from transformers import Qwen2Config
    from transformers.models.auto import AutoModelForCausalLM

    from selfpruner.testing.tiny_models import tiny_tokenizer

    config = Qwen2Config(
        hidden_size=896,
        num_hidden_layers=layers,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main()
