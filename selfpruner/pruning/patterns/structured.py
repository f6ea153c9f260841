"""Structured pruning: whole FFN channels, query heads and KV groups are cut out, and the rest runs with narrower matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from selfpruner import compensation, criteria
from selfpruner.architectures.cost import attention_cost, decoder_parameters, ffn_cost, model_parameters
from selfpruner.calibration.gradients import Gradients
from selfpruner.calibration.statistics import OUTPUTS, BlockStatistics, Site
from selfpruner.compensation import Compensation
from selfpruner.criteria import UnitCriterion
from selfpruner.errors import CancelledTaskError
from selfpruner.files.cache_folder import use
from selfpruner.models.memory import release
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import Block, Option, Plan, attention_shapes, default_ffn_step, ffn_widths
from selfpruner.pruning import outlook
from selfpruner.pruning.measurements import Measurements, where_to_order
from selfpruner.pruning.patterns.base import Pattern, Prunable
from selfpruner.pruning.patterns.stored import factor_files, read_factors, write_factors
from selfpruner.pruning.patterns.units import attention_block, ffn_block, measure_attention, measure_ffn
from selfpruner.pruning.signals import gather, layer_facts, layer_signals
from selfpruner.stages import at


class Structured(Pattern):
    """Levels of an FFN are widths, those of attention (KV groups, query heads per group)."""

    name: ClassVar[str] = "structured"
    sites: ClassVar[Sequence[Site]] = OUTPUTS

    def expected(self, layer: int, block: int) -> Sequence[Option]:  # noqa: ARG002
        if block:
            return [Option(ffn_cost(self.arch, width), channels=width) for width in self._widths()]
        sizes = {attention_cost(self.arch, *shape) for shape in self._shapes()}
        return [Option(size) for size in sorted(sizes, reverse=True)]

    def whole(self, blocks: Sequence[Block]) -> int:  # noqa: ARG002
        return decoder_parameters(self.arch) if self.config.of == "decoder" else model_parameters(self.arch)

    def step(self, blocks: Sequence[Block]) -> int:  # noqa: ARG002
        channels = self.config.ffn_step or default_ffn_step(self.arch.channels, self.config.tensor_parallel)
        return ffn_cost(self.arch, 2 * channels) - ffn_cost(self.arch, channels)

    def blocks(self, measured: Measurements, plan: Plan | None) -> tuple[list[Prunable], Signals]:  # noqa: ARG002
        """All levels come from orders and repairs that are made once and then read from the cache; the model's channels are put in
        the criterion's order."""
        arch, repair, files = self.arch, self._repair, self._files(measured)
        if unmade := self.unmade(measured):
            self.announce(measured)
            gradients = measured.gradients(self.criterion)
            statistics = measured.statistics(OUTPUTS)
            for layer in range(arch.layers):
                found = next(statistics)  # of one layer at a time: no loop's variable holds the last one's while the next are made
                if layer in unmade:
                    self.make(measured, layer, found, gradients(layer))
                del found
                release()
                measured.progress(f"units of layer {layer + 1}/{arch.layers} ordered by {self.criterion.name}")
        shapes, widths = self._shapes(), self._widths()
        blocks: list[Prunable] = []
        signals = []
        for layer, file in enumerate(files):
            measured.progress(f"reading factors of layer {layer + 1}/{arch.layers}")
            with at("factors"):
                attention, ffn, facts = read_factors(file, repair, arch.device)
                one = attention_block(arch, layer, attention, shapes, adds_bias=repair.adds_bias)
                other = ffn_block(arch, layer, ffn, widths, adds_bias=repair.adds_bias)
            signals.append(layer_signals(facts, (one.options, other.options)))
            blocks += [one, other]
        release()
        return blocks, gather(signals)

    @cached_property
    def criterion(self) -> UnitCriterion:
        criterion = criteria.create(self.config.criterion, self.name)
        assert isinstance(criterion, UnitCriterion)
        return criterion

    @cached_property
    def _repair(self) -> Compensation:
        return compensation.create(self.config.compensation)

    def _files(self, measured: Measurements) -> list[Path]:
        return factor_files(self.arch, measured.cache / "factors", measured.fingerprint, self.criterion, self._repair)

    def unmade(self, measured: Measurements) -> list[int]:
        files = self._files(measured)
        use(files[0].parent, measured.loaded.source.name, f"{self.criterion.name}, {self._repair.name} on {measured.sources}")
        return [layer for layer, file in enumerate(files) if not file.exists()]

    def make(
        self, measured: Measurements, layer: int, found: Mapping[Site, BlockStatistics], gradients: Mapping[str, Gradients] | None
    ) -> None:
        if measured.cancelled():
            raise CancelledTaskError("Cancelled while ordering units.")
        release()
        arch, criterion, repair = self.arch, self.criterion, self._repair
        pair = (found["attention"], found["ffn"])
        with at("ordering"):
            factors = (
                measure_attention(arch, layer, pair[0], criterion, repair, gradients),
                measure_ffn(arch, layer, pair[1], criterion, repair, gradients),
            )
        with at("factors"):
            write_factors(self._files(measured)[layer], *factors, layer_facts(arch, layer, pair))

    def announce(self, measured: Measurements) -> None:
        searched, refits = "second_order" in self.criterion.needs, self._repair.refits
        device = where_to_order(self.arch, measured.loaded)
        measured.announce(
            self.criterion,
            OUTPUTS,
            outlook.factor_bytes(self.arch, refitted=refits),
            lambda: outlook.probe_order(self.arch, device, searched=searched, refitted=refits),
        )

    def _shapes(self) -> list[tuple[int, int]]:
        config, arch = self.config, self.arch
        return attention_shapes(
            arch.kv_groups, arch.heads_per_group, config.attention, drop=config.drop_blocks, ranks=config.tensor_parallel
        )

    def _widths(self) -> list[int]:
        config = self.config
        return ffn_widths(self.arch.channels, config.ffn_step, drop=config.drop_blocks, ranks=config.tensor_parallel)
