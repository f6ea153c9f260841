"""What calibration text takes: peak memory and seconds of token batches from one file, or of ``self``, in a process of its own.

    python -m benchmarks.texts --mib 60 [--packed] [--file OTHER] [--self] [--sequences 128] [--model smollm2-135m]

The file is made of the sentences of ``pydoc`` in random order, one long document without a blank line. CPU seconds are of all
threads.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import tempfile
import time
from pathlib import Path

from selfpruner.workers.lifeline import tied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=60, help="size of the file that is made")
    parser.add_argument("--packed", action="store_true", help="by gzip")
    parser.add_argument("--file", type=Path, help="instead of a file that is made")
    parser.add_argument("--self", action="store_true", help="what the model writes instead of a file")
    parser.add_argument("--sequences", type=int, default=128, help="of 512 tokens")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, str(options.file), options.sequences)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        source = "self" if options.self else str(options.file or written(Path(scratch), options.mib << 20, packed=options.packed))
        asked = ("--file", source, "--model", options.model, "--sequences", str(options.sequences))
        command = tied("-m", "benchmarks.texts", "--one", *asked)
        print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def written(folder: Path, size: int, *, packed: bool) -> Path:
    from selfpruner.calibration import pydoc

    chance, sentences = random.Random(0), [line for document in pydoc.documents() for line in document.split("\n") if line]
    file = folder / ("text.txt.gz" if packed else "text.txt")
    with gzip.open(file, "wt", compresslevel=1) if packed else file.open("w") as out:
        while size > 0:
            size -= out.write(chance.choice(sentences) + "\n")
    return file


def measure(model: str, source: str, sequences: int) -> dict[str, object]:
    from selfpruner import models
    from selfpruner.calibration.texts import token_batches
    from selfpruner.config import Source, TextConfig
    from selfpruner.models.memory import peak_mib

    with tempfile.TemporaryDirectory() as cache:
        loaded = models.load(models.resolve(model, Path(cache)), "cpu")
        before, started, worked = peak_mib(), time.perf_counter(), time.process_time()
        wanted = TextConfig(sources=(Source(source=source),), sequences=sequences, length=512)
        found = token_batches(wanted, "calibration", loaded, Path(cache), 0)
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    return {
        "bytes": 0 if source == "self" else Path(source).stat().st_size,
        "loaded_mib": round(before),
        "peak_mib": round(peak_mib()),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "fingerprint": found.fingerprint,
    }


if __name__ == "__main__":
    main()
