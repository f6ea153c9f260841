"""The proof of an export: what the pruned model computed in memory, and a fresh process that computes it again from the files.

The reference stays in the folder, listed in the manifest, so that anyone can repeat the comparison at any time. It lies in a folder
of its own, because some loaders take every safetensors file beside config.json for weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfpruner.errors import ExportError
from selfpruner.files.manifest import Verification
from selfpruner.files.scratch import scratch
from selfpruner.files.tensors import TensorFile, held_shapes, write_tensors
from selfpruner.workers.lifeline import tied

REFERENCE = "proof/reference.safetensors"
# 21 positions of two sequences with 49,152 words, four with 256,000; the last ones, because they see all others.
REFERENCE_BYTES = 8 << 20
SEQUENCES, LENGTH = 2, 48
VERIFY_SECONDS = 3600.0
_TEXT = "The quick brown fox jumps over the lazy dog.\n\n1234567890"


def reference_tokens(vocabulary: int, longest: int) -> Tensor:
    """Token ids (2, 48), or as many as the model can read, always the same."""
    length = min(LENGTH, longest)
    return torch.randint(vocabulary, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))


def write_reference(folder: Path, tokens: Tensor, logits: Tensor, *, parameters: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep ``logits`` (B, S, V) for ``tokens`` (B, S), computed in float32, of as many of the last positions as REFERENCE_BYTES
    allow."""
    rows = max(1, min(tokens.shape[1], REFERENCE_BYTES // (4 * logits.shape[0] * logits.shape[-1])))
    facts = {
        "parameters": str(parameters),
        "dtype": "float32",
        "text": _TEXT,
        "ids": json.dumps(tokenizer(_TEXT)["input_ids"]),
    }
    _write(folder, {"tokens": tokens, "logits": logits[:, -rows:].float().contiguous()}, facts)


def copy_reference(source: Path, folder: Path, parameters: int) -> None:
    """Give ``folder``, which has so many ``parameters``, the reference of the checkpoint in ``source``. Raises ExportError where it
    has none to go by."""
    check_reference(source)
    file = TensorFile(source / REFERENCE)
    _write(folder, {name: file.read(name) for name in file.shapes}, {**file.metadata, "parameters": str(parameters)})


def check_reference(folder: Path) -> None:
    """Raises ExportError for a folder of an older version, which kept no reference, or one that rounding makes useless."""
    path = folder / REFERENCE
    if not path.is_file() or TensorFile(path).metadata["dtype"] != "float32":
        raise ExportError(
            f"There is no {REFERENCE} in {folder} to compare with, or one in 16 bits: an older version wrote it. Export it again."
        )


def _write(folder: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    # Not the library's writer, which puts metadata in another order every time: equal references are equal files.
    path = folder / REFERENCE
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, held_shapes(tensors), tensors.__getitem__, facts)


def prove(arguments: Callable[[str], list[str]], device: str, go_on: Callable[[], None]) -> Verification:
    """Run a verifier, ``python *arguments(device)``, in a fresh process and return what it printed, ``problems`` among it.

    Where the device has no room for what is verified, the CPU takes it. Raises what ``go_on`` raises, and ExportError when the
    process takes longer than VERIFY_SECONDS.
    """
    result: Verification = {}
    with scratch(Path(tempfile.gettempdir()), "selfpruner-verify", sweep="selfpruner-verify-") as folder:
        for where in dict.fromkeys((device, "cpu")):
            result = _run(arguments(where), folder, go_on)
            if not result.get("out_of_memory"):
                break
    return result


def _run(arguments: list[str], folder: Path, go_on: Callable[[], None]) -> Verification:
    environment = {
        **os.environ,
        # So that the child finds this package where this process did.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Threads that spin while they wait make this six times slower on a machine that is busy with something else.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    with (folder / "stdout").open("w+") as out, (folder / "stderr").open("w+") as err:
        child = subprocess.Popen(tied(*arguments), stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment)
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
        result: Verification = json.loads(lines[-1])
    except (IndexError, ValueError):
        return {
            "problems": [f"the verifying process ended with code {child.returncode}: {messages.strip()[-2000:] or 'no message'}"]
        }
    return result


def refused(result: Verification) -> Verification:
    """``result`` of a new export's proof, or ExportError with its problems."""
    if result["problems"]:
        raise ExportError(
            f"The written checkpoint does not verify: {'; '.join(result['problems'])}. It was removed; the plans of a search stay "
            "in its database, and `selfpruner export` writes any of them. Where a disk or memory was at fault, another try is "
            "all it takes; where the same figures come again, it is selfpruner: please report them, with the model and its dtype."
        )
    return result
