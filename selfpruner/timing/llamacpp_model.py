"""One GGUF file in a process of its own, run by llama.cpp: the worker behind ``benchmark --backend llamacpp``.

Tasks are those of :mod:`selfpruner.timing.tasks`. The session's config is ``{model, sequences, context}``: a file, how
many sequences there is room for, and of how many tokens, each with its own keys and values. It needs the package llama-cpp-python,
whose low-level functions are llama.cpp's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Collection, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selfpruner import models
from selfpruner.catalogue import EMBEDDED_MODELS
from selfpruner.errors import BenchmarkError, ConfigError, ModelError
from selfpruner.models.memory import peak_mib
from selfpruner.progress import Cancelled, OnProgress
from selfpruner.timing.model_cost import AttentionCost, ModelCost
from selfpruner.timing.tasks import (
    DecodeRequest,
    DecodeResult,
    GgufConfig,
    LoadRequest,
    LoadResult,
    MemoryRequest,
    MemoryResult,
    PrefillRequest,
    PrefillResult,
    refuse_larger,
)
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import R, TaskRequest, TaskResult

if TYPE_CHECKING:
    from gguf import GGUFReader

PACKAGE = "llama_cpp"
# llama.cpp keeps keys and values in float16 unless told otherwise.
_CACHE_ITEMSIZE = 2


def file_of(name: str) -> Path:
    """The GGUF file behind a name: the file itself, the only one of a folder, or that of an embedded model.

    Raises BenchmarkError where llama-cpp-python is not installed, ConfigError for a name without such a file.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise BenchmarkError(
            "llama-cpp-python is not installed here. Install it (it compiles for minutes), or use --backend transformers.",
            code="backend_missing",
            param="backend",
        )
    path = models.embedded_file(name) if name in EMBEDDED_MODELS else Path(name).expanduser()
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.suffix == ".gguf" and path.is_file() else []
    if len(files) != 1:
        raise ConfigError(
            f"{name} holds {len(files)} GGUF files; llama.cpp needs one. Give a .gguf file, or a folder with a single one.",
            param="models",
        )
    return files[0].resolve()


class LlamaCppTimer:
    """A :class:`~selfpruner.workers.base.TaskHandler` that holds one file and one context."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._key = ""
        self._read: dict[int, int] = {}  # sequence: tokens of the prompt it holds
        self._tasks: dict[type[TaskRequest[TaskResult]], Callable[..., TaskResult]] = {
            LoadRequest: lambda _: self._facts,
            PrefillRequest: self._prefill,
            DecodeRequest: self._decode,
            MemoryRequest: lambda _: MemoryResult(mib=peak_mib(), of="process"),
        }

    @property
    def requests(self) -> Collection[type[TaskRequest[TaskResult]]]:
        return self._tasks

    def handle(
        self,
        session: Session,
        request: TaskRequest[R],
        progress: OnProgress,
        cancelled: Cancelled,  # noqa: ARG002 - a task is over in seconds
    ) -> R:
        if self._key != session.key:
            progress("loading")
            path = Path(GgufConfig.read(session.config).model)
            refuse_larger(path, path.stat().st_size, request.memory if isinstance(request, LoadRequest) else None)
            self._load(session)
        return request.answered(self._tasks[type(request)](request))

    def _load(self, session: Session) -> None:
        base = peak_mib()
        self._lib = importlib.import_module("llama_cpp.llama_cpp")
        config = GgufConfig.read(session.config)
        path, sequences, context = config.model, config.sequences, config.context
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        self._lib.llama_backend_init()
        how = self._lib.llama_model_default_params()
        how.n_gpu_layers = 0 if self._device == "cpu" else -1
        model = self._lib.llama_model_load_from_file(path.encode(), how)
        if not model:
            raise ModelError(f"llama.cpp cannot load {path}: its log is above. Export it again.", param="models")
        how = self._lib.llama_context_default_params()
        how.n_seq_max, how.n_ctx = sequences, sequences * context
        how.n_batch = context
        how.n_threads = how.n_threads_batch = threads
        how.no_perf = True
        self._context = self._lib.llama_init_from_model(model, how)
        if not self._context:
            raise BenchmarkError(f"llama.cpp has no room for {sequences} sequences of {context} tokens of {path}.")
        self._memory = self._lib.llama_get_memory(self._context)
        self._vocabulary = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(model)))
        self._batch = self._lib.llama_batch_init(max(context, sequences), 0, 1)
        work, kind = work_of(Path(path))
        self._facts = LoadResult(
            work=work,
            limit=int(self._lib.llama_model_n_ctx_train(model)),
            device=self._device,
            dtype=kind,
            threads=threads,
            base_mib=base,
        )
        self._key = session.key

    def _prefill(self, request: PrefillRequest) -> PrefillResult:
        tokens = request.tokens
        self._forget(0, 0)
        self._fill(_prompt(self._vocabulary, tokens), range(tokens), [0] * tokens, wanted=(tokens - 1,))
        started = time.perf_counter()
        self._run()
        seconds = time.perf_counter() - started
        self._best(tokens - 1)
        self._read[0] = tokens
        return PrefillResult(seconds=seconds, first_token=time.perf_counter() - started)

    def _decode(self, request: DecodeRequest) -> DecodeResult:
        batch, prompt, new_tokens = request.batch, request.prompt, request.new_tokens
        ids = _prompt(self._vocabulary, prompt)
        for sequence in range(batch):
            if self._read.get(sequence) == prompt:
                self._forget(sequence, prompt)
                continue
            self._forget(sequence, 0)
            self._fill(ids, range(prompt), [sequence] * prompt, wanted=(prompt - 1,))
            self._run()
            self._read[sequence] = prompt
        tokens, sequences = [ids[-1]] * batch, list(range(batch))
        started = time.perf_counter()
        for position in range(prompt, prompt + new_tokens):
            self._fill(tokens, [position] * batch, sequences, wanted=sequences)
            self._run()
            tokens = [self._best(place) for place in sequences]
        return DecodeResult(tokens=batch * new_tokens, seconds=time.perf_counter() - started)

    def _fill(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], *, wanted: Sequence[int]) -> None:
        """Put tokens into the batch; logits are computed at the places ``wanted``."""
        self._batch.n_tokens = len(tokens)
        for place, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            self._batch.token[place] = token
            self._batch.pos[place] = position
            self._batch.n_seq_id[place] = 1
            self._batch.seq_id[place][0] = sequence
            self._batch.logits[place] = 0
        for place in wanted:
            self._batch.logits[place] = 1

    def _run(self) -> None:
        code = self._lib.llama_decode(self._context, self._batch)
        if code:
            raise BenchmarkError(f"llama.cpp gave up with code {code}. Use a shorter prompt or fewer new tokens.")
        self._lib.llama_synchronize(self._context)

    def _best(self, place: int) -> int:
        row = self._lib.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(row, (self._vocabulary,)).argmax())

    def _forget(self, sequence: int, start: int) -> None:
        """Drop what a sequence holds from position ``start`` on."""
        self._lib.llama_memory_seq_rm(self._memory, sequence, start, -1)


def work_of(path: Path) -> tuple[ModelCost, str]:
    """Count a file's matrices and bytes, as stored; with the name of the type that holds most of its bytes. Sliding windows are
    not looked at."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    total = sum(int(tensor.n_bytes) for tensor in tensors.values())
    held: dict[str, int] = {}
    for tensor in tensors.values():
        held[tensor.tensor_type.name] = held.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    work = ModelCost(
        parameters=sum(int(tensor.n_elements) for tensor in tensors.values()),
        matrices=sum(int(t.n_elements) for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2),
        head=prod(int(size) for size in head.shape),
        weight_bytes=total,
        step_bytes=total - (int(tensors["token_embd.weight"].n_bytes) if "output.weight" in tensors else 0),
        attention=_attention(reader),
    )
    return work, max(held, key=held.__getitem__).lower()


def _attention(reader: GGUFReader) -> tuple[AttentionCost, ...]:
    kind = reader.fields["general.architecture"].contents()

    def numbers(key: str) -> list[int]:
        """One for all layers or one for each; none where the file does not say."""
        field = reader.fields.get(f"{kind}.{key}")
        found = [] if field is None else field.contents()
        return [int(number) for number in found] if isinstance(found, list) else [int(found)]

    (layers,) = numbers("block_count")
    heads = numbers("attention.head_count")
    groups = numbers("attention.head_count_kv") or heads
    heads, groups = (each * layers if len(each) == 1 else each for each in (heads, groups))
    (width,) = numbers("attention.key_length") or [numbers("embedding_length")[0] // max(heads)]
    (depth,) = numbers("attention.value_length") or [width]
    return tuple(
        AttentionCost(h * (width + depth) // 2, g * (width + depth) * _CACHE_ITEMSIZE) for h, g in zip(heads, groups, strict=True)
    )


def _prompt(vocabulary: int, tokens: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(vocabulary, size=tokens)]
