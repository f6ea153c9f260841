"""The contract of a pattern: the shape of what is removed. To the engine every block is a :class:`Prunable`.

A pattern is made from a config and a model. It knows its levels before anything is measured, and makes the blocks of every layer at
each of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from selfpruner.architectures import Architecture
from selfpruner.calibration.gradients import Gradients
from selfpruner.calibration.statistics import BlockStatistics, Site
from selfpruner.config import SearchConfig
from selfpruner.criteria import Criterion
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import Block, Option, Plan
from selfpruner.pruning.measurements import Measurements
from selfpruner.pruning.patterns.masked import PrunableMasked
from selfpruner.pruning.patterns.units import PrunableAttention, PrunableFfn

Prunable = PrunableAttention | PrunableFfn | PrunableMasked


class Pattern(ABC):
    """What those who ask for a pattern need to know of it without torch is its line in ``catalogue.PATTERNS``."""

    name: ClassVar[str]
    sites: ClassVar[Sequence[Site]]
    """Where it needs statistics."""

    def __init__(self, config: SearchConfig, arch: Architecture) -> None:
        self.config = config
        self.arch = arch

    @abstractmethod
    def expected(self, layer: int, block: int) -> Sequence[Option]:
        """A block's levels, dense first, with what each should keep and without errors; ``block`` is 0 for attention, 1 for the
        FFN. Nothing is measured."""

    @abstractmethod
    def whole(self, blocks: Sequence[Block]) -> int:
        """The parameters that the rate is a share of."""

    @abstractmethod
    def step(self, blocks: Sequence[Block]) -> int:
        """The parameters of the smallest step, within which a plan meets its budget."""

    @property
    @abstractmethod
    def criterion(self) -> Criterion: ...

    @abstractmethod
    def unmade(self, measured: Measurements) -> list[int]:
        """The layers of which nothing is in the cache yet."""

    @abstractmethod
    def announce(self, measured: Measurements) -> None:
        """Say what making all of it will take, and see that there is room for it."""

    @abstractmethod
    def make(
        self, measured: Measurements, layer: int, found: Mapping[Site, BlockStatistics], gradients: Mapping[str, Gradients] | None
    ) -> None:
        """Make what levels of ``layer`` are cut from, in the cache, from its statistics at ``sites``."""

    @abstractmethod
    def blocks(self, measured: Measurements, plan: Plan | None) -> tuple[list[Prunable], Signals]:
        """Every block at every level, in plan order, and the model's signals. With a ``plan`` only its levels need be made."""
