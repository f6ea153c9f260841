"""Statistics on disk: safetensors files, one per layer and kind, shared by all jobs on one model and text.

Inputs of the output matrices, inputs of the other matrices, and gradients are separate kinds, so a job adds only what earlier jobs
did not need. A file is written aside and renamed, so what exists is whole. A layer's inputs need the walk through all layers before
it, so a job continues from the files that are there only if all of them are.

Instead of a Gram matrix its scatter about the mean is kept, in float32 and with each pair of inputs once. Rounding is then relative
to how much the inputs vary, not to where they lie. Gradients are sums of noisy terms and are kept in bfloat16. A job that reads
from disk sees the same numbers as the one that computed them, so a resumed job makes the same plans.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfpruner.architectures import Architecture
from selfpruner.calibration.gradients import Gradients, layer_gradients
from selfpruner.calibration.statistics import (
    OUTPUTS,
    SITES,
    BlockStatistics,
    Moments,
    Site,
    check_finite,
    layer_statistics,
    merged,
    mirror,
    part_of,
)
from selfpruner.errors import disk_errors
from selfpruner.files import atomic
from selfpruner.files.tensors import TensorFile
from selfpruner.models.memory import release
from selfpruner.stages import at, count_tokens

_FIELDS = ("mean", "variance", "energy")
_SUMS = ("total", "absolute", "squared")
_FORMAT = 5
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
    stored_in = statistics_place(arch, folder, fingerprint)
    kinds = _kinds(sites)
    missing = [kind for kind in kinds if not _complete(stored_in, kind, arch.layers)]
    collected = None
    if missing:
        with at("statistics"):
            count_tokens(tokens.numel())
        stored_in.mkdir(parents=True, exist_ok=True)
        asked = [site for kind in missing for site in _FILES[kind]]
        collected = layer_statistics(arch, tokens, asked, memory=memory, scratch=stored_in, progress=progress, cancelled=cancelled)
    for layer in range(arch.layers):
        found: dict[Site, BlockStatistics] = {}
        with at("statistics"):
            if collected is None:
                progress(f"reading statistics of layer {layer + 1}/{arch.layers}")
            else:
                found = next(collected)
                for kind in missing:
                    _write(_files(stored_in, kind, arch.layers)[layer], {site: found[site] for site in _FILES[kind]})
            handed = collected is not None and on == arch.device and memory is None
            for kind in kinds:
                if kind not in missing or not handed:
                    file = _files(stored_in, kind, arch.layers)[layer]
                    found |= _read(file, [site for site in _FILES[kind] if site in sites], on)
            found = {site: found[site] for site in SITES if site in sites}
            check_finite(arch, layer, found)
        yield found
        del found


def collect_part(
    arch: Architecture,
    tokens: Tensor,
    folder: Path,
    fingerprint: str,
    part: int,
    parts: int,
    sites: Collection[Site] = OUTPUTS,
    *,
    memory: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> int:
    """Collect the statistics of one of ``parts`` of the token ids (sequences, length), for :func:`statistics_of`. How many tokens
    that were."""
    own = tokens[part_of(len(tokens), part, parts)]
    name = _part_name(fingerprint, part, parts)
    for _ in cached_statistics(arch, own, folder, name, sites, memory=memory, progress=progress, cancelled=cancelled):
        pass
    return own.numel()


def statistics_of(
    arch: Architecture,
    folder: Path,
    fingerprint: str,
    layer: int,
    sites: Collection[Site] = OUTPUTS,
    *,
    parts: int = 0,
    on: torch.device | None = None,
) -> dict[Site, BlockStatistics]:
    """One layer's statistics at ``sites``, from what was collected before: as a whole, or with ``parts`` by :func:`collect_part`,
    which is then merged and written."""
    place = statistics_place(arch, folder, fingerprint)
    found: dict[Site, BlockStatistics] = {}
    for kind in _kinds(sites):
        file = _files(place, kind, arch.layers)[layer]
        if parts and not file.exists():
            place.mkdir(parents=True, exist_ok=True)
            places = [part_place(arch, folder, fingerprint, part, parts) for part in range(parts)]
            read = [_read(_files(own, kind, arch.layers)[layer], _FILES[kind], torch.device("cpu")) for own in places]
            _write(file, {site: merged([part[site] for part in read]) for site in _FILES[kind]})
        found |= _read(file, [site for site in _FILES[kind] if site in sites], on or arch.device)
    check_finite(arch, layer, found)
    return found


def part_place(arch: Architecture, folder: Path, fingerprint: str, part: int, parts: int) -> Path:
    """The folder of what :func:`collect_part` collects."""
    return statistics_place(arch, folder, _part_name(fingerprint, part, parts))


def _part_name(fingerprint: str, part: int, parts: int) -> str:
    return f"{fingerprint}:{part}/{parts}"


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
    stored_in, target = statistics_place(arch, folder, fingerprint), on or arch.device
    files = _files(stored_in, "gradients", arch.layers)
    if not _complete(stored_in, "gradients", arch.layers):
        stored_in.mkdir(parents=True, exist_ok=True)
        collected = layer_gradients(arch, tokens, memory=memory, scratch=stored_in, progress=progress, cancelled=cancelled)
        for layer, gradients in collected:
            tensors = {f"{name}.{part}": getattr(sums, part).bfloat16().cpu() for name, sums in gradients.items() for part in _SUMS}
            _save(files[layer], tensors, {"sequences": str(tokens.shape[0])})
            del gradients, tensors
            release()

    def read(layer: int) -> dict[str, Gradients]:
        tensors = load_file(files[layer])
        names = dict.fromkeys(name.split(".")[0] for name in tensors)
        return {name: _sums(tensors, name, tokens.shape[0], target) for name in names}

    return read


def _sums(tensors: Mapping[str, Tensor], name: str, sequences: int, device: torch.device) -> Gradients:
    total, absolute, squared = (tensors[f"{name}.{part}"].to(device) for part in _SUMS)
    return Gradients(total, absolute, squared, sequences)


def statistics_place(arch: Architecture, folder: Path, fingerprint: str) -> Path:
    """The folder of what is measured of a model on a text."""
    return folder / hashlib.sha256(f"{_FORMAT}:{fingerprint}:{arch.dtype}".encode()).hexdigest()[:24]


def _kinds(sites: Collection[Site]) -> list[str]:
    return [kind for kind, own in _FILES.items() if set(own) & set(sites)]


def _files(place: Path, kind: str, layers: int) -> list[Path]:
    return [place / f"{kind}-{layer:04d}.safetensors" for layer in range(layers)]


def _complete(place: Path, kind: str, layers: int) -> bool:
    return all(file.exists() for file in _files(place, kind, layers))


def missing_sites(arch: Architecture, folder: Path, fingerprint: str, sites: Collection[Site]) -> list[Site]:
    """Those whose statistics would have to be collected."""
    stored_in = statistics_place(arch, folder, fingerprint)
    missing = [own for kind, own in _FILES.items() if set(own) & set(sites) and not _complete(stored_in, kind, arch.layers)]
    return [site for own in missing for site in own]


def missing_gradients(arch: Architecture, folder: Path, fingerprint: str) -> bool:
    return not _complete(statistics_place(arch, folder, fingerprint), "gradients", arch.layers)


def _write(file: Path, found: Mapping[Site, BlockStatistics]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, stats in found.items():
        for part in _FIELDS:
            value: Tensor = getattr(stats, part)
            tensors[f"{name}.{part}"] = value.cpu().contiguous()
        tensors |= _strips(f"{name}.scatter", stats.scatter)
        if stats.judge is not None:
            tensors[f"{name}.judge.mean"] = stats.judge.mean.cpu().contiguous()
            tensors |= _strips(f"{name}.judge.scatter", stats.judge.scatter)
    one = next(iter(found.values()))
    counts = {"tokens": one.tokens, "sequences": one.sequences, "judge": one.judge.tokens if one.judge else 0}
    _save(file, tensors, {key: str(count) for key, count in counts.items()})


def _strips(name: str, scatter: Tensor) -> dict[str, Tensor]:
    """The upper triangle of a symmetric matrix (n, n) as strips of rows, each from the diagonal on."""
    rows = strip_rows(len(scatter))
    return {
        f"{name}.{start}": scatter[start : start + rows, start:].float().cpu().contiguous()
        for start in range(0, len(scatter), rows)
    }


def strip_rows(n: int) -> int:
    """Few enough that what they hold left of the diagonal is little."""
    return max(64, -(-n // 32))


def _mapped(n: int, folder: Path) -> Tensor:
    """A float32 matrix (n, n) in a file without a name, which the system can put away: such matrices, of which a layer has four,
    add nothing to what a criterion takes of the memory."""
    with NamedTemporaryFile(dir=folder, suffix=".tmp") as scratch, disk_errors(folder):
        for _ in range(n):
            scratch.write(bytes(4 * n))  # a place on the disk for each page: there is no error to catch when a mapped one has none
        scratch.flush()
        return torch.from_file(scratch.name, shared=True, size=n * n, dtype=torch.float32).view(n, n)


def _save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with atomic.replacing(file) as aside:
        save_file(tensors, aside, metadata=metadata)


def _read(file: Path, sites: Collection[Site], device: torch.device) -> dict[Site, BlockStatistics]:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    opened = TensorFile(file)
    tokens, sequences, judging = (int(opened.metadata[name]) for name in ("tokens", "sequences", "judge"))

    def symmetric(name: str, n: int) -> Tensor:
        whole, rows = _mapped(n, file.parent) if device.type == "cpu" else torch.empty(n, n), strip_rows(n)
        for start in range(0, n, rows):
            whole[start : start + rows, start:] = opened.read(f"{name}.{start}")
        return mirror(whole).to(device)

    def block(name: str) -> BlockStatistics:
        mean, variance, energy = (opened.read(f"{name}.{part}").to(device, dtype) for part in _FIELDS)
        scatter = symmetric(f"{name}.scatter", len(mean))
        judge = None
        if judging:
            own = opened.read(f"{name}.judge.mean").to(device)
            judge = Moments(judging, own, symmetric(f"{name}.judge.scatter", len(mean)))
        return BlockStatistics(tokens, sequences, mean, variance, energy, scatter, judge)

    return {site: block(site) for site in sites}
