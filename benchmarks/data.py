"""The texts of SELFPRUNER_DATA as sources of a config: plain copies with the suffixes that sources have."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

FILES = {
    "wikitext2-train": "wikitext2/wiki.train.head.raw",
    "wikitext2-test": "wikitext2/wiki.test.raw",
    "wikitext2-valid": "wikitext2/wiki.valid.raw",
    "c4": "c4/c4_en_train_first1000.jsonl",
}


def text(name: str, cache: Path) -> str:
    """The path of a text by its short name. Exits with a clear message where the data are absent."""
    root = os.environ.get("SELFPRUNER_DATA")
    if not root:
        raise SystemExit("This benchmark needs texts that do not come with the product: set SELFPRUNER_DATA to their folder.")
    source = Path(root) / FILES[name]
    target = cache / "benchmark-texts" / f"{name}{'.jsonl' if source.suffix == '.jsonl' else '.txt'}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copyfile(source, target)
    return str(target)
