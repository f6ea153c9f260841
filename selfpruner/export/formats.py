"""The export formats by name. What a format does, and what is done around it, is said in :mod:`selfpruner.export.base`."""

from __future__ import annotations

from selfpruner import names
from selfpruner.export.base import Format

# One line per format: its class, imported above. `gguf` goes here as `selfpruner.export.gguf.Gguf`.
FORMATS: dict[str, type[Format]] = {cls.name: cls for cls in ()}


def create(name: str) -> Format:
    """The format of that name. Raises UnknownNameError."""
    names.check("export format", name, names.FORMATS, param="format")
    return FORMATS[name]()
