"""The device that the suites run on: ``SELFPRUNER_TEST_DEVICE=cuda:0 pytest``; the CPU unless it is set.

What a test makes is made there, whatever it is made with: ``torch.arange(8)`` in a test names no device. What the tested code makes
is where that code puts it, so a device it forgot is found.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DEVICE = torch.device(os.environ.get("SELFPRUNER_TEST_DEVICE", "cpu"))

_MAKERS = frozenset(
    getattr(torch, name)
    for name in (
        *("arange", "empty", "eye", "full", "linspace", "logspace", "ones"),
        *("rand", "randint", "randn", "randperm", "tensor", "zeros"),
    )
)


@contextmanager
def tensors_of_tests() -> Iterator[None]:
    """What tests make in this block is on the device."""
    if DEVICE.type == "cpu":
        yield
    else:
        with _MadeByTests():
            yield


class _MadeByTests(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _MAKERS and "device" not in (kwargs or {}) and _is_test(sys._getframe(1).f_globals["__name__"]):
            return made.to(DEVICE)  # drawn on the CPU, so the numbers are the same everywhere
        return made


def _is_test(module: str) -> bool:
    first, *rest = module.split(".")
    return first not in ("torch", "transformers") and any(part.startswith("test") for part in (first, *rest))
