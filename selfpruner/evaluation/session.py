"""A model made ready for one job: texts, blocks at every level, search space and engine.

All of it is a function of model, config and seed, and the slow parts are cached on disk. So a worker that replaces another one
reaches the same state.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from selfpruner.architectures import Architecture, describe
from selfpruner.architectures.order import restore_channels
from selfpruner.calibration.soundness import finite, not_numbers
from selfpruner.calibration.texts import TokenBatches, token_batches
from selfpruner.config import Role, SearchConfig, TextConfig
from selfpruner.evaluation.engine import Engine
from selfpruner.evaluation.known import KnownFinals
from selfpruner.files.cache_folder import discard, use
from selfpruner.models import LoadedModel
from selfpruner.models.memory import release
from selfpruner.planning.signals import Signals
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.progress import Cancelled, OnProgress
from selfpruner.pruning.blocks import prepare_blocks
from selfpruner.pruning.measurements import held_bytes
from selfpruner.pruning.patterns import (
    Prunable,
    PrunableMasked,
    masked,
)
from selfpruner.pruning.search_space import expected_space, space_of
from selfpruner.pruning.signals import spectral_exponents

# The dense model's final streams of the report text may take one part in so many of the model's size, where memory has no ceiling.
KNOWN = 6


@dataclass(frozen=True)
class Prepared:
    """What a worker holds for a session. ``signals`` are plain numbers about the dense model, see :func:`signals.gather`."""

    config: SearchConfig
    loaded: LoadedModel
    arch: Architecture
    cache: Path
    texts: dict[Role, TokenBatches]
    space: SearchSpace
    signals: Signals
    engine: Engine
    seconds: float

    def text(self, role: Role, progress: OnProgress = lambda _: None, cancelled: Cancelled = lambda: False) -> TokenBatches:
        """The token batches of a role, made when they are first asked for."""
        if role not in self.texts:
            # A text that the model writes is to be the same whatever was done with the model before.
            restore_channels(self.arch)
            self.texts[role] = text_of(self.config, role, self.loaded, self.cache, progress, cancelled)
        return self.texts[role]

    def tokens(self, role: Role, sequences: Sequence[int], piece: int | None = None) -> Tensor:
        """Token ids (len(sequences), length) of one text, or (pieces, piece): what does not fill a piece is left out."""
        tokens = self.text(role).tokens[list(sequences)]
        length = tokens.shape[1]
        return tokens if piece is None or piece >= length else tokens[:, : length // piece * piece].reshape(-1, piece)


def text_of(
    config: SearchConfig, role: Role, loaded: LoadedModel, cache: Path, progress: OnProgress, cancelled: Cancelled
) -> TokenBatches:
    wanted: dict[Role, TextConfig] = {
        "calibration": config.calibration,
        "fitness": config.fitness_text,
        "report": config.report_text,
    }
    return token_batches(wanted[role], role, loaded, cache, config.seed, progress, cancelled)


def prepare(
    config: SearchConfig,
    loaded: LoadedModel,
    cache: Path,
    roles: Sequence[Role],
    progress: OnProgress,
    cancelled: Cancelled,
    plan: Plan | None = None,
) -> Prepared:
    """The texts of ``roles``, statistics, importance, space; with a ``plan`` what only others need may be left out. Raises typed
    errors for texts and budgets that cannot work."""
    started = time.perf_counter()
    arch = describe(loaded.model)
    check(config, arch)
    wanted: tuple[Role, ...] = ("calibration", *roles)
    texts = {role: text_of(config, role, loaded, cache, progress, cancelled) for role in dict.fromkeys(wanted)}
    release()  # what writing text needed is gone before the factors come
    blocks, signals = prepare_blocks(config, arch, loaded, texts["calibration"], cache, progress, cancelled, plan)
    if "spectra" in config.needs:
        progress("looking at spectra")
        file = cache / "spectra" / f"{loaded.source.fingerprint}-{arch.dtype}.json"
        use(file, loaded.source.name, "spectra of its weights")
        signals["spectral_exponents"] = spectral_exponents(arch, file, cancelled)
    space = space_of(config, arch, blocks)
    seconds = time.perf_counter() - started
    return Prepared(config, loaded, arch, cache, texts, space, signals, make_engine(arch, loaded, blocks), seconds)


def check(config: SearchConfig, arch: Architecture) -> None:
    """What can be wrong with a model and a budget is found before minutes are spent on statistics. Raises typed errors."""
    _check_head(arch)
    restore_channels(arch)  # what an earlier session left; a text that the model writes does not depend on it
    expected_space(config, arch)


def _check_head(arch: Architecture) -> None:
    """Raise ModelError where norm or head hold NaN or infinity: no statistics would show it, and every score would be NaN."""
    head = arch.head_pieces() or [(0, arch.head_weight)]
    if not finite(arch.last_norm.weight) or not all(finite(rows) for _, rows in head):
        raise not_numbers(arch.model)


def make_engine(arch: Architecture, loaded: LoadedModel, blocks: Sequence[Prunable]) -> Engine:
    """An engine that adds to the weights what they leave of the memory there is.

    Half of it is its to plan with: allocators hold on to freed memory, and cutting a level takes some for a moment.
    """
    if loaded.memory is None:
        engine = Engine(arch, blocks)
        engine.known = KnownFinals(held_bytes(arch, loaded) // KNOWN)
        return engine
    left = max(loaded.memory - held_bytes(arch, loaded), loaded.memory // 8)
    return Engine(arch, blocks, memory_bytes=left // 2)


def baseline_engine(prepared: Prepared, changes: Mapping[str, object], progress: OnProgress, cancelled: Cancelled) -> Prepared:
    """The same model, texts and target with another criterion or compensation (``changes`` of the config).

    Takes the place of ``prepared``, whose engine is emptied first.
    """
    config = SearchConfig.model_validate({**prepared.config.model_dump(), **changes})
    prepared.engine.blocks.clear()
    prepared.engine.cache.clear()
    blocks, signals = prepare_blocks(
        config, prepared.arch, prepared.loaded, prepared.text("calibration"), prepared.cache, progress, cancelled
    )
    space = space_of(config, prepared.arch, blocks)
    engine = make_engine(prepared.arch, prepared.loaded, blocks)
    engine.known = prepared.engine.known
    return replace(prepared, config=config, space=space, signals=signals, engine=engine)


def forget_plan(prepared: Prepared) -> None:
    """Remove the levels that were made for one plan, once it is exported; a database of all levels stays."""
    blocks = prepared.engine.blocks
    database = blocks[0].file.path.parent if blocks and isinstance(blocks[0], PrunableMasked) else None
    if database is not None and database.name.startswith(masked.OF_PLAN):
        prepared.engine.blocks.clear()
        discard(database)
