"""llama.cpp, where the package llama-cpp-python is installed: its quantiser, and running a GGUF file.

    python -m selfpruner.export.gguf_runtime SOURCE TARGET FILE_TYPE

quantises in a process of its own, because a failed assertion in llama.cpp ends the process. It prints one JSON object with
``problems``.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from selfpruner.errors import ExportError
from selfpruner.export import proof

_FLOAT32 = 0  # GGML_TYPE_F32


def installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def quantize(source: Path, target: Path, file_type: int, go_on: Callable[[], None]) -> None:
    """Write ``source`` anew as ``target`` in llama.cpp's ``file_type``. ``go_on`` is polled and may raise. Raises ExportError."""
    made = proof.prove(lambda _: ["-m", __name__, str(source), str(target), str(int(file_type))], "cpu", go_on)
    if made["problems"]:
        raise ExportError(f"llama.cpp could not quantise the model: {'; '.join(made['problems'])}")


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU, with a float32 KV cache, so that rounding is the file's own."""

    def __init__(self, path: Path, context: int, *, flash_attention: bool = False) -> None:
        llama_cpp = importlib.import_module("llama_cpp")
        self.version = str(llama_cpp.__version__)
        self._model = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_gpu_layers=0,
            n_threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            type_k=_FLOAT32,
            type_v=_FLOAT32,
            flash_attn=flash_attention,
            logits_all=True,
            verbose=False,
        )

    def close(self) -> None:
        self._model.close()

    def logits(self, tokens: Sequence[int]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """(S, V) float32 after each of ``tokens``, from an empty cache."""
        self._model.reset()
        self._model.eval(tokens)
        return np.array(self._model.scores[: len(tokens)])

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The ``count`` most likely tokens one after the other, each through the cache, never stopping early."""
        last = self.logits(tokens)[-1]
        written = [int(last.argmax())]
        while len(written) < count:
            self._model.eval(written[-1:])
            written.append(int(self._model.scores[len(tokens) + len(written) - 1].argmax()))
        return written

    def tokenize(self, text: str) -> list[int]:
        """As :func:`selfpruner.export.gguf_tokenizer.encode`, by llama.cpp itself."""
        return list(self._model.tokenize(text.encode(), add_bos=True, special=False))


def _quantize(source: str, target: str, file_type: int) -> int:
    llama_cpp = importlib.import_module("llama_cpp")
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    # From bfloat16 and float32, which is not a second rounding.
    parameters.allow_requantize = True
    code = int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))
    print(json.dumps({"problems": [f"llama_model_quantize returned {code}"] if code else []}))
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("file_type", type=int)
    options = parser.parse_args()
    return _quantize(options.source, options.target, options.file_type)


if __name__ == "__main__":
    sys.exit(main())
