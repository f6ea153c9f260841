"""One model in a process of its own, run by transformers: the worker behind ``benchmark --backend transformers``.

Tasks are those of :mod:`selfpruner.timing.tasks`. The session's config is ``{model, dtype, compiled}``: ``model`` is a name, a
folder, a checkpoint of selfpruner, or the fields of a config (``{"model_type": ...}``), whose model gets random weights. The same
code reads dense models and checkpoints, so they differ in nothing but their layers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, StaticCache

from selfpruner import models
from selfpruner.errors import OutOfMemoryError
from selfpruner.evaluation import speed
from selfpruner.export.build import shapes_of
from selfpruner.models import checks, saved, streaming
from selfpruner.models.memory import peak_mib
from selfpruner.progress import Cancelled, OnProgress
from selfpruner.timing.model_cost import AttentionCost, ModelCost
from selfpruner.timing.tasks import (
    DecodeRequest,
    DecodeResult,
    LoadRequest,
    LoadResult,
    MemoryRequest,
    MemoryResult,
    PrefillRequest,
    PrefillResult,
    TransformersConfig,
    refuse_larger,
)
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import R, TaskRequest, TaskResult

# Spread of random weights: what initialisers give, far from what denormal numbers would cost.
_SPREAD = 0.02


class TransformersTimer:
    """A :class:`~selfpruner.workers.base.TaskHandler` that holds one model."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._model: PreTrainedModel | None = None
        self._key = ""
        self._compiled: Callable[..., speed.Scored] | None = None
        self._caches: dict[tuple[int, int], StaticCache] = {}
        self._base_mib = 0.0
        self._tasks: dict[type[TaskRequest[TaskResult]], Callable[..., TaskResult]] = {
            LoadRequest: self._facts,
            PrefillRequest: self._prefill,
            DecodeRequest: self._decode,
            MemoryRequest: self._memory,
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
        try:
            memory = request.memory if isinstance(request, LoadRequest) else None
            return request.answered(self._tasks[type(request)](self._held(session, progress, memory), request))
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"{session.config['model']} does not fit beside the other models on {self._device}: {error}. Compare "
                "fewer at once, or shorten the prompt."
            ) from error

    def _held(self, session: Session, progress: Callable[[str], None], memory: int | None) -> PreTrainedModel:
        if self._model is None or self._key != session.key:
            self._base_mib = peak_mib()
            progress("loading")
            config = TransformersConfig.read(session.config)
            self._model = load(config.model, self._device, config.dtype, Path(session.cache), memory)
            self._key = session.key
            if config.compiled:
                self._compiled = torch.compile(self._model.forward, dynamic=False, mode=_mode(self._model.device))
        return self._model

    def _facts(self, model: PreTrainedModel, _: LoadRequest) -> LoadResult:
        name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
        return _described(model, device=name, threads=torch.get_num_threads(), base_mib=self._base_mib)

    def _memory(self, model: PreTrainedModel, _: MemoryRequest) -> MemoryResult:
        if model.device.type == "cuda":
            return MemoryResult(mib=torch.cuda.max_memory_allocated(model.device) / 2**20, of="device")
        return MemoryResult(mib=peak_mib(), of="process")

    def _prefill(self, model: PreTrainedModel, request: PrefillRequest) -> PrefillResult:
        seen = speed.read(model, _prompt(model, request.tokens))
        return PrefillResult(seconds=seen.seconds, first_token=seen.first_token)

    def _decode(self, model: PreTrainedModel, request: DecodeRequest) -> DecodeResult:
        """The prompt is read once; every sequence of the batch gets a copy of its keys and values."""
        batch, prompt, new_tokens = request.batch, request.prompt, request.new_tokens
        ids = _prompt(model, prompt)
        if self._compiled is None:
            seen = speed.read(model, ids)
            with torch.inference_mode():
                seen.cache.batch_repeat_interleave(batch)
            token = seen.token.repeat(batch, 1)
        else:
            # Compiled code holds on to the place of its cache, so the same one serves every repetition.
            if (held := self._caches.get((batch, prompt))) is None or held.get_max_length() < prompt + new_tokens:
                held = self._caches[batch, prompt] = StaticCache(config=model.config, max_cache_len=prompt + new_tokens)
            with torch.inference_mode():
                held.reset()
            seen = speed.read(model, ids.repeat(batch, 1), held)
            token = seen.token
        seconds = speed.write(model, seen.cache, token, new_tokens, self._compiled)
        return DecodeResult(tokens=batch * new_tokens, seconds=seconds)


def load(model: str | Mapping[str, object], device: str, dtype: str, cache: Path, memory: int | None = None) -> PreTrainedModel:
    """The model on the device: of a name, folder or checkpoint, or with random weights from the fields of a config.

    Raises OutOfMemoryError for files that take more than ``memory`` bytes, ModelError and its kin for what cannot be loaded,
    CorruptCheckpointError, ConfigError for an unknown device or dtype.
    """
    target = models.choose_device(device)
    folder, config = _found(model, cache)
    kind = models.choose_dtype(dtype, target, stored=_stored(config))
    if folder is None:
        return random_model(config, target, kind)
    refuse_larger(model, checks.weight_bytes(folder, kind.itemsize)[0], memory)
    with models.quiet():
        return streaming.whole(config, checks.weight_files(folder), target, kind)


def outline(model: str, dtype: str, cache: Path) -> tuple[LoadResult, int]:
    """What ``load`` of this runtime would tell of a model that runs elsewhere, as a server runs it: in ``dtype``, or the one it is
    stored in; and its vocabulary."""
    auto = importlib.import_module("transformers")
    _, config = _found(model, cache)
    kind = models.choose_dtype(_stored(config) or "float32" if dtype == "auto" else dtype, torch.device("cpu"))
    with torch.device("meta"):
        twin = auto.AutoModelForCausalLM.from_config(config, dtype=kind)
    return _described(twin, device="elsewhere", threads=None, base_mib=None), int(config.vocab_size)


def _found(model: str | Mapping[str, object], cache: Path) -> tuple[Path | None, PreTrainedConfig]:
    """Folder and config; no folder for a model of random weights."""
    importlib.import_module("selfpruner.export")  # registers the class of pruned checkpoints
    auto = importlib.import_module("transformers")
    if isinstance(model, Mapping):
        body = dict(model)
        return None, auto.AutoConfig.for_model(body.pop("model_type"), **body)
    folder = Path(model)
    if saved.is_pruned(folder):
        saved.check(folder)
        config = auto.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    else:
        source = models.resolve(model, cache)
        folder, config = source.folder, models.read_config(source)
    files = streaming.WeightFiles.open(checks.weight_files(folder), torch.device("cpu"), torch.float32)
    return folder, files.settle(config)


def _stored(config: PreTrainedConfig) -> str | None:
    return None if config.dtype is None else str(config.dtype).removeprefix("torch.")


def _described(model: PreTrainedModel, *, device: str, threads: int | None, base_mib: float | None) -> LoadResult:
    return LoadResult(
        work=work_of(model),
        limit=int(model.config.max_position_embeddings),
        device=device,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=threads,
        base_mib=base_mib,
    )


@torch.no_grad()
def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape with random matrices and norms of one; nothing but the model itself takes memory."""
    auto = importlib.import_module("transformers")
    with torch.device("meta"):
        model: PreTrainedModel = auto.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, _SPREAD)
    decoder = model.model
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)  # its table is computed, not stored
    model.train(False)
    return model


def work_of(model: PreTrainedModel) -> ModelCost:
    """Count a model's matrices and bytes; its modules may be on the meta device."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    looked_up = {
        id(module.weight): module.weight.nbytes
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not head.weight
    }
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return ModelCost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matrices=sum(module.weight.numel() for module in linear),
        head=head.weight.numel(),
        weight_bytes=weight_bytes,
        step_bytes=weight_bytes - sum(looked_up.values()),
        attention=_attention(model.config, model.dtype.itemsize),
    )


def _attention(config: PreTrainedConfig, itemsize: int) -> tuple[AttentionCost, ...]:
    # Families without layer types have one kind of layer.
    only = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [only] * config.num_hidden_layers
    found = []
    for kind, layer, shape in zip(kinds, config.per_layer_config, shapes_of(config), strict=True):
        width = int(getattr(layer, "head_dim", None) or (layer.hidden_size // shape.heads if shape.heads else 0))
        window = layer.sliding_window if kind == "sliding_attention" else None
        found.append(AttentionCost(shape.heads * width, 2 * shape.kv_groups * width * itemsize, window))
    return tuple(found)


def _prompt(model: PreTrainedModel, tokens: int) -> Tensor:
    """Some tokens, the same for every model of a vocabulary: what a token is does not change what it costs."""
    size = int(model.config.vocab_size)
    draw = torch.randint(size, (1, tokens), generator=torch.Generator().manual_seed(0))
    return draw.to(model.device)


def _mode(device: torch.device) -> str | None:
    """On a GPU kernels are recorded once and replayed, else launching them is all that a step takes."""
    return "reduce-overhead" if device.type == "cuda" else None
