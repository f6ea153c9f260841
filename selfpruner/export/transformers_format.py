"""The format ``transformers``: a checkpoint as it is. Converting to it is copying, and proving the copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from selfpruner.export import modeling_selfpruner
from selfpruner.export.base import Checkpoint, Format
from selfpruner.export.card import loading
from selfpruner.export.checkpoint import AUTO_MAP, verifier


class Transformers(Format):
    name: ClassVar[str] = "transformers"

    def check(self, checkpoint: Checkpoint, quantize: str | None) -> None:
        """Nothing is refused."""

    def write(self, checkpoint: Checkpoint, folder: Path, quantize: str | None, go_on: Callable[[], None]) -> int:  # noqa: ARG002
        for name in checkpoint.manifest["files"]:
            target = folder / name
            if not target.exists():
                go_on()
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint.folder / name, target)
        return int(checkpoint.manifest["parameters"])

    def use(self, checkpoint: Checkpoint, quantize: str | None) -> str:  # noqa: ARG002
        code = checkpoint.config.get("auto_map", {}).get("AutoConfig")
        return loading(f"{code.partition('.')[0]}.py" if code else None)

    def verifier(self, folder: Path, reference: Path, device: str, memory: int | None = None) -> list[str]:
        return verifier(folder, reference, device, memory, own_code=_is_ours(folder))


def _is_ours(folder: Path) -> bool:
    """Whether what code the folder brings is this version's modeling file, byte for byte, so that running it is safe."""
    code = Path(modeling_selfpruner.__file__)
    brought = [path for path in folder.rglob("*") if path.suffix in (".py", ".so", ".pyc")]
    known = all(path == folder / code.name and path.read_bytes() == code.read_bytes() for path in brought)
    bodies = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    return known and all(body.get("auto_map", AUTO_MAP) == AUTO_MAP for body in bodies if isinstance(body, dict))
