"""What is measured of a model on the calibration text, what that takes, and where there is room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selfpruner.architectures import Architecture
from selfpruner.calibration.cache import (
    cached_gradients,
    cached_statistics,
    collect_part,
    missing_gradients,
    missing_sites,
    part_place,
    statistics_of,
    statistics_place,
)
from selfpruner.calibration.gradients import Gradients
from selfpruner.calibration.statistics import BlockStatistics, Site
from selfpruner.criteria import Criterion
from selfpruner.errors import ConfigError
from selfpruner.files.cache_folder import discard, make_room, use
from selfpruner.models import LoadedModel
from selfpruner.progress import Cancelled, OnProgress
from selfpruner.pruning import outlook
from selfpruner.stages import at


@dataclass(frozen=True, slots=True)
class Measurements:
    """What can be measured of a model on the calibration text, kept in ``cache`` and shared by all criteria. ``fingerprint``
    identifies both, ``sources`` name the text."""

    arch: Architecture
    loaded: LoadedModel
    tokens: Tensor
    cache: Path
    fingerprint: str
    sources: str
    progress: OnProgress
    cancelled: Cancelled

    @property
    def folder(self) -> Path:
        return self.cache / "statistics"

    @at("statistics")
    def announce(self, criterion: Criterion, sites: Sequence[Site], disk: int, more: Callable[[], float] | None) -> None:
        """Say what measuring for ``criterion`` will take, and see that there is room for it; ``disk`` bytes and ``more`` seconds,
        where they are known, come on top for what is made of the statistics."""
        missing = missing_sites(self.arch, self.folder, self.fingerprint, sites)
        gradients = "gradients" in criterion.needs and missing_gradients(self.arch, self.folder, self.fingerprint)
        disk += outlook.statistics_bytes(self.arch, missing, len(self.tokens)) + gradients * outlook.gradient_bytes(self.arch)
        make_room(self.cache, disk, self.progress)
        seconds = outlook.probe_statistics(self.arch, self.tokens, missing, self.loaded.memory) if missing else 0.0
        unknown = [*(["gradients"] if gradients else []), *(["levels"] if more is None else [])]
        found = outlook.Outlook(seconds + (more() if more else 0.0), tuple(unknown), _ordering_bytes(self.arch, self.loaded), disk)
        self.progress(found.told(self.cache))

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
            on=where_to_order(self.arch, self.loaded),
            progress=self.progress,
            cancelled=self.cancelled,
        )

    def collect_part(self, sites: Sequence[Site], part: int, parts: int) -> int:
        """The statistics of one of ``parts`` of the text, for the cache; how many tokens that were."""
        self._use()
        return collect_part(
            self.arch,
            self.tokens,
            self.folder,
            self.fingerprint,
            part,
            parts,
            sites,
            memory=self.loaded.memory,
            progress=self.progress,
            cancelled=self.cancelled,
        )

    def statistics_of(self, layer: int, sites: Sequence[Site], parts: int) -> dict[Site, BlockStatistics]:
        """One layer's, that were collected before, in ``parts`` or (0) as a whole."""
        self._use()
        on = where_to_order(self.arch, self.loaded)
        return statistics_of(self.arch, self.folder, self.fingerprint, layer, sites, parts=parts, on=on)

    def drop_parts(self, parts: int) -> None:
        """Remove what :meth:`collect_part` left."""
        for part in range(parts):
            discard(part_place(self.arch, self.folder, self.fingerprint, part, parts))

    def missing(self, sites: Sequence[Site]) -> bool:
        """Whether statistics would have to be collected."""
        return bool(missing_sites(self.arch, self.folder, self.fingerprint, sites))

    def gradients(self, criterion: Criterion) -> Callable[[int], dict[str, Gradients] | None]:
        """What gives a layer's gradients by matrix name; None where ``criterion`` needs none."""
        if "gradients" not in criterion.needs:
            return lambda _: None
        self._use()
        with at("statistics"):
            return cached_gradients(
                self.arch,
                self.tokens,
                self.folder,
                self.fingerprint,
                memory=self.loaded.memory,
                on=where_to_order(self.arch, self.loaded),
                progress=self.progress,
                cancelled=self.cancelled,
            )


def where_to_order(arch: Architecture, loaded: LoadedModel) -> torch.device:
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
    """Bytes always in memory: the whole model, or the buffers of a streamed one and its part of the vocabulary."""
    if arch.stream is None:
        return sum(p.numel() for p in loaded.model.parameters()) * loaded.dtype.itemsize
    head = arch.piece_width * arch.hidden * loaded.dtype.itemsize
    return 2 * (arch.stream.layer_bytes + arch.stream.files.piece_bytes) + head
