"""Safetensors files read and written piece by piece, so that memory holds only what is needed now.

Pieces are read by ``pread`` into the caller's memory, not mapped: a mapped page counts as the process's memory from its first use
until the system takes it back, and nobody can say when that is. The system can drop its own cache of a file whenever it likes.
Headers are trusted; files of others go through :mod:`selfpruner.models.checks` first.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from selfpruner.errors import ModelError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class _Entry(TypedDict):
    """What a header says of a tensor; the offsets are from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Parts(Protocol):
    """Named tensors of which some rows may be wanted, wherever they are."""

    def __getitem__(self, name: str) -> Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``."""
        ...


class HeldParts(dict[str, Tensor]):
    """Tensors in memory."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self[name][start:stop]


class TensorFile:
    """An open safetensors file. ``shapes`` has a (dtype, shape) per name, ``metadata`` is the file's own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        header = json.loads(os.pread(self._descriptor, length, 8))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        entries: dict[str, _Entry] = header
        self.shapes = {name: (_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items()}
        self._offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}

    def read(self, name: str, out: Tensor | None = None, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in the stored dtype, into the contiguous CPU tensor ``out`` or a new one.

        Raises ModelError when the file has been cut short since it was opened.
        """
        dtype, shape = self.shapes[name]
        if shape:
            shape = ((shape[0] if stop is None else stop) - start, *shape[1:])
        target = torch.empty(shape, dtype=dtype) if out is None else out
        if target.dtype != dtype or target.shape != shape or not target.is_contiguous():
            raise ValueError(f"{name} needs a contiguous {dtype} buffer of shape {shape}, not {target.dtype} {tuple(target.shape)}")
        view = tensor_bytes(target)
        offset = self._offsets[name] + start * prod(shape[1:]) * dtype.itemsize
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done : done + (1 << 30)]], offset + done)
            if count == 0:
                raise ModelError(f"{self.path} ends inside {name}: it was changed while in use. Download the model again.")
            done += count
        return target


class StoredParts:
    """The tensors of ``file`` whose names begin with ``prefix``, read to ``device`` every time they are asked for."""

    def __init__(self, file: TensorFile, prefix: str, device: torch.device) -> None:
        self._file, self._prefix, self._device = file, prefix, device

    def __getitem__(self, name: str) -> Tensor:
        return self._file.read(self._prefix + name).to(self._device)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._file.read(self._prefix + name, start=start, stop=stop).to(self._device)


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor: Callable[[str], Tensor | Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a safetensors file, asking for one tensor after the other in the order of ``shapes``, whole or as runs of its rows;
    returns the tensors' bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = _Entry(dtype=_NAMES[dtype], shape=list(shape), data_offsets=(begin, end))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, (dtype, shape) in shapes.items():
            value = tensor(name)
            rows = 0
            for part in [value] if isinstance(value, Tensor) else value:
                if part.dtype != dtype or part.shape[1:] != torch.Size(shape[1:]):
                    raise ValueError(f"{name} should be {dtype} {tuple(shape)}, not {part.dtype} {tuple(part.shape)}")
                file.write(tensor_bytes(part.detach().cpu().contiguous()))
                rows += part.shape[0] if shape else 1
            if rows != (shape[0] if shape else 1):
                raise ValueError(f"{name} should have {shape[0]} rows, not {rows}")
    return end


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def held_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
