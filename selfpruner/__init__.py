"""Give it a language model and a target; get back the best checkpoint that pruning without retraining can give.

    import selfpruner
    result = selfpruner.search(0.2, "runs/mine", model="smollm2-135m")
    model = selfpruner.load("runs/mine/checkpoint")

Names are imported when they are first used. The API process imports this package too and must stay without torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfpruner.api import benchmark, evaluate, export, prune, quality, search
    from selfpruner.config import SearchConfig
    from selfpruner.export.checkpoint import load
    from selfpruner.export.formats import verify

__all__ = ["SearchConfig", "benchmark", "evaluate", "export", "load", "prune", "quality", "search", "verify"]

_HOMES = {
    **dict.fromkeys(("benchmark", "evaluate", "export", "prune", "quality", "search"), "selfpruner.api"),
    "SearchConfig": "selfpruner.config",
    "load": "selfpruner.export.checkpoint",
    "verify": "selfpruner.export.formats",
}


class _Package(ModuleType):
    """A package whose public names no submodule of the same name replaces.

    Python sets a submodule as an attribute of its package when it is first imported. ``selfpruner.export`` is the function all the
    same; import from the folder ``export/`` with ``from selfpruner.export.checkpoint import load``.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
