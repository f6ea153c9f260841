"""Models to be judged, within a ceiling of memory: whole where they fit, else streamed from their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selfpruner import models
from selfpruner.errors import ConfigError
from selfpruner.files.places import mib
from selfpruner.models import LoadedModel, checks, saved
from selfpruner.models.family_layouts import whole_number

if TYPE_CHECKING:
    import torch

# Positions whose logits are taken to float32 at a time, and how many such copies there are.
CHUNK, COPIES = 128, 3
_FLOAT = 4


def load(name: str, cache: Path, device: torch.device, dtype: str, memory: int | None) -> LoadedModel:
    """A checkpoint of selfpruner, or a model by name, folder or hub id. A model larger than ``memory`` is streamed. ``auto`` is for
    both what is fast on the device: a checkpoint stored in float16 took seven times as long on a CPU as in bfloat16, and two
    types would differ by more than the pruning did."""
    if saved.is_pruned(Path(name)):
        from selfpruner.export import checkpoint

        stored = checks.stored_dtype(Path(name))
        return checkpoint.opened(Path(name), device, models.choose_dtype(dtype, device, stored=stored), memory)
    return models.load(models.resolve(name, cache), str(device), dtype, memory)


def share(memory: int | None, names: Sequence[str], cache: Path, tokens: int) -> int | None:
    """What each of the models in ``names`` may take of ``memory`` bytes, beside their logits of ``tokens`` tokens. Raises
    ConfigError where these alone take all of it."""
    if memory is None:
        return None
    logits = sum(_vocabulary(name, cache) * (tokens + COPIES * CHUNK) * _FLOAT for name in names)
    if logits >= memory:
        raise ConfigError(
            f"The logits of {tokens:,} tokens take {mib(logits)}, and memory is {mib(memory)}. Use shorter sequences, "
            "or more memory.",
            param="memory",
        )
    return (memory - logits) // len(names)


def _vocabulary(name: str, cache: Path) -> int:
    folder = Path(name) if saved.is_pruned(Path(name)) else models.resolve(name, cache).folder
    config = checks.read_json(folder / "config.json", "The model configuration")
    text = config.get("text_config")
    return whole_number(text if isinstance(text, dict) else config, "vocab_size")
