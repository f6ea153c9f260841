"""What the patterns that make weights zero share: shapes stay, and every level of a block is made once and kept in a database."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

from selfpruner import compensation, criteria
from selfpruner.architectures.order import restore_channels
from selfpruner.calibration.statistics import SITES
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
        config, arch, levels, folder = self.config, self.arch, self.levels(), measured.cache / "levels"
        criterion, repair = criteria.create(config.criterion, self.name), compensation.create(config.compensation)
        assert isinstance(criterion, WeightCriterion)
        files = masked.level_files(arch, folder, measured.fingerprint, criterion.name, repair.name, levels)
        what = f"{criterion.name}, {repair.name} on {measured.sources}"
        use(files[0].parent, measured.loaded.source.name, what)
        missing = [file for file in files if not masked.facts_file(file).exists()]
        if missing and plan is not None:
            if len(missing) == len(files):
                discard(files[0].parent)
            files = masked.level_files(arch, folder, measured.fingerprint, criterion.name, repair.name, levels, plan)
            use(files[0].parent, measured.loaded.source.name, f"one plan, {what}")
            missing = [file for file in files if not masked.facts_file(file).exists()]
        elif not missing:
            plan = None
        if missing:
            made = levels if plan is None else levels[:2]
            size = masked.database_bytes(arch, made, repaired=repair.refits)
            measured.progress(
                f"the level database of {len(made) - 1} levels will take {size / 2**20:,.0f} MiB in {files[0].parent}"
            )
            if config.level_bytes is not None and size > config.level_bytes:
                raise ConfigError(
                    f"The level database would take {size:,} bytes, and level_bytes allows {config.level_bytes:,}. Take a larger "
                    "sparsity_step, compensation none, or allow more.",
                    param="level_bytes",
                )
            measured.announce(criterion, SITES, size, None)
            gradients = measured.gradients(criterion)
            for layer, found in enumerate(measured.statistics(SITES)):
                if measured.cancelled():
                    raise CancelledTaskError("Cancelled while making levels.")
                release()
                if files[layer] in missing:
                    matrices = masked.LayerMatrices(arch, layer, found, gradients(layer))
                    # What is known of the weights serves a search.
                    facts = weight_facts(matrices, levels) if plan is None else LayerSignals()
                    only = None if plan is None else (plan.levels[2 * layer], plan.levels[2 * layer + 1])
                    with at("factors"):
                        masked.write_levels(
                            files[layer], matrices, criterion, levels, arch.dtype, facts, repair=repair.refits, only=only
                        )
                    del matrices
                    release()
                measured.progress(f"levels of layer {layer + 1}/{arch.layers} made by {criterion.name}")
        blocks: list[Prunable] = []
        signals = []
        restore_channels(arch)
        for layer, file in enumerate(files):
            measured.progress(f"reading levels of layer {layer + 1}/{arch.layers}")
            choices, facts = masked.read_facts(file)
            opened = TensorFile(file)
            for block in (0, 1):
                options = choices[block][:1] if not block and config.attention == "none" else choices[block]
                blocks.append(PrunableMasked(arch, layer, block, opened, options))
            signals.append(facts)
        release()
        return blocks, gather(signals) if plan is None else Signals()
