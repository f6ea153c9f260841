"""The format ``transformers``: the checkpoint as it is. Converting to it means copying, and proving the copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from selfpruner.export.base import FinishedCheckpoint, Format
from selfpruner.export.card import loading
from selfpruner.export.checkpoint import verifier
from selfpruner.export.modeling_files import MODELING_FILES


class Transformers(Format):
    name: ClassVar[str] = "transformers"

    def check(self, checkpoint: FinishedCheckpoint, quantize: str | None) -> None:
        """Nothing is refused."""

    def write(self, checkpoint: FinishedCheckpoint, folder: Path, quantize: str | None, go_on: Callable[[], None]) -> int:  # noqa: ARG002
        for name in checkpoint.manifest["files"]:
            target = folder / name
            if not target.exists():
                go_on()
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint.folder / name, target)
        return int(checkpoint.manifest["parameters"])

    def use(self, checkpoint: FinishedCheckpoint, quantize: str | None) -> str:  # noqa: ARG002
        return loading(checkpoint.config)

    def verifier(self, folder: Path, reference: Path, device: str, memory: int | None = None) -> list[str]:
        return verifier(folder, reference, device, memory, own_code=_is_ours(folder))


def _is_ours(folder: Path) -> bool:
    """Whether what code the folder brings is one of this version's modeling files, byte for byte, so that running it is safe."""
    ours = {form.code.name: form for form in MODELING_FILES.values()}
    brought = [path for path in folder.rglob("*") if path.suffix in (".py", ".so", ".pyc")]
    known = all(
        path.parent == folder and path.name in ours and path.read_bytes() == ours[path.name].code.read_bytes() for path in brought
    )
    maps = [form.auto_map for form in MODELING_FILES.values()]
    bodies = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    return known and all(body["auto_map"] in maps for body in bodies if isinstance(body, dict) and "auto_map" in body)
