"""The texts of SELFPRUNER_DATA as sources of a config: plain copies with the suffixes that sources have."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from selfpruner.judging.corpora import C4_CALIBRATION

FILES = {
    "wikitext2-train": "wikitext2/wiki.train.head.raw",
    "wikitext2-test": "wikitext2/wiki.test.raw",
    "wikitext2-valid": "wikitext2/wiki.valid.raw",
    "c4": "c4/c4_en_train_first1000.jsonl",
}


def c4_calibration(cache: Path) -> str:
    """The path of a source that holds the first documents of C4 only."""
    target = cache / "benchmark-texts" / f"c4-first-{C4_CALIBRATION}.jsonl"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = original("c4").read_text("utf-8").split("\n")[:C4_CALIBRATION]
        target.write_text("\n".join(lines) + "\n", "utf-8")
    return str(target)


def original(name: str) -> Path:
    """The file of a text by its short name. Exits with a clear message where the data are absent."""
    root = os.environ.get("SELFPRUNER_DATA")
    if not root:
        raise SystemExit("This benchmark needs texts that do not come with the product: set SELFPRUNER_DATA to their folder.")
    path = Path(root) / FILES[name]
    if not path.is_file():
        raise SystemExit(f"SELFPRUNER_DATA names {root}, which has no {FILES[name]}.")
    return path


def text(name: str, cache: Path) -> str:
    """The path of a text as a source of a config: a copy of :func:`original` under ``cache``."""
    source = original(name)
    target = cache / "benchmark-texts" / f"{name}{'.jsonl' if source.suffix == '.jsonl' else '.txt'}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copyfile(source, target)
    return str(target)
