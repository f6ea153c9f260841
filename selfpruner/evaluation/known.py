"""What the dense model's residual streams came to on sequences that plans will be scored on again."""

from __future__ import annotations

import torch
from torch import Tensor


class KnownFinals:
    """Final residual streams of the dense model by the sequence they belong to, as many as ``max_bytes`` hold, in main memory.

    The order of a model's channels changes them by rounding only, so engines of other criteria may share them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._finals: dict[bytes, Tensor] = {}

    def find(self, tokens: Tensor) -> Tensor | None:
        """The streams (B, S, d) of ``tokens`` (B, S) where all are known, on the device of these."""
        found = [self._finals.get(key) for key in _keys(tokens)]
        known = [final for final in found if final is not None]
        return torch.stack(known).to(tokens.device) if len(known) == len(found) else None

    def keep(self, tokens: Tensor, finals: Tensor) -> None:
        for key, final in zip(_keys(tokens), finals, strict=True):
            if key not in self._finals and final.nbytes <= self._room:
                self._room -= final.nbytes
                self._finals[key] = final.to("cpu", copy=True)


def _keys(tokens: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in tokens.cpu()]
