"""Find and identify local files of zero-shot tasks, without the harness."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from selfpruner.errors import TextError
from selfpruner.models.checks import sampled_digest


@dataclass(frozen=True, slots=True)
class LocalTask:
    """The task file of ``name`` in the folder ``data``."""

    name: str
    data: Path

    @staticmethod
    def place(name: str) -> str:
        return f"lm_eval_tasks/local_{name}.yaml"

    @classmethod
    def find(cls, name: str, data: Path | None) -> LocalTask | None:
        return cls(name, data) if data is not None and (data / cls.place(name)).is_file() else None

    @property
    def file(self) -> Path:
        return self.data / self.place(self.name)

    @property
    def digest(self) -> str:
        """Identity of the task file and of the data files it names."""
        digest = hashlib.sha256(self.file.read_bytes())
        for path in sorted(self._content().paths.values()):
            digest.update(sampled_digest(path).encode())
        return digest.hexdigest()[:16]

    def config(self, cache: Path) -> dict[str, object]:
        """The task for the harness: data files by absolute paths, prepared under ``cache``. Raises TextError."""
        content = self._content()
        files = {split: str(path.resolve()) for split, path in content.paths.items()}
        return {**content.body, "dataset_kwargs": {**content.arguments, "data_files": files, "cache_dir": str(cache)}}

    def _content(self) -> _Content:
        try:
            body = yaml.safe_load(self.file.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TextError(f"The task file {self.file} cannot be read ({error}). Correct or remove it.", param="tasks") from error
        arguments = (body.get("dataset_kwargs") or {}) if isinstance(body, dict) else {}
        files = arguments.get("data_files")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise TextError(
                f"The task file {self.file} must name its dataset_kwargs: data_files, one file per split.", param="tasks"
            )
        paths = {split: self.data / file for split, file in files.items()}
        for path in paths.values():
            if not path.is_file():
                raise TextError(f"{self.file} names {path}, which is not there.", param="tasks")
        return _Content(body, arguments, paths)


@dataclass(frozen=True, slots=True)
class _Content:
    """A task file: all its fields, the ``dataset_kwargs`` among them, and where those say that the file of each split is."""

    body: Mapping[str, object]
    arguments: Mapping[str, object]
    paths: Mapping[str, Path]
