"""Write a pruned model as a folder, prove that it loads, and only then show it; read such a folder back.

    model*.safetensors (+ index), config.json, generation_config.json, tokenizer files, README.md, plan.json,
    modeling_selfpruner*.py (only when layers differ), manifest.json

The folder is written beside its place under a name that begins with ``.tmp-``, verified there by :mod:`selfpruner.export.verify`
in a fresh process, and renamed into place after its manifest. A killed writer therefore leaves nothing visible, and the next
one sweeps up what it left.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import AutoConfig, AutoModelForCausalLM

from selfpruner import manifest
from selfpruner.errors import CancelledTaskError, CorruptCheckpointError, ExportError, SelfprunerError, disk_errors
from selfpruner.export import verify as verify_script
from selfpruner.export import verify_streamed
from selfpruner.export.build import build, count_parameters, expected_parameters, plain_config, shapes_of
from selfpruner.export.card import CardInfo, model_card, plan
from selfpruner.export.forms import form_of
from selfpruner.export.shape import LayerShape
from selfpruner.tensor_files import held_shapes, write_tensors

SHARD_BYTES = 5_000_000_000
VERIFY_SECONDS = 3600.0
# Terms that travel with the weights.
_LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_TEXT = "The quick brown fox jumps over the lazy dog.\n\n1234567890"


@dataclass(frozen=True, slots=True)
class ExportResult:
    """A complete, verified checkpoint. ``reused``: it was there already, with the same plan."""

    path: Path
    parameters: int
    bytes: int
    manifest_sha256: str
    verification: dict[str, Any]
    write_seconds: float = 0.0
    verify_seconds: float = 0.0
    reused: bool = False


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where the weights of a model that is nowhere whole come from.

    ``tensor`` gives one by name, as runs of its rows; ``logits`` what the pruned model computes for token ids (B, S), on the CPU;
    ``memory`` bytes may be used on ``device`` to look at the result.
    """

    tensor: Callable[[str], Iterable[Tensor]]
    logits: Callable[[Tensor], Tensor]
    memory: int
    device: torch.device


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base_source_folder: Path | None,
    directory: Path,
    card: CardInfo,
    *,
    shard_bytes: int = SHARD_BYTES,
    source: TensorSource | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> ExportResult:
    """Write ``model`` (made by :func:`selfpruner.export.build.build`) to ``directory``, verified.

    With a ``source`` the model may be an outline without weights: they are written, and looked at afterwards, one by one.
    ``base_source_folder`` is where the base model's licence files are taken from, if it is a folder. ``cancelled`` is
    polled between files and while the verification runs. A complete checkpoint of the same plan in ``directory`` is kept; an
    incomplete or corrupt one is replaced.

    Raises ExportError when the result does not verify or ``directory`` holds something else, DiskFullError, and
    CancelledTaskError. None of them leaves anything behind.
    """

    def go_on() -> None:
        if cancelled():
            raise CancelledTaskError("The export was cancelled; nothing was written.")

    directory = Path(os.path.abspath(directory))
    parameters = count_parameters(model)
    shapes = shapes_of(model.config)
    dtype = str(model.dtype).removeprefix("torch.")
    facts = plan(card, shapes, family=model.config.base_model_type, dtype=dtype, parameters=parameters)
    if parameters != (expected := expected_parameters(model.config)):
        raise ExportError(f"The pruned model has {parameters:,} parameters, but its plan gives {expected:,}.")
    if kept := _existing(directory, facts, go_on):
        return kept
    with _export_errors(directory), disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _sweep(directory.parent)
        temporary = directory.parent / f".tmp-{directory.name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
        try:
            started = time.perf_counter()
            _write_config(model, temporary, card, shapes, parameters)
            _write_json(temporary / "plan.json", facts)
            tokenizer.save_pretrained(temporary)
            for pattern in _LEGAL if base_source_folder and base_source_folder.is_dir() else ():
                for path in base_source_folder.glob(pattern):  # type: ignore[union-attr]
                    shutil.copyfile(path, temporary / path.name)
            size = _write_shards(model, temporary, shard_bytes, source, go_on)
            for path in temporary.rglob("*"):
                manifest.sync(path)
            written = time.perf_counter()
            verification = _verify(model, tokenizer, temporary, parameters, source, go_on)
            verified = time.perf_counter()
            digest = manifest.write(temporary, plan=facts, parameters=parameters, verification=verification)
            _into_place(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return ExportResult(
        directory, parameters, size, digest, verification, round(written - started, 2), round(verified - written, 2)
    )


def load(
    directory: Path | str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | Literal["auto"] = "auto",
    check: bool = True,
) -> PreTrainedModel:
    """The model of a checkpoint, with no code from the folder. ``check`` first reads every file and compares its sha256.

    Raises ExportError when the folder is incomplete and CorruptCheckpointError naming the file that does not match.
    """
    folder = Path(directory)
    if check:
        manifest.check(folder)
    else:
        manifest.read(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
    )
    model.to(device)  # type: ignore[arg-type]
    model.train(False)
    return model


def verify(directory: Path | str) -> dict[str, Any]:
    """Check a checkpoint on disk without loading it: sha256 of every file, and tensor names and shapes against its config.

    Returns ``{path, parameters, files, bytes, plan, verification}``. Raises as :func:`load`.
    """
    folder = Path(directory)
    body = manifest.check(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config)
    wanted = {name: list(tensor.shape) for name, tensor in _stored(twin).items()}
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    if found != wanted:
        name = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise CorruptCheckpointError(
            f"{folder}: {name} has shape {found.get(name)} but config.json asks for {wanted.get(name)}. Export it again."
        )
    return {
        "path": str(folder),
        "parameters": body["parameters"],
        "files": len(body["files"]),
        "bytes": sum(entry["bytes"] for entry in body["files"].values()),
        "plan": body["plan"],
        "verification": body["verification"],
    }


# -- what is there already ---------------------------------------------------------------------------------------------
def _existing(directory: Path, facts: dict[str, Any], go_on: Callable[[], None]) -> ExportResult | None:
    """The complete checkpoint in ``directory`` if its plan is ``facts``; None when the place is free or may be overwritten."""
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file; choose a folder for the checkpoint.")
    try:
        body = manifest.check(directory, go_on)
    except ExportError as error:
        if any(directory.iterdir()) and not (directory / "plan.json").is_file():
            raise ExportError(f"{directory} is not empty and no checkpoint of selfpruner; choose another folder.") from error
        return None
    if body["plan"] != facts:
        raise ExportError(f"{directory} already holds a checkpoint of another plan; choose another folder or remove it.")
    size = sum(entry["bytes"] for name, entry in body["files"].items() if name.endswith(".safetensors"))
    digest = manifest.sha256(directory / manifest.NAME)
    return ExportResult(directory, body["parameters"], size, digest, body["verification"], reused=True)


def _sweep(parent: Path) -> None:
    """Remove what killed writers on this machine left in ``parent``."""
    for path in parent.glob(".tmp-*"):
        *_, host, pid, token = ["", "", *path.name.rsplit("-", 2)]
        # The host name may itself contain dashes, so it is compared as the end of what is left.
        if len(token) == 8 and pid.isdecimal() and host.endswith(f"-{socket.gethostname()}") and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _into_place(temporary: Path, directory: Path) -> None:
    if directory.exists():
        old = temporary.with_name(temporary.name[:-8] + secrets.token_hex(4))
        directory.rename(old)
        temporary.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(directory)
    manifest.sync(directory.parent)


# -- the files ---------------------------------------------------------------------------------------------------------
def _write_config(model: PreTrainedModel, folder: Path, card: CardInfo, shapes: list[LayerShape], parameters: int) -> None:
    plain = plain_config(model)
    config = plain or model.config
    body = config.to_diff_dict()
    body["dtype"] = str(model.dtype).removeprefix("torch.")
    if plain is None:
        form = form_of(model.config)
        body["architectures"] = [form.causal_lm.__name__]
        body["auto_map"] = form.auto_map
        shutil.copyfile(form.code, folder / form.code.name)
    _write_json(folder / "config.json", body)
    if model.generation_config is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")
    text = model_card(card, shapes, parameters=parameters, code=None if plain else form_of(model.config).code.name)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that go into the files: all but a tied head."""
    tensors: dict[str, Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def _write_shards(
    model: PreTrainedModel, folder: Path, shard_bytes: int, source: TensorSource | None, go_on: Callable[[], None]
) -> int:
    """Write the tensors in the model's order into files of at most ``shard_bytes`` (or one tensor); returns their bytes."""
    tensors = _stored(model)
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
        get = tensors.__getitem__ if source is None else source.tensor
        write_tensors(folder / file, held_shapes({name: tensors[name] for name in names}), get, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": size, "total_parameters": count_parameters(model)}, "weight_map": weight_map},
        )
    return size


# -- the proof ---------------------------------------------------------------------------------------------------------
def _verify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    parameters: int,
    source: TensorSource | None,
    go_on: Callable[[], None],
) -> dict[str, Any]:
    """Run :mod:`selfpruner.export.verify` on ``folder`` in a fresh process and return its findings, or raise ExportError.

    A checkpoint that need not fit into memory is streamed there, see :mod:`selfpruner.export.verify_streamed`.
    """
    length = min(48, int(model.config.max_position_embeddings))
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    if source is None:
        with torch.inference_mode():
            logits = model(tokens.to(model.device), use_cache=False).logits.float().cpu()
    else:
        logits = source.logits(tokens)
    facts = {"parameters": str(parameters), "text": _TEXT, "ids": json.dumps(tokenizer(_TEXT)["input_ids"])}
    with tempfile.TemporaryDirectory(prefix="selfpruner-verify-") as scratch:
        reference = Path(scratch) / "reference.safetensors"
        save_file({"tokens": tokens, "logits": logits}, reference, metadata=facts)
        if source is not None:
            command = ["-m", verify_streamed.__name__, str(folder), str(reference), "--memory", str(source.memory)]
            result = _run([*command, "--device", str(source.device)], Path(scratch), go_on, PYTHONPATH=_import_path())
        else:
            for device in dict.fromkeys((str(model.device), "cpu")):
                # -P: the script's own folder, full of selfpruner's modules, stays off the import path.
                command = ["-P", str(verify_script.__file__), str(folder), str(reference), "--device", device]
                result = _run(command, Path(scratch), go_on)
                # The device holds the base model already; the checkpoint can prove itself on the CPU as well.
                if not result.get("out_of_memory"):
                    break
    if result["problems"]:
        raise ExportError(
            f"The written checkpoint does not verify: {'; '.join(result['problems'])}. It was removed; export it again, "
            "and report this if it happens twice."
        )
    return result


def _import_path() -> str:
    """PYTHONPATH by which a child finds this package as this process did."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))


def _run(arguments: list[str], scratch: Path, go_on: Callable[[], None], **variables: str) -> dict[str, Any]:
    command = [sys.executable, *arguments]
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        **variables,
        # Threads that spin while they wait make this six times slower on a machine that is busy with something else.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    with (scratch / "stdout").open("w+") as out, (scratch / "stderr").open("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment)
        try:
            deadline = time.monotonic() + VERIFY_SECONDS
            while child.poll() is None:
                go_on()
                if time.monotonic() > deadline:
                    raise ExportError(f"The verification did not finish in {VERIFY_SECONDS:g} s; nothing was kept. Export again.")
                time.sleep(0.05)
        finally:
            child.kill()
            child.wait()
        out.seek(0)
        err.seek(0)
        lines, messages = out.read().splitlines(), err.read()
    try:
        result: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        return {
            "problems": [f"the verifying process ended with code {child.returncode}: {messages.strip()[-2000:] or 'no message'}"]
        }
    return result


@contextmanager
def _export_errors(directory: Path) -> Iterator[None]:
    """Turn what the operating system or a library raises under this block into ExportError."""
    try:
        yield
    except SelfprunerError:
        raise
    except Exception as error:
        raise ExportError(f"The checkpoint could not be written to {directory}: {error}") from error


__all__ = ["CardInfo", "ExportResult", "LayerShape", "build", "count_parameters", "load", "verify", "write"]
