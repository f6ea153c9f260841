"""What an export format is, and the finished checkpoint that it starts from.

A format takes a verified checkpoint folder (what :func:`selfpruner.export.checkpoint.write` made) and writes its own files into
another folder. Everything around that is the same for all formats and done by :mod:`selfpruner.export.formats`, in this order:

1. ``Checkpoint.open`` reads every file of the source and compares its sha256.
2. ``format.check(checkpoint, quantize)`` refuses, before any work, what the format's runtime cannot take.
3. A folder is made aside; into it go the source's plan.json, licence files and a README.md whose section "Use" is
   ``format.use(checkpoint, quantize)``; ``format.write(checkpoint, folder, quantize, go_on)`` adds its files; then comes
   proof/reference.safetensors.
4. Every file is synced; ``python *format.verifier(folder, reference, device)`` is run in a fresh process, which reloads what was
   written, compares it with the reference, and prints one JSON object: numbers worth keeping and ``problems``, a list of
   sentences, empty when all is well. With ``"out_of_memory": true`` in it another run follows on the CPU.
5. The manifest is written last and the folder renamed into place.

``selfpruner verify FOLDER`` repeats steps 1 and 4 with the format that the manifest names, so a verifier can use nothing but the
folder and the reference. That is a safetensors file: ``tokens`` (B, S) int64 and ``logits`` (B, P, V) float32 of the last P
positions, with the metadata ``parameters`` (what ``write`` returned), ``dtype`` (in which the logits were computed: float32),
``text`` and ``ids`` (the text's tokens, JSON). A checkpoint's logits are those of the pruned model in memory, before anything was
written; in float32 also where its weights have 16 bits, because in 16 bits single tokens' logits depend on processor and shapes. A
verifier computes in ``dtype``.

A new format: its own file with a subclass of :class:`Format`, a line in ``catalogue.FORMATS``, a subclass of
``selfpruner.testing.FormatSuite`` in ``tests/conformance/test_formats.py``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from selfpruner.errors import FormatError
from selfpruner.files import manifest
from selfpruner.files.tensors import TensorFile
from selfpruner.models.checks import weight_files
from selfpruner.pruning.layer_shapes import LayerShape


@dataclass(frozen=True, slots=True)
class FinishedCheckpoint:
    """A finished checkpoint on disk. ``config``, ``plan`` and ``manifest`` are the content of its JSON files; ``tensors`` has the
    open file of every tensor by name, in the files' order (Llama's names; no lm_head.weight when it is tied)."""

    folder: Path
    config: Mapping[str, object]
    plan: manifest.PlanFile
    manifest: manifest.Manifest
    tensors: Mapping[str, TensorFile]

    @classmethod
    def open(cls, folder: Path, go_on: Callable[[], None] = lambda: None) -> FinishedCheckpoint:
        """Read every file and compare its sha256. Raises as :func:`selfpruner.files.manifest.check`, and FormatError for a folder
        that is an export already."""
        made = manifest.read(folder)["export"]["format"]
        if made != "transformers":
            raise FormatError(
                f"{folder} is in the format {made}; formats are made from a checkpoint of transformers.", param="source"
            )
        body = manifest.check(folder, go_on)
        config, plan = (json.loads((folder / name).read_text("utf-8")) for name in ("config.json", "plan.json"))
        files = [TensorFile(path) for path in weight_files(folder)]
        return cls(folder, config, plan, body, {name: file for file in files for name in file.shapes})

    @property
    def shapes(self) -> list[LayerShape]:
        """What every layer keeps; zeros where a whole block is gone."""
        return [
            LayerShape(layer["kv_groups"], layer["query_heads"] // max(layer["kv_groups"], 1), layer["ffn_channels"])
            for layer in self.plan["layers"]
        ]

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored dtype, on the CPU; read when it is asked for."""
        return self.tensors[name].read(name)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a checkpoint will be made of, under the names that its plan.json will use."""

    family: str
    pattern: str
    compensation: str


class Format(ABC):
    """One way to write a checkpoint. ``quantizations`` are what ``--quantize`` may name; ``library`` is the hub's library_name,
    ``relation`` its word for what the model is to its base."""

    name: ClassVar[str]
    library: ClassVar[str] = "transformers"
    relation: ClassVar[str] = "finetune"
    quantizations: ClassVar[tuple[str, ...]] = ()

    def precheck(self, origin: Origin, quantize: str | None) -> None:  # noqa: B027
        """Raise FormatError, as :meth:`check` would, for what is known before the checkpoint of a search is made."""

    @abstractmethod
    def check(self, checkpoint: FinishedCheckpoint, quantize: str | None) -> None:
        """Raise FormatError for a plan or a model that the runtime cannot take: the reason, and the option of the search that would
        have avoided it. ``quantize`` is one of ``quantizations`` or None."""

    @abstractmethod
    def write(self, checkpoint: FinishedCheckpoint, folder: Path, quantize: str | None, go_on: Callable[[], None]) -> int:
        """Write the format's files into ``folder`` and return the parameters of what was written, tied ones once.

        ``go_on`` is called between tensors or files; it raises CancelledTaskError. What an OSError or a library raises becomes an
        ExportError or DiskFullError outside, and nothing is left behind.
        """

    @abstractmethod
    def use(self, checkpoint: FinishedCheckpoint, quantize: str | None) -> str:
        """Markdown: how what was written is loaded."""

    @abstractmethod
    def verifier(self, folder: Path, reference: Path, device: str) -> list[str]:
        """Arguments of a fresh Python process that proves ``folder``; see step 4 of the module's docstring."""
