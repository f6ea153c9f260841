"""A model whose weights stay in their safetensors files: one decoder layer is on the device, and the next on its way.

The modules are the family's own, on the meta device; small tensors (norms, biases, rotary tables) are loaded once. Asking for a
layer reads its matrices into one of two reused buffers, puts them into its modules, and sends a thread for the next layer.
Whatever runs the modules works, from the evaluation engine to the model's own forward pass. Each pass reads the files once, so
passes should be wide. Embeddings are gathered row by row. The output head is multiplied by a piece of the vocabulary at a time
where it takes more than a quarter of the memory there is; otherwise it is loaded.

A matrix in another order (:mod:`selfpruner.architectures.order`) is permuted while it is copied, and cast to its dtype as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from selfpruner.errors import ModelError
from selfpruner.files.tensors import TensorFile
from selfpruner.models.family_layouts import layout_of

HEAD = "lm_head.weight"
# Bytes read at once: small on a CPU, where they only have to outweigh a system call; large enough for the bus of a GPU.
_PIECE = {"cpu": 1 << 20, "cuda": 32 << 20}
# The output head is kept where it takes at most this share of the memory; else pieces of it of at most that share are read.
_HEAD_SHARE, _HEAD_PIECE_SHARE = 4, 16


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a streamed matrix belongs: an attribute of a module, at an offset (elements) of its layer's buffer."""

    module: nn.Module
    attribute: str
    name: str
    local: str
    shape: tuple[int, ...]
    offset: int
    empty: nn.Parameter


class _Slot:
    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.buffer = torch.empty(size, dtype=dtype, device=device)
        self.layer: int | None = None
        self.filled: Future[None] | None = None
        self.ready: torch.cuda.Event | None = None  # CUDA: after this event the buffer is filled
        self.free: torch.cuda.Event | None = None  # CUDA: after this event nobody reads the old content


class WeightFiles:
    """All tensors of a checkpoint by name, read in pieces onto ``device`` in ``dtype``. For one thread."""

    def __init__(self, files: Mapping[str, tuple[TensorFile, str]], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._files = dict(files)  # with the name that the tensor has there
        self.piece_bytes = _PIECE["cuda" if device.type == "cuda" else "cpu"]
        pinned = device.type == "cuda"
        self._staging = [torch.empty(self.piece_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2 if pinned else 1)]
        self._sent: list[torch.cuda.Event | None] = [None] * len(self._staging)
        self._turn = 0

    @classmethod
    def open(cls, paths: Sequence[Path], device: torch.device, dtype: torch.dtype) -> WeightFiles:
        return cls({name: (file, name) for file in map(TensorFile, paths) for name in file.shapes}, device, dtype)

    def for_another_thread(self) -> WeightFiles:
        return WeightFiles(self._files, self.device, self.dtype)

    def settle(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """``config`` as the files are: whether the output head is tied to the embeddings is not always as it says.

        As transformers reads such files: a head that differs from the embeddings, as a merge leaves it after one of them was
        trained, is a head of its own; where a tied model has the head alone, that is the embeddings as well.
        """
        embeddings = f"{layout_of(config).decoder}.embed_tokens.weight"
        if config.tie_word_embeddings:
            if embeddings not in self._files and HEAD in self._files:
                self._files[embeddings] = self._files[HEAD]
            elif HEAD not in self._files and embeddings in self._files:
                self._files[HEAD] = self._files[embeddings]
            elif not self._equal(embeddings, HEAD):
                config = copy.deepcopy(config)
                config.tie_word_embeddings = False
        return config

    def _equal(self, one: str, other: str) -> bool:
        """Whether two matrices hold the same numbers, whatever types they are stored in."""
        shape = self.shape(one)
        if shape != self.shape(other):
            return False
        count = max(1, self.piece_bytes // (8 * shape[1]))
        for start in range(0, shape[0], count):
            pair = [self._read(name, start, min(start + count, shape[0])) for name in (one, other)]
            wide = torch.promote_types(pair[0].dtype, pair[1].dtype)
            if not torch.equal(pair[0].to(wide), pair[1].to(wide)):
                return False
        return True

    def _read(self, name: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        file, stored = self._files[name]
        return file.read(stored, out, start=start, stop=stop)

    def _shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape as stored."""
        file, stored = self._files[name]
        return file.shapes[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._files:
            raise ModelError(f"The model lacks weights, such as {name}. Download the model again.", param="model")
        return self._shape(name)[1]

    def check(self, name: str, parameter: Tensor) -> None:
        """Raises ModelError unless the files hold ``name`` in the parameter's shape."""
        if self.shape(name) != tuple(parameter.shape):
            raise ModelError(f"{name} has another shape than config.json asks for. Download the model again.", param="model")

    def read(self, name: str, out: Tensor | None = None, *, order: Tensor | None = None, axis: int = 0) -> Tensor:
        """A tensor, its index ``axis`` in the given order (a permutation, on the device), into ``out`` or a new one."""
        shape = self.shape(name)
        target = torch.empty(shape, dtype=self.dtype, device=self.device) if out is None else out
        direct = self._shape(name)[0] == self.dtype and self.device.type == "cpu" and order is None
        if direct:
            return self._read(name, out=target)
        places = torch.argsort(order) if order is not None and axis == 0 else None
        for start, rows in self._pieces(name):
            if places is not None:
                target.index_copy_(0, places[start : start + rows.shape[0]], rows.to(self.dtype))
            else:
                target[start : start + rows.shape[0]].copy_(rows if order is None else rows.index_select(1, order))
        return target

    def rows(self, name: str, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows ``start`` to ``stop`` into the first rows of ``out``."""
        if self._shape(name)[0] == self.dtype and self.device.type == "cpu":
            return self._read(name, start, stop, out[: stop - start])
        for at, rows in self._pieces(name, start, stop):
            out[at - start : at - start + rows.shape[0]].copy_(rows)
        return out[: stop - start]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor's rows in order, some at a time, each piece valid until the next is asked for."""
        for _, rows in self._pieces(name):
            yield rows.to(self.dtype)

    def gather(self, name: str, indices: Sequence[int]) -> Tensor:
        """The given rows, (len(indices), ...), on the device."""
        stored, shape = self._shape(name)
        rows = torch.empty(len(indices), *shape[1:], dtype=stored)
        for at, index in enumerate(indices):
            self._read(name, index, index + 1, rows[at : at + 1])
        return rows.to(self.device, self.dtype)

    def _pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows on the device in the stored dtype); a piece is valid until the next but one is asked for."""
        stored, shape = self._shape(name)
        stop = shape[0] if stop is None else stop
        row_bytes = max(1, stored.itemsize * int(torch.Size(shape[1:]).numel()))
        count = max(1, self.piece_bytes // row_bytes)
        for at in range(start, stop, count):
            rows = min(count, stop - at)
            self._turn = (self._turn + 1) % len(self._staging)
            if (sent := self._sent[self._turn]) is not None:
                sent.synchronize()
            if rows * row_bytes > self._staging[self._turn].numel():
                self._staging[self._turn] = torch.empty(row_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            held = self._staging[self._turn][: rows * row_bytes].view(stored).view(rows, *shape[1:])
            self._read(name, at, at + rows, held)
            yield at, held.to(self.device, non_blocking=True)
            if self.device.type == "cuda":
                self._sent[self._turn] = sent = torch.cuda.Event()
                sent.record(torch.cuda.current_stream(self.device))


class LayerStream:
    """Brings the matrices of the layer that is asked for into its modules. One consumer; one thread reads ahead."""

    def __init__(self, model: PreTrainedModel, files: WeightFiles) -> None:
        self.device, dtype = files.device, files.dtype
        self.files = files
        self._ahead = files.for_another_thread()
        self._layout = layout_of(model.config)
        self._layers = list(model.get_submodule(f"{self._layout.decoder}.layers").children())
        # How many times the channels follow each other in a matrix's rows; 0: they are its columns.
        self._channel_rows = {
            f"{place}.weight": 0 if parts == ["down"] else len(parts) for place, parts in self._layout.places(1).items()
        }
        self._places = [self._places_of(index, layer) for index, layer in enumerate(self._layers)]
        size = max(sum(place.empty.numel() for place in places) for places in self._places)
        self._slots = [_Slot(size, self.device, dtype) for _ in range(2)]
        self._current: _Slot | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.layer_bytes = size * dtype.itemsize

    def _places_of(self, index: int, layer: nn.Module) -> list[_Place]:
        places: list[_Place] = []
        offset = 0
        for module_name, module in layer.named_modules():
            for attribute, parameter in module.named_parameters(recurse=False):
                local = f"{module_name}.{attribute}"
                name = f"{self._layout.layer(index)}.{local}"
                self.files.check(name, parameter)
                if parameter.ndim > 1:
                    places.append(_Place(module, attribute, name, local, tuple(parameter.shape), offset, parameter))
                    offset += parameter.numel()
        return places

    def present(self, layer: int) -> None:
        """Return when the layer's modules hold its weights. Those of the layer asked for before are gone then."""
        if self._current is not None and self._current.layer == layer:
            return
        slot = next((slot for slot in self._slots if slot.layer == layer), None)
        if slot is None:
            slot = self._slots[0] if self._current is not self._slots[0] else self._slots[1]
            self._fill(slot, layer)
        assert slot.filled is not None
        try:
            slot.filled.result()
        except BaseException:
            slot.layer = None
            raise
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        self._leave()
        with torch.inference_mode(False), torch.no_grad():
            for place in self._places[layer]:
                view = slot.buffer[place.offset : place.offset + place.empty.numel()].view(place.shape)
                setattr(place.module, place.attribute, nn.Parameter(view, requires_grad=False))
        self._current = slot
        following = (layer + 1) % len(self._places)
        other = self._slots[1] if slot is self._slots[0] else self._slots[0]
        if following not in (slot.layer, other.layer):
            self._fill(other, following)

    def drop(self, layer: int) -> None:
        """Forget the layer's weights: they have to be read again, in another order."""
        for slot in self._slots:
            if slot.layer == layer:
                if slot is self._current:
                    self._leave()
                if slot.filled is not None:
                    slot.filled.result()
                slot.layer = None

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _leave(self) -> None:
        if self._current is not None and self._current.layer is not None:
            for place in self._places[self._current.layer]:
                setattr(place.module, place.attribute, place.empty)
        self._current = None

    def _fill(self, slot: _Slot, layer: int) -> None:
        if slot.filled is not None and not slot.filled.done():
            slot.filled.exception()
        if self._side is not None:
            slot.free = torch.cuda.Event()
            slot.free.record(torch.cuda.current_stream(self.device))
        slot.layer = layer
        slot.filled = self._thread.submit(self._read, slot, layer)

    def _read(self, slot: _Slot, layer: int) -> None:
        down = dict(self._layers[layer].named_modules()).get(self._layout.ffn["down"])  # a pruned layer may have none
        order: Tensor | None = getattr(down, "channel_order", None)
        with torch.no_grad(), torch.cuda.stream(self._side):
            if self._side is not None and slot.free is not None:
                self._side.wait_event(slot.free)
            for place in self._places[layer]:
                view = slot.buffer[place.offset : place.offset + place.empty.numel()].view(place.shape)
                times = self._channel_rows.get(place.local)
                if order is None or times is None:
                    self._ahead.read(place.name, view)
                elif times == 0:
                    self._ahead.read(place.name, view, order=order, axis=1)
                else:
                    rows = torch.cat([order + part * len(order) for part in range(times)])
                    self._ahead.read(place.name, view, order=rows)
            if self._side is not None:
                slot.ready = torch.cuda.Event()
                slot.ready.record(self._side)


def stream(
    config: PreTrainedConfig, paths: Sequence[Path], device: torch.device, dtype: torch.dtype, memory: int
) -> PreTrainedModel:
    """The model of ``config`` over the safetensors files ``paths``, within ``memory`` bytes; its attribute ``layer_stream`` is the
    :class:`LayerStream`. Raises ModelError when files and config do not fit together."""
    files = WeightFiles.open(paths, device, dtype)
    config = files.settle(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layout = layout_of(config)
    apart = {f"{layout.decoder}.embed_tokens", "lm_head"}
    with torch.no_grad():
        for module_name, module in model.named_modules():
            within = module_name.startswith(f"{layout.decoder}.layers.")
            for attribute, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 1 or not (within or module_name in apart):
                    files.check(f"{module_name}.{attribute}", parameter)
                    setattr(module, attribute, nn.Parameter(files.read(f"{module_name}.{attribute}"), requires_grad=False))
    compute_tables(model, device)
    _place_vocabulary(model, files, memory)
    model.layer_stream = layers = LayerStream(model, files)
    for index, layer in enumerate(model.get_submodule(layout.decoder).layers):
        layer.register_forward_pre_hook(_Presence(layers, index))
    model.requires_grad_(False)
    model.train(False)
    streamed: PreTrainedModel = model
    return streamed


def whole(config: PreTrainedConfig, paths: Sequence[Path], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of ``config`` with all its weights on the device, read in pieces: nothing else takes memory on the way, whatever
    dtype the files have. Raises ModelError when files and config do not fit together."""
    files = WeightFiles.open(paths, device, dtype)
    config = files.settle(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tied = bool(config.tie_word_embeddings)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            for attribute, parameter in list(module.named_parameters(recurse=False)):
                name = f"{module_name}.{attribute}"
                if not (tied and name == HEAD):
                    files.check(name, parameter)
                    setattr(module, attribute, nn.Parameter(files.read(name), requires_grad=False))
    if tied:
        model.lm_head.weight = model.get_submodule(layout_of(config).decoder).embed_tokens.weight
    compute_tables(model, device)
    model.train(False)
    loaded: PreTrainedModel = model
    return loaded


def compute_tables(model: PreTrainedModel, device: torch.device) -> None:
    """What a model computes and does not store, anew on ``device``: it was computed on the meta device."""
    path = layout_of(model.config).decoder
    decoder, embeddings = model.get_submodule(path), model.get_submodule(f"{path}.embed_tokens")
    if (rotary := getattr(decoder, "rotary_emb", None)) is not None:
        decoder.rotary_emb = type(rotary)(rotary.config).to(device)
    if (scale := getattr(embeddings, "scalar_embed_scale", None)) is not None:
        embeddings.embed_scale = torch.tensor(scale, device=device)


class _Presence:
    def __init__(self, layers: LayerStream, index: int) -> None:
        self._layers, self._index = layers, index

    def __call__(self, *_: object) -> None:
        self._layers.present(self._index)


def _place_vocabulary(model: PreTrainedModel, files: WeightFiles, memory: int) -> None:
    tied = bool(model.config.tie_word_embeddings)
    path = layout_of(model.config).decoder
    embeddings, module = f"{path}.embed_tokens.weight", model.get_submodule(f"{path}.embed_tokens")
    weight = model.get_parameter(embeddings)
    head_name, head_weight = (embeddings, weight) if tied else (HEAD, model.lm_head.weight)
    files.check(embeddings, weight)
    files.check(head_name, head_weight)
    if head_weight.numel() * files.dtype.itemsize * _HEAD_SHARE <= memory:
        model.lm_head.weight = nn.Parameter(files.read(head_name), requires_grad=False)
        if tied:
            module.weight = model.lm_head.weight
            return
    else:
        model.lm_head = StreamedHead(files, head_name, head_weight, memory // _HEAD_PIECE_SHARE)
    model.get_submodule(path).embed_tokens = StreamedEmbedding(files, embeddings, weight, getattr(module, "embed_scale", None))


def least_memory(layer_bytes: int, device: torch.device) -> int:
    """What streaming a model takes at least: two layers in buffers, as much again to compute with and to cut levels in, and the
    pieces being read."""
    return 6 * layer_bytes + (8 << 20 if device.type == "cpu" else 1 << 28)


class StreamedEmbedding(nn.Module):
    """Rows of the embedding matrix, times ``scale`` () where there is one, read from the files when they are asked for. ``weight``
    only says the shape."""

    def __init__(self, files: WeightFiles, name: str, weight: nn.Parameter, scale: Tensor | None = None) -> None:
        super().__init__()
        self._files, self._name, self._scale = files, name, scale
        self.weight = weight

    def rows(self, tokens: Tensor) -> Tensor:
        """The rows as they are in the files, without the scale."""
        wanted, inverse = torch.unique(tokens, return_inverse=True)
        return self._files.gather(self._name, wanted.tolist())[inverse]

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.rows(tokens)
        return rows if self._scale is None else rows * self._scale.to(rows.dtype)


class StreamedHead(nn.Module):
    """The output head, multiplied a piece of the vocabulary at a time. ``weight`` only says the shape."""

    def __init__(self, files: WeightFiles, name: str, weight: nn.Parameter, piece_bytes: int) -> None:
        super().__init__()
        self._files, self._name = files, name
        self.weight = weight
        self.rows = max(1, min(piece_bytes // (weight.shape[1] * files.dtype.itemsize), weight.shape[0]))
        self._buffer = torch.empty(self.rows, weight.shape[1], dtype=files.dtype, device=files.device)

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first token, rows of the matrix), each valid until the next is asked for."""
        vocabulary = self.weight.shape[0]
        for start in range(0, vocabulary, self.rows):
            yield start, self._files.rows(self._name, start, min(start + self.rows, vocabulary), self._buffer)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.weight.shape[0])
        for start, rows in self.pieces():
            out[..., start : start + rows.shape[0]] = F.linear(x, rows)
        return out
