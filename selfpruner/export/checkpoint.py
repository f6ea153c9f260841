"""Write a pruned model as a folder, prove that it loads, and only then show it; read such a folder back.

    model*.safetensors (+ index), config.json, generation_config.json, tokenizer files, README.md, plan.json, units.json (what
    structured pruning kept), modeling_selfpruner*.py (only when layers differ), proof/reference.safetensors, manifest.json

:mod:`selfpruner.export.folder` says how the folder is written, :mod:`selfpruner.export.proof` how it is proven.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from selfpruner.errors import CancelledTaskError, ExportError, ModelError
from selfpruner.export import proof, verify_streamed
from selfpruner.export import verify as verify_script
from selfpruner.export.build import build, count_parameters, expected_parameters, plain_config, shapes_of
from selfpruner.export.card import model_card, plan, with_terms
from selfpruner.export.folder import Exported, write_folder
from selfpruner.export.modeling_files import modeling_file_of
from selfpruner.export.older import save_tokenizer, with_older_fields
from selfpruner.files import manifest
from selfpruner.files.card_info import CardInfo
from selfpruner.files.manifest import Verification
from selfpruner.files.tensors import held_shapes, write_tensors
from selfpruner.models import LoadedModel, ModelSource, quiet, saved
from selfpruner.models.checks import stored_dtype, weight_bytes, weight_files
from selfpruner.models.loading import RESIDENT_FACTOR, check_ceiling
from selfpruner.models.streaming import WeightFiles, stream
from selfpruner.progress import OnProgress
from selfpruner.pruning.layer_shapes import KeptUnits, LayerShape

SHARD_BYTES = 5_000_000_000
# Terms that travel with the weights.
LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where the weights of a model that is nowhere whole come from.

    ``tensor`` gives one by name, as runs of its rows; ``logits`` what the pruned model computes in float32 for token ids (B, S), on
    the CPU;
    ``memory`` bytes may be used on ``device`` to look at the result; None: it may be loaded whole.
    """

    tensor: Callable[[str], Iterable[Tensor]]
    logits: Callable[[Tensor], Tensor]
    memory: int | None
    device: torch.device


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base_source_folder: Path | None,
    directory: Path,
    card: CardInfo,
    *,
    units: KeptUnits | None = None,
    shard_bytes: int = SHARD_BYTES,
    source: TensorSource | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: OnProgress = lambda _: None,
) -> Exported:
    """Write ``model`` (made by :func:`selfpruner.export.build.build`) to ``directory``, verified.

    With a ``source`` the model may be an outline without weights: they are written, and looked at afterwards, one by one.
    ``base_source_folder`` is where the base model's licence is taken from, if it is a folder; ``units`` say which of its units
    were kept, for formats that put them back into their places. ``cancelled`` is polled between files and while the verification
    runs. A complete checkpoint of the same plan in ``directory`` is kept; an incomplete or corrupt one is replaced.

    Raises ExportError when the result does not verify or ``directory`` holds something else, DiskFullError, and
    CancelledTaskError. None of them leaves anything behind.
    """
    go_on = stopper(cancelled)
    parameters = count_parameters(model)
    shapes = shapes_of(model.config)
    dtype = str(model.dtype).removeprefix("torch.")
    facts = plan(card, shapes, family=model.config.base_model_type, dtype=dtype, parameters=parameters)
    if parameters != (expected := expected_parameters(model.config)):
        raise ExportError(f"The pruned model has {parameters:,} parameters, but its plan gives {expected:,}.")
    terms = base_source_folder if base_source_folder and base_source_folder.is_dir() else None

    def fill(folder: Path) -> int:
        _write_config(model, folder, with_terms(card, terms), shapes, parameters)
        write_json(folder / "plan.json", facts)
        if units is not None:
            (folder / "units.json").write_text(json.dumps(units.to_dict()) + "\n", "utf-8")
        save_tokenizer(tokenizer, folder)
        copy_terms(terms, folder)
        write_shards(stored(model), folder, parameters, shard_bytes, None if source is None else source.tensor, go_on)
        tokens = proof.reference_tokens(model.config.vocab_size, int(model.config.max_position_embeddings))
        logits = source.logits(tokens) if source is not None else _logits(model, tokens)
        proof.write_reference(folder, tokens, logits, parameters=parameters, tokenizer=tokenizer)
        return parameters

    def prove(folder: Path) -> Verification:
        memory = None if source is None else source.memory
        device = model.device if source is None else source.device
        return proof.refused(
            proof.prove(lambda place: verifier(folder, folder / proof.REFERENCE, place, memory), str(device), go_on)
        )

    return write_folder(
        directory, plan=facts, export={"format": "transformers"}, fill=fill, prove=prove, go_on=go_on, progress=progress
    )


def stopper(cancelled: Callable[[], bool]) -> Callable[[], None]:
    """A function that raises CancelledTaskError once ``cancelled`` says so."""

    def go_on() -> None:
        if cancelled():
            raise CancelledTaskError("The export was cancelled; nothing was written.")

    return go_on


def verifier(folder: Path, reference: Path, device: str, memory: int | None = None, *, own_code: bool = True) -> list[str]:
    """Arguments of the process that proves a folder that transformers loads.

    ``own_code``: load it with the code in the folder, as a stranger does; else with the installed selfpruner's. With ``memory``, in
    bytes, it is streamed from its files instead of loaded: see :mod:`selfpruner.export.verify_streamed`.
    """
    if memory is not None:
        how = ["-m", verify_streamed.__name__, str(folder), str(reference), "--memory", str(memory)]
    else:
        # -P: the script's own folder, full of selfpruner's modules, stays off the import path.
        how = ["-P", str(verify_script.__file__), str(folder), str(reference), *([] if own_code else ["--installed"])]
    return [*how, "--device", device]


def load(
    directory: Path | str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | Literal["auto"] = "auto",
    check: bool = True,
) -> PreTrainedModel:
    """The model of a checkpoint, or of what was saved of one after further training, with no code from the folder. ``check`` first
    reads every file and compares its sha256.

    Raises ExportError when the folder is incomplete, CorruptCheckpointError naming the file that does not match, and, for what no
    export wrote, ModelError when its weights are not those that its config.json means.
    """
    folder = Path(directory)
    if check or saved.is_saved(folder):
        saved.check(folder)
    else:
        manifest.read(folder)
    local = {"trust_remote_code": False, "local_files_only": True}
    how: dict[str, object] = {**local, "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            if saved.is_saved(folder):  # training may have made a tied head another matrix
                files = WeightFiles.open(weight_files(folder), torch.device("cpu"), torch.float32)
                how["config"] = files.settle(AutoConfig.from_pretrained(folder, **local))
            # A pair, which its type does not say.
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **how)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise saved.not_whole(folder, str(error)) from error
    model, report = loaded
    if wrong := [f"{kind.replace('_', ' ')} {', '.join(sorted(map(str, names))[:3])}" for kind, names in report.items() if names]:
        raise saved.not_whole(folder, "; ".join(wrong))
    model.to(device)
    model.train(False)
    found: PreTrainedModel = model
    return found


def opened(
    folder: Path, device: torch.device, dtype: torch.dtype | Literal["auto"] = "auto", memory: int | None = None
) -> LoadedModel:
    """What :func:`load` gives with its tokenizer, as models are handed on; streamed from its files where it is larger than
    ``memory`` bytes. Raises as that, ModelError without a tokenizer, and ConfigError for a ceiling too low to stream."""
    kind = getattr(torch, stored_dtype(folder)) if dtype == "auto" else dtype
    streamed = memory is not None and weight_bytes(folder, kind.itemsize)[0] * RESIDENT_FACTOR > memory
    model = _streamed(folder, device, kind, memory or 0) if streamed else load(folder, device=str(device), dtype=dtype)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{folder} has no tokenizer that loads ({reason}). Save it there, too: tokenizer.save_pretrained.", param="model"
        ) from error
    config = model.config.to_dict()
    source = ModelSource(folder, str(folder), saved.fingerprint(folder), str(model.config.model_type), config)
    return LoadedModel(model, tokenizer, source, model.dtype, memory, streamed)


def _streamed(folder: Path, device: torch.device, dtype: torch.dtype, memory: int) -> PreTrainedModel:
    saved.check(folder)
    check_ceiling(str(folder), memory, weight_bytes(folder, dtype.itemsize)[1], device)
    with quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return stream(config, weight_files(folder), device, dtype, memory)


# -- the files ---------------------------------------------------------------------------------------------------------
def _write_config(model: PreTrainedModel, folder: Path, card: CardInfo, shapes: list[LayerShape], parameters: int) -> None:
    plain = plain_config(model)
    body = model.config.to_diff_dict() if plain is None else with_older_fields(plain.to_diff_dict())
    body["dtype"] = str(model.dtype).removeprefix("torch.")
    if plain is None:
        form = modeling_file_of(model.config)
        body["architectures"] = [form.causal_lm.__name__]
        body["auto_map"] = form.auto_map
        shutil.copyfile(form.code, folder / form.code.name)
    write_json(folder / "config.json", body)
    if model.generation_config is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")
    text = model_card(card, shapes, parameters=parameters, config=body)
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_json(path: Path, body: Mapping[str, object]) -> None:
    path.write_text(json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that go into the files: all but a tied head."""
    tensors: dict[str, Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def write_shards(
    tensors: Mapping[str, Tensor],
    folder: Path,
    parameters: int,
    shard_bytes: int,
    source: Callable[[str], Tensor | Iterable[Tensor]] | None,
    go_on: Callable[[], None],
) -> None:
    """Write ``tensors`` in their order into files of at most ``shard_bytes`` (or one tensor), and the index of several. With a
    ``source``, which is asked for one after the other, they may be on the meta device."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        go_on()
        get = tensors.__getitem__ if source is None else source
        write_tensors(folder / file, held_shapes({name: tensors[name] for name in names}), get, {"format": "pt"})
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": size, "total_parameters": parameters}, "weight_map": weight_map},
        )


def copy_terms(source: Path | None, folder: Path) -> None:
    for pattern in LEGAL if source else ():
        for path in source.glob(pattern):  # type: ignore[union-attr]
            shutil.copyfile(path, folder / path.name)


@torch.inference_mode()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with verify_script.exact(model):
        logits: Tensor = model(tokens.to(model.device), use_cache=False).logits
    return logits.cpu()


__all__ = ["CardInfo", "Exported", "LayerShape", "build", "count_parameters", "load", "write"]
