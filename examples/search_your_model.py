"""Search your own model for the best 20 % to remove, and load what was found.

    python examples/search_your_model.py MODEL OUTPUT [FIELDS.json]

MODEL is a Hugging Face folder, a GGUF file or a hub id. FIELDS.json holds further fields of a search, see `selfpruner fields`.
The same call again goes on where it was interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import selfpruner


def main(model: str, output: str, fields: str | None = None) -> None:
    more = json.loads(Path(fields).read_text("utf-8")) if fields else {}
    result = selfpruner.search(0.2, output, **{"model": model, "preset": "evolution", **more})
    for name in ("dense", "uniform", "best"):
        figures = result.report[name]
        print(f"{name:8} {figures['parameters']:>15,} parameters  perplexity {figures['perplexity']:.2f}")
    pruned = selfpruner.load(result.checkpoint["path"])  # checks every file against the manifest
    print(f"loaded {type(pruned).__name__} with {sum(p.numel() for p in pruned.parameters()):,} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
