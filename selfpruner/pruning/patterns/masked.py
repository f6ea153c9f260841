"""N:M and unstructured pruning of one layer: matrices of the original shapes in which weights are zero, at every level.

A level says how thin all matrices of a block are. What is made once per layer is in one file, the *level database*: without a
repair one bit per weight and level, with one the repaired weights in the model's dtype. Whoever needs a level reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights, with_tensors
from selfpruner.architectures.order import checkpoint_ffn, reorder_channels
from selfpruner.calibration.gradients import Gradients
from selfpruner.calibration.statistics import BlockStatistics, Site
from selfpruner.compensation.base import output_energy
from selfpruner.compensation.sweep import factor, sweep
from selfpruner.criteria import Matrix, WeightCriterion
from selfpruner.criteria.masks import Sparsity
from selfpruner.files import atomic
from selfpruner.files.tensors import TensorFile, write_tensors
from selfpruner.models.memory import release
from selfpruner.planning.space import Option, Plan
from selfpruner.pruning.signals import LayerSignals

# The matrices of a block, by its place in the layer; an FFN may have no gate.
BLOCKS = (("q", "k", "v", "o"), ("gate", "up", "down"))
SITE_OF: Mapping[str, Site] = {
    **dict.fromkeys(("q", "k", "v"), "qkv"),
    "o": "attention",
    **dict.fromkeys(("gate", "up"), "gate_up"),
    "down": "ffn",
}
# Raise it when what is in the files changes.
_FORMAT = 2
OF_PLAN = "plan-"
# Rows of all levels together that one sweep repairs: what it takes beyond them is three times their size.
SWEEP_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class PrunableMasked:
    """A block at every level; ``file`` has its layer's levels."""

    arch: Architecture
    layer: int
    block: int
    file: TensorFile
    options: tuple[Option, ...]

    def weights(self, level: int) -> AttentionWeights | FfnWeights:
        """The block's weights at ``level`` in the model's dtype and the checkpoint's order of channels."""
        base = self._base()
        if level == 0:
            return base
        return with_tensors(base, {name: self._matrix(name, level, getattr(base, name)) for name in base.matrices})

    def renewed(self, level: int, weights: AttentionWeights | FfnWeights | None) -> AttentionWeights | FfnWeights | None:
        """What :meth:`weights` gave earlier, with what is the model's own taken again."""
        return self._base() if level == 0 else weights

    def own_bytes(self, weights: AttentionWeights | FfnWeights | None) -> int:
        """Bytes of a level below dense that are not the model's."""
        return 0 if weights is None else sum(int(getattr(weights, name).nbytes) for name in weights.matrices)

    def columns(self, level: int) -> slice | Tensor | None:  # noqa: ARG002
        """None: what the output matrix sees differs from level to level."""
        return None

    def _matrix(self, name: str, level: int, dense: Tensor) -> Tensor:
        stored = self.file.read(f"{name}.{level}")
        if stored.dtype != torch.uint8:
            return stored.to(self.arch.device, self.arch.dtype)
        return dense * unpacked(stored, dense.shape[1]).to(dense)

    def _base(self) -> AttentionWeights | FfnWeights:
        reorder_channels(self.arch, self.layer, None)
        return self.arch.ffn(self.layer) if self.block else self.arch.attention(self.layer)


def block_options(arch: Architecture, layer: int, block: int, levels: Sequence[Sparsity]) -> tuple[Option, ...]:
    """One option per level, as many weights as it should keep; ``parameters`` are weights that are not zero, so biases and norms
    are none of them."""
    weights = _block(arch, layer, block)
    sizes = [getattr(weights, name).numel() for name in weights.matrices]
    return tuple(Option(sum(sizes) - sum(level.pruned(size) for size in sizes)) for level in levels)


def level_files(
    arch: Architecture,
    folder: Path,
    fingerprint: str,
    criterion: str,
    compensation: str,
    levels: Sequence[Sparsity],
    plan: Plan | None = None,
) -> list[Path]:
    """The level database's file of every layer; ``fingerprint`` identifies model and calibration text. With a ``plan``: of a
    database that holds this plan's levels only, whose name begins with ``OF_PLAN``."""
    asked = f"{_FORMAT}:{fingerprint}:{arch.dtype}:{criterion}:{compensation}:{levels}"
    if plan is not None:
        asked += f":{plan.hash}"
    database = folder / (("" if plan is None else OF_PLAN) + hashlib.sha256(asked.encode()).hexdigest()[:24])
    return [database / f"layer-{layer:04d}.safetensors" for layer in range(arch.layers)]


def database_bytes(arch: Architecture, levels: Sequence[Sparsity], *, repaired: bool) -> int:
    """What the level database of a model will take on disk."""
    matrices = [getattr(weights, name) for weights in (_block(arch, 0, 0), _block(arch, 0, 1)) for name in weights.matrices]
    one = sum(W.numel() * arch.dtype.itemsize if repaired else W.shape[0] * -(-W.shape[1] // 8) for W in matrices)
    return int(one) * arch.layers * (len(levels) - 1)


def write_levels(
    file: Path,
    matrices: Mapping[str, Matrix],
    criterion: WeightCriterion,
    levels: Sequence[Sparsity],
    dtype: torch.dtype,
    facts: LayerSignals,
    *,
    repair: bool,
    only: tuple[int, int] | None = None,
) -> None:
    """Make a layer's levels and write them, and beside them ``facts``, and of every matrix at every level how many weights stay
    and the squared output error as a share of its output.

    ``levels[0]`` is the dense one. With ``only``, one level of attention and one of the FFN, no other is made: of others the file
    says how many weights should stay, and no error. Raises DiskFullError, and leaves nothing then.
    """
    made_of = {name: _numbers(len(levels), None if only is None else only[name in BLOCKS[1]]) for name in matrices}
    shapes: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for name, matrix in matrices.items():
        out, width = matrix.W.shape
        for level in made_of[name]:
            shapes[f"{name}.{level}"] = (dtype, (out, width)) if repair else (torch.uint8, (out, -(-width // 8)))
    errors = {name: [0.0] * len(levels) for name in matrices}
    sizes = {name: matrix.W.numel() for name, matrix in matrices.items()}
    counts = {name: [size - level.pruned(size) for level in levels] for name, size in sizes.items()}
    ready: dict[str, Tensor] = {}
    waiting = {name: _made(matrices, name, criterion, [levels[level] for level in made_of[name]], repair) for name in matrices}
    left = {name: list(numbers) for name, numbers in made_of.items()}

    def tensor(key: str) -> Tensor:
        name = key.split(".")[0]
        while key not in ready:
            made, kept, error = next(waiting[name])
            level = left[name].pop(0)
            ready[f"{name}.{level}"] = made.to(dtype) if repair else packed(kept)
            errors[name][level] = error
            counts[name][level] = int(kept.sum())
            if not left[name]:
                waiting.pop(name).close()  # its scores and products are not needed again
                release()
        return ready.pop(key)

    with atomic.replacing(file) as aside:
        write_tensors(aside, shapes, tensor)
    atomic.write_text(facts_file(file), json.dumps({"errors": errors, "kept": counts, "facts": dict(facts)}))


def _numbers(count: int, only: int | None) -> list[int]:
    """Which of so many levels are made: all but the dense one, or one."""
    return [level for level in range(1, count) if only is None or level == only]


def facts_file(file: Path) -> Path:
    """The text beside a layer's levels, written last: where it is, they are whole."""
    return file.with_suffix(".json")


def read_facts(file: Path) -> tuple[tuple[tuple[Option, ...], ...], LayerSignals]:
    """The options of attention and FFN, with the weights that really stay and the mean error of the block's matrices, and the
    facts."""
    body = json.loads(facts_file(file).read_text("utf-8"))
    options = []
    for block in BLOCKS:
        names = [name for name in block if name in body["kept"]]
        kept = [sum(each) for each in zip(*(body["kept"][name] for name in names), strict=True)]
        errors = [fmean(each) for each in zip(*(body["errors"][name] for name in names), strict=True)]
        options.append(tuple(Option(count, error) for count, error in zip(kept, errors, strict=True)))
    return tuple(options), body["facts"]


def _made(
    matrices: Mapping[str, Matrix], name: str, criterion: WeightCriterion, levels: Sequence[Sparsity], repair: bool
) -> Generator[tuple[Tensor, Tensor, float], None, None]:
    """Weights (with a repair), mask and error of every level, in order."""
    matrix = matrices[name]
    assert matrix.inputs is not None
    whole = max(output_energy(matrix.W, matrix.inputs), torch.finfo(torch.float32).tiny)
    masks = criterion.masks(matrix, levels)
    if not repair:
        for kept in masks:
            yield matrix.W, kept, output_energy(matrix.W.masked_fill(kept, 0.0), matrix.inputs) / whole
        return
    U, dead = factor(matrix.inputs)
    together = max(1, SWEEP_BYTES // matrix.W.nbytes)
    rows = len(matrix.W)
    for start in range(0, len(levels), together):
        # All levels are rows of one product: they share the factor.
        field = torch.cat([next(masks) for _ in levels[start : start + together]])

        def choose(first: int, last: int, _: Tensor, field: Tensor = field) -> Tensor:
            return field[:, first:last]

        repaired, _, _ = sweep(matrix.W.repeat(len(field) // rows, 1), U, dead, choose)
        for made, kept in zip(repaired.split(rows), field.split(rows), strict=True):
            yield made, kept, output_energy(matrix.W - made, matrix.inputs) / whole


def packed(mask: Tensor) -> Tensor:
    """A bool mask (out, in) as bits, uint8 (out, ceil(in / 8))."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1))


def unpacked(bits: Tensor, width: int) -> Tensor:
    """The bool mask (out, width) of :func:`packed`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=width)).bool()


@dataclass(frozen=True, slots=True)
class LayerMatrices(Mapping[str, Matrix]):
    """The matrices of a layer in float32, in the checkpoint's order, with what was measured at them. Each is made when it is asked
    for: of a model in half precision all together are as large as the statistics."""

    arch: Architecture
    layer: int
    statistics: Mapping[Site, BlockStatistics]
    gradients: Mapping[str, Gradients] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter([name for block in (0, 1) for name in _block(self.arch, self.layer, block).matrices])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> Matrix:
        W = getattr(_block(self.arch, self.layer, int(name in BLOCKS[1])), name).float()
        return Matrix(name, W, self.statistics[SITE_OF[name]], None if self.gradients is None else self.gradients[name])


def _block(arch: Architecture, layer: int, block: int) -> AttentionWeights | FfnWeights:
    return checkpoint_ffn(arch, layer) if block else arch.attention(layer)
