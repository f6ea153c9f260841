"""A model made ready for one job: texts, statistics, the order of its units, its search space and its engine.

Everything here is a function of model, config and seed, and what is slow is cached on disk, so a worker that replaces another
gets to the same state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner import compensation, criteria
from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights, describe, in_float32
from selfpruner.architectures.base import soft_cap
from selfpruner.cache_folder import discard, make_room, use
from selfpruner.calibration.cache import (
    cached_gradients,
    cached_statistics,
    missing_gradients,
    missing_sites,
    statistics_place,
)
from selfpruner.calibration.gradients import Gradients
from selfpruner.calibration.soundness import finite, not_numbers
from selfpruner.calibration.statistics import OUTPUTS, SITES, BlockStatistics, Site
from selfpruner.calibration.texts import Role, TokenBatches, token_batches
from selfpruner.config import SearchConfig, TextConfig
from selfpruner.criteria import Criterion, UnitCriterion, WeightCriterion
from selfpruner.criteria.masks import Sparsity
from selfpruner.errors import CancelledTaskError, ConfigError, ExportError
from selfpruner.evaluation import outlook
from selfpruner.evaluation.engine import Engine
from selfpruner.evaluation.signals import gather, layer_facts, layer_signals, spectral_exponents, weight_facts
from selfpruner.export.build import check_buildable, outline
from selfpruner.export.checkpoint import TensorSource
from selfpruner.export.shape import KeptUnits, LayerShape
from selfpruner.models import LoadedModel, as_written
from selfpruner.patterns import (
    Prunable,
    PrunableAttention,
    PrunableFfn,
    PrunableMasked,
    attention_block,
    ffn_block,
    masked,
    measure_attention,
    measure_ffn,
)
from selfpruner.patterns.stored import factor_files, read_factors, write_factors
from selfpruner.space import Block, Option, Plan, SearchSpace, attention_shapes, default_ffn_step, ffn_widths
from selfpruner.tensor_files import TensorFile
from selfpruner.workers.memory import release

Progress = Callable[[str], None]
Cancelled = Callable[[], bool]


@dataclass(frozen=True)
class Prepared:
    """What a worker holds for a session. ``signals`` are plain numbers about the dense model, see :func:`signals.gather`."""

    config: SearchConfig
    loaded: LoadedModel
    arch: Architecture
    cache: Path
    texts: dict[Role, TokenBatches]
    space: SearchSpace
    signals: Mapping[str, Any]
    engine: Engine
    seconds: float

    def text(self, role: Role, progress: Progress = lambda _: None, cancelled: Cancelled = lambda: False) -> TokenBatches:
        """The token batches of a role, made when they are first asked for."""
        if role not in self.texts:
            # A text that the model writes is to be the same whatever was done with the model before.
            self.arch.restore_order()
            self.texts[role] = text_of(self.config, role, self.loaded, self.cache, progress, cancelled)
        return self.texts[role]

    def tokens(self, role: Role, sequences: Sequence[int], piece: int | None = None) -> Tensor:
        """Token ids (len(sequences), length) of one text, or (pieces, piece): what does not fill a piece is left out."""
        tokens = self.text(role).tokens[list(sequences)]
        length = tokens.shape[1]
        return tokens if piece is None or piece >= length else tokens[:, : length // piece * piece].reshape(-1, piece)


def text_of(
    config: SearchConfig, role: Role, loaded: LoadedModel, cache: Path, progress: Progress, cancelled: Cancelled
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
    progress: Progress,
    cancelled: Cancelled,
    plan: Plan | None = None,
) -> Prepared:
    """The texts of ``roles``, statistics, importance, space; with a ``plan`` what only others need may be left out. Raises typed
    errors for texts and budgets that cannot work."""
    started = time.perf_counter()
    arch = describe(loaded.model)
    check_buildable(loaded.model)
    _check_head(arch)
    arch.restore_order()  # what an earlier session left; a text that the model writes does not depend on it
    # A budget that cannot be met, or a text that is too short, is found before minutes are spent on statistics.
    expected_space(config, arch)
    wanted: tuple[Role, ...] = ("calibration", *roles)
    texts = {role: text_of(config, role, loaded, cache, progress, cancelled) for role in dict.fromkeys(wanted)}
    release()  # what writing text needed is gone before the factors come
    blocks, signals = prepare_blocks(config, arch, loaded, texts["calibration"], cache, progress, cancelled, plan)
    if config.uses_spectra:
        progress("looking at spectra")
        file = cache / "spectra" / f"{loaded.source.fingerprint}-{arch.dtype}.json"
        use(file, loaded.source.name, "spectra of its weights")
        signals["spectral_exponents"] = spectral_exponents(arch, file, cancelled)
    space = space_of(config, arch, blocks)
    seconds = time.perf_counter() - started
    return Prepared(config, loaded, arch, cache, texts, space, signals, make_engine(arch, loaded, blocks), seconds)


def _check_head(arch: Architecture) -> None:
    """Raise ModelError where norm or head hold what is no number: no statistics would show it, and every score would be none."""
    head = arch.head_pieces() or [(0, arch.head_weight)]
    if not finite(arch.last_norm.weight) or not all(finite(rows) for _, rows in head):
        raise not_numbers(arch.model)


def prepare_blocks(
    config: SearchConfig,
    arch: Architecture,
    loaded: LoadedModel,
    calibration: TokenBatches,
    cache: Path,
    progress: Progress,
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
        text.foresee(
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
    shapes, widths = _shapes(config, arch), _widths(config, arch)
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


def expected_space(config: SearchConfig, arch: Architecture) -> SearchSpace:
    """The space as it is known before anything is measured: without errors, and with the shapes that a smaller one will beat.
    Raises BudgetError for a rate that cannot be met."""
    return _space(config, arch, [_free_block(config, arch, index) for index in range(2 * arch.layers)])


def space_of(config: SearchConfig, arch: Architecture, blocks: Sequence[Prunable]) -> SearchSpace:
    """The search space of prepared blocks, in plan order."""
    return _space(config, arch, [Block(index // 2, _kind(index), block.options) for index, block in enumerate(blocks)])


@dataclass(frozen=True, slots=True)
class _Calibration:
    """What can be measured on the calibration text, kept under ``folder`` and shared by all criteria."""

    arch: Architecture
    loaded: LoadedModel
    tokens: Tensor
    folder: Path
    fingerprint: str
    sources: str
    progress: Progress
    cancelled: Cancelled

    def foresee(self, criterion: Criterion, sites: Sequence[Site], disk: int, more: Callable[[], float] | None) -> None:
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
    arch, levels, repair = text.arch, _levels(config), config.compensation == "least_squares"
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
        text.foresee(criterion, SITES, size, None)
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
    arch.restore_order()
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


def forget_plan(prepared: Prepared) -> None:
    """Remove the levels that were made for one plan, once it is exported; a database of all levels stays."""
    blocks = prepared.engine.blocks
    place = blocks[0].file.path.parent if blocks and isinstance(blocks[0], PrunableMasked) else None
    if place is not None and place.name.startswith(masked.OF_PLAN):
        prepared.engine.blocks.clear()
        discard(place)


def _levels(config: SearchConfig) -> list[Sparsity]:
    return masked.sparsities(config.pattern, config.group, config.sparsity_step, drop=config.drop_blocks)


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


def make_engine(arch: Architecture, loaded: LoadedModel, blocks: Sequence[Prunable]) -> Engine:
    """An engine that adds to the weights what they leave of the memory there is.

    Half of it is its to plan with: allocators hold on to freed memory, and cutting a level takes some for a moment.
    """
    if loaded.memory is None:
        return Engine(arch, blocks)
    left = max(loaded.memory - held_bytes(arch, loaded), loaded.memory // 8)
    return Engine(arch, blocks, memory_bytes=left // 2)


def baseline_engine(prepared: Prepared, changes: Mapping[str, Any], progress: Progress, cancelled: Cancelled) -> Prepared:
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
    return replace(prepared, config=config, space=space, signals=signals, engine=engine)


def pruned_tensors(prepared: Prepared, plan: Plan) -> tuple[list[LayerShape], dict[str, Tensor]]:
    """Layer shapes and the tensors that differ from the dense model, under their checkpoint names."""
    prepared.space.check(plan)
    shapes, tensors = [], {}
    if isinstance(prepared.engine.blocks[0], PrunableMasked):
        arch = prepared.arch
        arch.restore_order()  # what was left dense is written as it was
        return [LayerShape(*_whole(arch), arch.channels)] * arch.layers, dict(_masked_tensors(prepared, plan))
    for layer in range(prepared.arch.layers):
        levels = plan.levels[2 * layer], plan.levels[2 * layer + 1]
        attention = prepared.space.blocks[2 * layer].options[levels[0]]
        ffn = prepared.space.blocks[2 * layer + 1].options[levels[1]]
        shapes.append(LayerShape(attention.kv_groups, attention.heads_per_group, ffn.channels))
        for index, level in zip((2 * layer, 2 * layer + 1), levels, strict=True):
            if level:
                tensors.update(_named(prepared.arch, layer, prepared.engine.weights(index, level)))
            elif index % 2:  # a layer that nothing was taken from is written as it was, its channels in the checkpoint's order
                tensors.update(_named(prepared.arch, layer, prepared.arch.checkpoint_ffn(layer)))
    return shapes, tensors


def kept_units(prepared: Prepared, plan: Plan) -> KeptUnits | None:
    """The units that ``plan`` keeps, in the order in which :func:`pruned_tensors` has them; None where shapes stay."""
    arch, kept = prepared.arch, []
    for layer in range(arch.layers):
        attention, ffn = prepared.engine.blocks[2 * layer], prepared.engine.blocks[2 * layer + 1]
        if not (isinstance(attention, PrunableAttention) and isinstance(ffn, PrunableFfn)):
            return None
        one, other = plan.levels[2 * layer], plan.levels[2 * layer + 1]
        heads = list(attention.heads[one]) if one else None
        channels = ffn.order[: ffn.options[other].channels].tolist() if other else None
        kept.append((heads, channels))
    return KeptUnits(LayerShape(*_whole(arch), arch.channels), kept)


def zeros(prepared: Prepared, plan: Plan) -> int:
    """Weights that are zero in the blocks that ``plan`` prunes."""
    matrices = (tensor for _, tensor in _masked_tensors(prepared, plan))
    return sum(int((tensor == 0).sum()) for tensor in matrices)


def _masked_tensors(prepared: Prepared, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The matrices of the blocks that ``plan`` prunes by making weights zero, under their checkpoint names."""
    for block, level in enumerate(plan.levels):
        if level:
            found = _named(prepared.arch, block // 2, prepared.engine.weights(block, level))
            yield from ((name, tensor) for name, tensor in found.items() if name.endswith(".weight"))


def streamed_export(prepared: Prepared, plan: Plan) -> tuple[PreTrainedModel, TensorSource]:
    """The pruned model without its weights, and where they come from one by one: from the model's files, in the type that the
    checkpoint has, whatever was computed in."""
    prepared.space.check(plan)
    memory = (prepared.loaded.memory or 0) if prepared.loaded.streamed else None
    prepared = _as_written(prepared)
    arch, engine = prepared.arch, prepared.engine
    shapes, biases = [], set[str]()
    structured = not isinstance(engine.blocks[0], PrunableMasked)
    repaired = structured and compensation.create(prepared.config.compensation).adds_bias
    for layer in range(arch.layers):
        one, other = (prepared.space.blocks[block].options[plan.levels[block]] for block in (2 * layer, 2 * layer + 1))
        kept = (one.kv_groups, one.heads_per_group, other.channels) if structured else (*_whole(arch), arch.channels)
        shapes.append(LayerShape(*kept))
        for block, place in ((2 * layer, arch.layout.attention["o"]), (2 * layer + 1, arch.layout.ffn["down"])):
            if plan.levels[block] and repaired:
                biases.add(f"{arch.layout.layer(layer)}.{place}.bias")
    model = outline(prepared.loaded.model, shapes, biases, dtype=prepared.loaded.dtype)
    assert arch.stream is not None
    files = arch.stream.files
    held: dict[int, dict[str, Tensor]] = {}

    def tensor(name: str) -> Iterable[Tensor]:
        found = arch.layout.block_of(name)
        block = None if found is None else 2 * found[0] + found[1]
        if block is None or plan.levels[block] == 0:
            return files.pieces(name)
        if block not in held:
            held.clear()
            held[block] = _named(arch, block // 2, engine.weights(block, plan.levels[block]))
        if not finite(held[block][name]):
            raise ExportError(f"{name} has numbers that {arch.dtype} cannot hold. Ask for another dtype.", param="dtype")
        return [held[block][name]]

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        # In float32 like the verification, so that all that can differ is what was written.
        x, rope = arch.embed_exactly(tokens.to(arch.device)), arch.rope(tokens.shape[1])
        for block, level in enumerate(plan.levels):
            weights = engine.weights(block, level)
            if isinstance(weights, FfnWeights):
                x = arch.feed_forward(block // 2, x, in_float32(weights))
            elif weights is not None:
                x = arch.attend(block // 2, x, in_float32(weights), rope)
        x = arch.final_norm(x)
        head = arch.head_pieces() or ((0, rows) for rows in arch.head_weight.split(1024))
        return soft_cap(torch.cat([(x @ rows.float().T).cpu() for _, rows in head], -1), arch.cap)

    return model, TensorSource(tensor, logits, memory, arch.device)


def needs_files(loaded: LoadedModel) -> bool:
    """Whether a checkpoint is made of the model's files: where it was never whole, or what was computed in has not all the digits
    that the checkpoint has."""
    written = loaded.written or loaded.dtype
    return loaded.streamed or torch.promote_types(written, loaded.dtype) != loaded.dtype


def _as_written(prepared: Prepared) -> Prepared:
    """The same choices for the model in the type that its checkpoint has, streamed."""
    loaded = prepared.loaded
    if loaded.streamed and loaded.dtype == (loaded.written or loaded.dtype):
        return prepared
    prepared.engine.cache.clear()
    left = None if loaded.memory is None else max(loaded.memory - held_bytes(prepared.arch, loaded), 0)
    twin = as_written(loaded, left)
    arch = describe(twin.model)
    blocks: list[Any] = [replace(block, arch=arch) for block in prepared.engine.blocks]
    return replace(prepared, loaded=twin, arch=arch, engine=make_engine(arch, twin, blocks))


def _named(arch: Architecture, layer: int, weights: AttentionWeights | FfnWeights | None) -> dict[str, Tensor]:
    """A block's tensors under their checkpoint names."""
    if weights is None:
        return {}
    tensors = {}
    for place, parts in arch.layout.places(int(isinstance(weights, FfnWeights))).items():
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            found = [tensor for part in parts if (tensor := getattr(weights, part + suffix)) is not None]
            if found:
                name = f"{arch.layout.layer(layer)}.{place}.{kind}"
                tensors[name] = torch.cat(found) if len(found) > 1 else found[0].contiguous()
    return tensors


def _kind(index: int) -> Any:
    return "ffn" if index % 2 else "attention"


def _whole(arch: Architecture) -> tuple[int, int]:
    """The dense model's KV groups and query heads per group."""
    return arch.kv_groups, arch.heads_per_group


def _shapes(config: SearchConfig, arch: Architecture) -> list[tuple[int, int]]:
    return attention_shapes(*_whole(arch), config.attention, drop=config.drop_blocks, ranks=config.tensor_parallel)


def _widths(config: SearchConfig, arch: Architecture) -> list[int]:
    return ffn_widths(arch.channels, config.ffn_step, drop=config.drop_blocks, ranks=config.tensor_parallel)


def _free_block(config: SearchConfig, arch: Architecture, index: int) -> Block:
    """A block's sizes without errors, for the first look at the budget."""
    if config.pattern != "structured":
        options = masked.block_options(arch, index // 2, index % 2, _levels(config))
        return Block(index // 2, _kind(index), options[:1] if config.attention == "none" and index % 2 == 0 else options)
    if index % 2:
        return Block(index // 2, "ffn", tuple(Option(arch.ffn_cost(width), channels=width) for width in _widths(config, arch)))
    sizes = sorted({arch.attention_cost(*shape) for shape in _shapes(config, arch)}, reverse=True)
    return Block(index // 2, "attention", tuple(Option(size) for size in sizes))


def _space(config: SearchConfig, arch: Architecture, blocks: Sequence[Block]) -> SearchSpace:
    if config.pattern != "structured":
        # Of the matrices that are pruned, as sparsity is customarily said: 2:4 everywhere is a rate of a half.
        whole = sum(block.options[0].parameters for block in blocks)
        sizes = [option.parameters for option in blocks[1].options]
        step = max(before - after for before, after in pairwise(sizes))
        return SearchSpace(tuple(blocks), whole, config.rate, step, config.granularity)
    total = arch.decoder_parameters() if config.of == "decoder" else arch.model_parameters()
    channels = config.ffn_step or default_ffn_step(arch.channels, config.tensor_parallel)
    step = arch.ffn_cost(2 * channels) - arch.ffn_cost(channels)
    return SearchSpace(tuple(blocks), total, config.rate, step, config.granularity)
