"""What the patterns that make weights zero share: shapes stay, and every level of a block is made once and kept in a database."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from selfpruner import compensation, criteria
from selfpruner.architectures.order import restore_channels
from selfpruner.calibration.gradients import Gradients
from selfpruner.calibration.statistics import SITES, BlockStatistics, Site
from selfpruner.compensation import Compensation
from selfpruner.criteria import WeightCriterion
from selfpruner.criteria.masks import Sparsity
from selfpruner.errors import CancelledTaskError, ConfigError
from selfpruner.files.cache_folder import discard, use
from selfpruner.files.tensors import TensorFile
from selfpruner.models.memory import release
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import Block, Option, Plan
from selfpruner.pruning.measurements import Measurements
from selfpruner.pruning.patterns import masked
from selfpruner.pruning.patterns.base import Pattern, Prunable
from selfpruner.pruning.patterns.masked import PrunableMasked
from selfpruner.pruning.signals import LayerSignals, gather, weight_facts
from selfpruner.stages import at


class ZeroingPattern(Pattern):
    """Levels say how thin all matrices of a block are."""

    sites: ClassVar[Sequence[Site]] = SITES

    @abstractmethod
    def levels(self) -> list[Sparsity]:
        """Dense first; the last one, where nothing stays, only with ``drop_blocks``."""

    def expected(self, layer: int, block: int) -> Sequence[Option]:
        options = masked.block_options(self.arch, layer, block, self.levels())
        return options[:1] if not block and self.config.attention == "none" else options

    def whole(self, blocks: Sequence[Block]) -> int:
        """Of the matrices that are pruned, as sparsity is customarily said: 2:4 everywhere is a rate of a half."""
        return sum(block.options[0].parameters for block in blocks)

    def step(self, blocks: Sequence[Block]) -> int:
        sizes = [option.parameters for option in blocks[1].options]
        return max(before - after for before, after in pairwise(sizes))

    def blocks(self, measured: Measurements, plan: Plan | None) -> tuple[list[Prunable], Signals]:
        """From a level database that is made where there is none; with a ``plan`` one of this plan's levels, unless there is one of
        all. See :func:`selfpruner.evaluation.session.forget_plan`."""
        arch, levels, files = self.arch, self.levels(), self._files(measured)
        criterion = self.criterion
        missing = self.unmade(measured)
        if missing and plan is not None:
            if len(missing) == len(files):
                discard(files[0].parent)
            files = self._files(measured, plan)
            use(files[0].parent, measured.loaded.source.name, f"one plan, {self._what(measured)}")
            missing = _without_facts(files)
        elif not missing:
            plan = None
        if missing:
            self.announce(measured, levels if plan is None else levels[:2])
            gradients = measured.gradients(criterion)
            for layer, found in enumerate(measured.statistics(SITES)):
                if layer in missing:
                    self._make(measured, layer, found, gradients(layer), plan)
                measured.progress(f"levels of layer {layer + 1}/{arch.layers} made by {criterion.name}")
        blocks: list[Prunable] = []
        signals = []
        restore_channels(arch)
        for layer, file in enumerate(files):
            measured.progress(f"reading levels of layer {layer + 1}/{arch.layers}")
            choices, facts = masked.read_facts(file)
            opened = TensorFile(file)
            for block in (0, 1):
                options = choices[block][:1] if not block and self.config.attention == "none" else choices[block]
                blocks.append(PrunableMasked(arch, layer, block, opened, options))
            signals.append(facts)
        release()
        return blocks, gather(signals) if plan is None else Signals()

    @cached_property
    def criterion(self) -> WeightCriterion:
        criterion = criteria.create(self.config.criterion, self.name)
        assert isinstance(criterion, WeightCriterion)
        return criterion

    @cached_property
    def _repair(self) -> Compensation:
        return compensation.create(self.config.compensation)

    def _files(self, measured: Measurements, plan: Plan | None = None) -> list[Path]:
        folder, names = measured.cache / "levels", (self.criterion.name, self._repair.name)
        return masked.level_files(self.arch, folder, measured.fingerprint, *names, self.levels(), plan)

    def unmade(self, measured: Measurements) -> list[int]:
        files = self._files(measured)
        use(files[0].parent, measured.loaded.source.name, self._what(measured))
        return _without_facts(files)

    def _what(self, measured: Measurements) -> str:
        return f"{self.criterion.name}, {self._repair.name} on {measured.sources}"

    def announce(self, measured: Measurements, made: Sequence[Sparsity] | None = None) -> None:
        """``made``: the levels, by default all."""
        made = self.levels() if made is None else made
        size, allowed = masked.database_bytes(self.arch, made, repaired=self._repair.refits), self.config.level_bytes
        place = self._files(measured)[0].parent
        measured.progress(f"the level database of {len(made) - 1} levels will take {size / 2**20:,.0f} MiB in {place}")
        if allowed is not None and size > allowed:
            raise ConfigError(
                f"The level database would take {size:,} bytes, and level_bytes allows {allowed:,}. Take a larger sparsity_step, "
                "compensation none, or allow more.",
                param="level_bytes",
            )
        measured.announce(self.criterion, SITES, size, None)

    def make(
        self, measured: Measurements, layer: int, found: Mapping[Site, BlockStatistics], gradients: Mapping[str, Gradients] | None
    ) -> None:
        self._make(measured, layer, found, gradients, None)

    def _make(
        self,
        measured: Measurements,
        layer: int,
        found: Mapping[Site, BlockStatistics],
        gradients: Mapping[str, Gradients] | None,
        plan: Plan | None,
    ) -> None:
        if measured.cancelled():
            raise CancelledTaskError("Cancelled while making levels.")
        release()
        levels = self.levels()
        matrices = masked.LayerMatrices(self.arch, layer, found, gradients)
        # What is known of the weights serves a search.
        facts = weight_facts(matrices, levels) if plan is None else LayerSignals()
        only = None if plan is None else (plan.levels[2 * layer], plan.levels[2 * layer + 1])
        file, repair = self._files(measured, plan)[layer], self._repair.refits
        with at("factors"):
            masked.write_levels(file, matrices, self.criterion, levels, self.arch.dtype, facts, repair=repair, only=only)
        del matrices
        release()


def _without_facts(files: Sequence[Path]) -> list[int]:
    return [layer for layer, file in enumerate(files) if not masked.facts_file(file).exists()]
