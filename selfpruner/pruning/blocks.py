"""Every block of a model at every level: statistics, gradients, orders and repairs, made once and then read from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfpruner import compensation, criteria
from selfpruner.architectures import Architecture
from selfpruner.architectures.order import restore_channels
from selfpruner.calibration.cache import (
    cached_gradients,
    cached_statistics,
    missing_gradients,
    missing_sites,
    statistics_place,
)
from selfpruner.calibration.gradients import Gradients
from selfpruner.calibration.statistics import OUTPUTS, SITES, BlockStatistics, Site
from selfpruner.calibration.texts import TokenBatches
from selfpruner.config import SearchConfig
from selfpruner.criteria import Criterion, UnitCriterion, WeightCriterion
from selfpruner.errors import CancelledTaskError, ConfigError
from selfpruner.files.cache_folder import discard, make_room, use
from selfpruner.files.tensors import TensorFile
from selfpruner.models import LoadedModel
from selfpruner.models.memory import release
from selfpruner.planning.space import Plan
from selfpruner.progress import Cancelled, OnProgress
from selfpruner.pruning import outlook
from selfpruner.pruning.patterns import (
    Prunable,
    PrunableMasked,
    attention_block,
    ffn_block,
    masked,
    measure_attention,
    measure_ffn,
)
from selfpruner.pruning.patterns.stored import factor_files, read_factors, write_factors
from selfpruner.pruning.search_space import attention_choices, ffn_choices, sparsity_levels
from selfpruner.pruning.signals import gather, layer_facts, layer_signals, weight_facts


def prepare_blocks(
    config: SearchConfig,
    arch: Architecture,
    loaded: LoadedModel,
    calibration: TokenBatches,
    cache: Path,
    progress: OnProgress,
    cancelled: Cancelled,
    plan: Plan | None = None,
) -> tuple[list[Prunable], dict[str, Any]]:
    """Every block at every level, in plan order, for the config's criterion and compensation; and the model's signals.

    Orders and repairs are made once and then read from ``cache``; the model's channels are put in the criterion's order.
    """
    criterion, repair = criteria.create(config.criterion, config.pattern), compensation.create(config.compensation)
    fingerprint = f"{loaded.source.fingerprint}:{calibration.fingerprint}"
    sources = ", ".join(share.source for share in calibration.sources)
    text = _Calibration(arch, loaded, calibration.tokens, cache / "statistics", fingerprint, sources, progress, cancelled)
    if config.pattern != "structured":
        assert isinstance(criterion, WeightCriterion)
        return _masked_blocks(config, text, criterion, cache / "levels", plan)
    assert isinstance(criterion, UnitCriterion)
    files = factor_files(arch, cache / "factors", fingerprint, criterion, repair)
    use(files[0].parent, loaded.source.name, f"{config.criterion}, {config.compensation} on {sources}")
    if not all(file.exists() for file in files):
        refitted = config.compensation.startswith("least_squares")
        text.announce(
            criterion,
            OUTPUTS,
            outlook.factor_bytes(arch, refitted=refitted),
            lambda: outlook.probe_order(
                arch, _where_to_order(arch, loaded), searched="second_order" in criterion.needs, refitted=refitted
            ),
        )
        gradients = text.gradients(criterion)
        for layer, found in enumerate(text.statistics(OUTPUTS)):
            if cancelled():
                raise CancelledTaskError("Cancelled while ordering units.")
            release()
            if not files[layer].exists():
                pair, own = (found["attention"], found["ffn"]), gradients(layer)
                factors = (
                    measure_attention(arch, layer, pair[0], criterion, repair, own),
                    measure_ffn(arch, layer, pair[1], criterion, repair, own),
                )
                write_factors(files[layer], *factors, layer_facts(arch, layer, pair))
                del factors, pair, own
                release()
            progress(f"units of layer {layer + 1}/{arch.layers} ordered by {config.criterion}")
    shapes, widths = attention_choices(config, arch), ffn_choices(config, arch)
    blocks: list[Prunable] = []
    measured = []
    for layer, file in enumerate(files):
        progress(f"reading factors of layer {layer + 1}/{arch.layers}")
        attention, ffn, facts = read_factors(file, repair, arch.device)
        one = attention_block(arch, layer, attention, shapes, adds_bias=repair.adds_bias)
        other = ffn_block(arch, layer, ffn, widths, adds_bias=repair.adds_bias)
        measured.append(layer_signals(facts, (one.options, other.options)))
        blocks += [one, other]
    release()
    return blocks, gather(measured)


@dataclass(frozen=True, slots=True)
class _Calibration:
    """What can be measured on the calibration text, kept under ``folder`` and shared by all criteria."""

    arch: Architecture
    loaded: LoadedModel
    tokens: Tensor
    folder: Path
    fingerprint: str
    sources: str
    progress: OnProgress
    cancelled: Cancelled

    def announce(self, criterion: Criterion, sites: Sequence[Site], disk: int, more: Callable[[], float] | None) -> None:
        """Say what measuring for ``criterion`` will take, and see that there is room for it; ``disk`` bytes and ``more`` seconds,
        where they are known, come on top for what is made of the statistics."""
        missing = missing_sites(self.arch, self.folder, self.fingerprint, sites)
        gradients = "gradients" in criterion.needs and missing_gradients(self.arch, self.folder, self.fingerprint)
        disk += outlook.statistics_bytes(self.arch, missing, len(self.tokens)) + gradients * outlook.gradient_bytes(self.arch)
        cache = self.folder.parent
        make_room(cache, disk, self.progress)
        seconds = outlook.probe_statistics(self.arch, self.tokens, missing, self.loaded.memory) if missing else 0.0
        unknown = [*(["gradients"] if gradients else []), *(["levels"] if more is None else [])]
        found = outlook.Outlook(seconds + (more() if more else 0.0), tuple(unknown), _ordering_bytes(self.arch, self.loaded), disk)
        self.progress(found.told(cache))

    def _use(self) -> None:
        use(statistics_place(self.arch, self.folder, self.fingerprint), self.loaded.source.name, f"on {self.sources}")

    def statistics(self, sites: Sequence[Site]) -> Iterator[dict[Site, BlockStatistics]]:
        """Layer by layer."""
        self._use()
        return cached_statistics(
            self.arch,
            self.tokens,
            self.folder,
            self.fingerprint,
            sites,
            memory=self.loaded.memory,
            on=_where_to_order(self.arch, self.loaded),
            progress=self.progress,
            cancelled=self.cancelled,
        )

    def gradients(self, criterion: Criterion) -> Callable[[int], dict[str, Gradients] | None]:
        """What gives a layer's gradients by matrix name; None where ``criterion`` needs none."""
        if "gradients" not in criterion.needs:
            return lambda _: None
        self._use()
        return cached_gradients(
            self.arch,
            self.tokens,
            self.folder,
            self.fingerprint,
            memory=self.loaded.memory,
            on=_where_to_order(self.arch, self.loaded),
            progress=self.progress,
            cancelled=self.cancelled,
        )


def _masked_blocks(
    config: SearchConfig, text: _Calibration, criterion: WeightCriterion, folder: Path, plan: Plan | None
) -> tuple[list[Prunable], dict[str, Any]]:
    """The blocks of a pattern that makes weights zero, from a level database that is made where there is none; with a ``plan``
    one of this plan's levels, unless there is one of all. See :func:`forget_plan`."""
    arch, levels, repair = text.arch, sparsity_levels(config), config.compensation == "least_squares"
    files = masked.level_files(arch, folder, text.fingerprint, criterion.name, config.compensation, levels)
    what = f"{criterion.name}, {config.compensation} on {text.sources}"
    use(files[0].parent, text.loaded.source.name, what)
    missing = [file for file in files if not masked.facts_file(file).exists()]
    if missing and plan is not None:
        if len(missing) == len(files):
            discard(files[0].parent)
        files = masked.level_files(arch, folder, text.fingerprint, criterion.name, config.compensation, levels, plan)
        use(files[0].parent, text.loaded.source.name, f"one plan, {what}")
        missing = [file for file in files if not masked.facts_file(file).exists()]
    elif not missing:
        plan = None
    if missing:
        made = levels if plan is None else levels[:2]
        size = masked.database_bytes(arch, made, repaired=repair)
        text.progress(f"the level database of {len(made) - 1} levels will take {size / 2**20:,.0f} MiB in {files[0].parent}")
        if config.level_bytes is not None and size > config.level_bytes:
            raise ConfigError(
                f"The level database would take {size:,} bytes, and level_bytes allows {config.level_bytes:,}. Take a larger "
                "sparsity_step, compensation none, or allow more.",
                param="level_bytes",
            )
        text.announce(criterion, SITES, size, None)
        gradients = text.gradients(criterion)
        for layer, found in enumerate(text.statistics(SITES)):
            if text.cancelled():
                raise CancelledTaskError("Cancelled while making levels.")
            release()
            if files[layer] in missing:
                matrices = masked.LayerMatrices(arch, layer, found, gradients(layer))
                # What is known of the weights serves a search.
                facts = weight_facts(matrices, levels) if plan is None else {}
                only = None if plan is None else (plan.levels[2 * layer], plan.levels[2 * layer + 1])
                masked.write_levels(files[layer], matrices, criterion, levels, arch.dtype, facts, repair=repair, only=only)
                del matrices
                release()
            text.progress(f"levels of layer {layer + 1}/{arch.layers} made by {config.criterion}")
    blocks: list[Prunable] = []
    measured = []
    restore_channels(arch)
    for layer, file in enumerate(files):
        text.progress(f"reading levels of layer {layer + 1}/{arch.layers}")
        choices, facts = masked.read_facts(file)
        opened = TensorFile(file)
        for block in (0, 1):
            options = choices[block][:1] if not block and config.attention == "none" else choices[block]
            blocks.append(PrunableMasked(arch, layer, block, opened, options))
        measured.append(facts)
    release()
    return blocks, gather(measured) if plan is None else {}


def _where_to_order(arch: Architecture, loaded: LoadedModel) -> torch.device:
    """Where the covariances of a layer are factored: on the model's device, or on the CPU when a GPU's share is too small. Raises
    ConfigError when it is the CPU's memory that is bounded."""
    needed = _ordering_bytes(arch, loaded)
    if loaded.memory is None or needed <= loaded.memory:
        return arch.device
    if arch.device.type == "cpu":
        raise ConfigError(
            f"Ordering the units of {loaded.source.name} takes {-(-needed >> 20)} MiB, and memory allows {loaded.memory >> 20}. "
            f"Set it to {-(-needed >> 20)}MiB or more; once the order is in the cache, less will do.",
            param="memory",
        )
    return torch.device("cpu")


def _ordering_bytes(arch: Architecture, loaded: LoadedModel) -> int:
    width = max(arch.channels, arch.heads * arch.head_dim)
    # Four matrices of the inputs' size and some of the weights', float64, at the fullest moment: 30 % more than was measured.
    return 32 * width**2 + 32 * width * arch.hidden + held_bytes(arch, loaded) + (8 << 20)


def held_bytes(arch: Architecture, loaded: LoadedModel) -> int:
    """What is always in memory: the whole model, or the buffers of a streamed one with what it keeps of the vocabulary."""
    if arch.stream is None:
        return sum(p.numel() for p in loaded.model.parameters()) * loaded.dtype.itemsize
    head = arch.piece_width * arch.hidden * loaded.dtype.itemsize
    return 2 * (arch.stream.layer_bytes + arch.stream.files.piece_bytes) + head
