"""Statistics on disk: safetensors files, one per layer and kind, shared by all jobs on one model and text.

Inputs of the output matrices, inputs of the others, and gradients are kept apart, so that a job adds what the jobs before it did
not need. A file is written aside and renamed, so what exists is whole; a job that dies half-way goes on from the layers that are
there only if all are, since a layer's inputs need the walk through the layers before it. Of a Gram matrix the scatter about the
mean is kept, in float32: rounding then is relative to what the inputs vary, not to where they lie; gradients, which are sums of
noisy terms, in bfloat16. What is computed and what is read back are the same numbers, so a resumed job makes the same plans.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfpruner.architectures import Architecture
from selfpruner.calibration.gradients import Gradients, layer_gradients
from selfpruner.calibration.statistics import OUTPUTS, SITES, BlockStatistics, Moments, Site, check_finite, layer_statistics
from selfpruner.errors import disk_errors
from selfpruner.workers.memory import release

_FIELDS = ("mean", "variance", "energy")
_SUMS = ("total", "absolute", "squared")
_FORMAT = 3
# Which sites share a file, by the file's name.
_FILES: Mapping[str, tuple[Site, ...]] = {"layer": OUTPUTS, "inputs": tuple(site for site in SITES if site not in OUTPUTS)}


def cached_statistics(
    arch: Architecture,
    tokens: Tensor,
    folder: Path,
    fingerprint: str,
    sites: Collection[Site] = OUTPUTS,
    *,
    memory: int | None = None,
    on: torch.device | None = None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[dict[Site, BlockStatistics]]:
    """Per-layer statistics at ``sites``, read from ``folder`` where they are complete, else collected and written.

    ``fingerprint`` identifies model, text and everything else the numbers depend on; the dtype is added here. ``memory`` bounds
    collecting, see :func:`layer_statistics`; ``on`` is where the statistics go, by default the model's device.
    """
    on = on or arch.device
    place = _place(arch, folder, fingerprint)
    kinds = [kind for kind, own in _FILES.items() if set(own) & set(sites)]
    missing = [kind for kind in kinds if not all(file.exists() for file in _files(place, kind, arch.layers))]
    collected = None
    if missing:
        place.mkdir(parents=True, exist_ok=True)
        asked = [site for kind in missing for site in _FILES[kind]]
        collected = layer_statistics(arch, tokens, asked, memory=memory, scratch=place, progress=progress, cancelled=cancelled)
    for layer in range(arch.layers):
        if collected is None:
            progress(f"reading statistics of layer {layer + 1}/{arch.layers}")
        else:
            found = next(collected)
            for kind in missing:
                _write(_files(place, kind, arch.layers)[layer], {site: found.pop(site) for site in _FILES[kind]})
            release()
        read: dict[Site, BlockStatistics] = {}
        for kind in kinds:
            read |= _read(_files(place, kind, arch.layers)[layer], [site for site in _FILES[kind] if site in sites], on)
        check_finite(arch, layer, read)
        yield read


def cached_gradients(
    arch: Architecture,
    tokens: Tensor,
    folder: Path,
    fingerprint: str,
    *,
    memory: int | None = None,
    on: torch.device | None = None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Callable[[int], dict[str, Gradients]]:
    """What reads a layer's gradients by matrix name, once all of them are on disk; see :func:`cached_statistics`."""
    place, target = _place(arch, folder, fingerprint), on or arch.device
    files = _files(place, "gradients", arch.layers)
    if not all(file.exists() for file in files):
        place.mkdir(parents=True, exist_ok=True)
        collected = layer_gradients(arch, tokens, memory=memory, scratch=place, progress=progress, cancelled=cancelled)
        for layer, found in collected:
            tensors = {f"{name}.{part}": getattr(sums, part).bfloat16().cpu() for name, sums in found.items() for part in _SUMS}
            _save(files[layer], tensors, {"sequences": str(tokens.shape[0])})
            del found, tensors
            release()

    def read(layer: int) -> dict[str, Gradients]:
        tensors = load_file(files[layer])
        names = dict.fromkeys(name.split(".")[0] for name in tensors)
        return {name: _sums(tensors, name, tokens.shape[0], target) for name in names}

    return read


def _sums(tensors: Mapping[str, Tensor], name: str, sequences: int, device: torch.device) -> Gradients:
    total, absolute, squared = (tensors[f"{name}.{part}"].to(device) for part in _SUMS)
    return Gradients(total, absolute, squared, sequences)


def _place(arch: Architecture, folder: Path, fingerprint: str) -> Path:
    return folder / hashlib.sha256(f"{_FORMAT}:{fingerprint}:{arch.dtype}".encode()).hexdigest()[:24]


def _files(place: Path, kind: str, layers: int) -> list[Path]:
    return [place / f"{kind}-{layer:04d}.safetensors" for layer in range(layers)]


def _write(file: Path, found: Mapping[Site, BlockStatistics]) -> None:
    tensors = {}
    for name, stats in found.items():
        for part in _FIELDS:
            value: Tensor = getattr(stats, part)
            tensors[f"{name}.{part}"] = value.cpu().contiguous()
        tensors[f"{name}.scatter"] = stats.scatter.float().cpu().contiguous()
        if stats.judge is not None:
            tensors[f"{name}.judge.mean"] = stats.judge.mean.cpu().contiguous()
            tensors[f"{name}.judge.scatter"] = stats.judge.scatter.cpu().contiguous()
    one = next(iter(found.values()))
    counts = {"tokens": one.tokens, "sequences": one.sequences, "judge": one.judge.tokens if one.judge else 0}
    _save(file, tensors, {key: str(count) for key, count in counts.items()})


def _save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with disk_errors(file):
            save_file(tensors, aside, metadata=metadata)
            aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _read(file: Path, sites: Collection[Site], device: torch.device) -> dict[Site, BlockStatistics]:
    from safetensors import safe_open

    dtype = torch.float32 if device.type == "mps" else torch.float64
    with safe_open(file, framework="pt") as opened:
        counts = opened.metadata()
        tokens = int(counts["tokens"])

        def block(name: str) -> BlockStatistics:
            mean, variance, energy = (opened.get_tensor(f"{name}.{part}").to(device, dtype) for part in _FIELDS)
            scatter = opened.get_tensor(f"{name}.scatter").to(device)
            judge = None
            if int(counts["judge"]):
                own = (opened.get_tensor(f"{name}.judge.{part}").to(device) for part in ("mean", "scatter"))
                judge = Moments(int(counts["judge"]), *own)
            return BlockStatistics(tokens, int(counts["sequences"]), mean, variance, energy, scatter, judge)

        return {site: block(site) for site in sites}
