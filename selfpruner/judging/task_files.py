"""Find and identify local files of zero-shot tasks, without the harness."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from selfpruner.errors import TextError
from selfpruner.json_objects import JsonObject
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
        for path in sorted(self._files(self._read())):
            digest.update(sampled_digest(path).encode())
        return digest.hexdigest()[:16]

    def config(self, cache: Path) -> dict[str, object]:
        """The task for the harness: data files by absolute paths, prepared under ``cache``. Raises TextError."""
        body = self._read()
        self._files(body)
        arguments = body["dataset_kwargs"]
        given = arguments["data_files"]
        arguments["data_files"] = {split: str((self.data / file).resolve()) for split, file in given.items()}
        arguments["cache_dir"] = str(cache)
        return body

    def _read(self) -> JsonObject:
        try:
            body = yaml.safe_load(self.file.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TextError(f"The task file {self.file} cannot be read ({error}). Correct or remove it.", param="tasks") from error
        files = (body.get("dataset_kwargs") or {}).get("data_files") if isinstance(body, dict) else None
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise TextError(
                f"The task file {self.file} must name its dataset_kwargs: data_files, one file per split.", param="tasks"
            )
        return body  # type: ignore[no-any-return]

    def _files(self, body: JsonObject) -> list[Path]:
        paths = [self.data / file for file in body["dataset_kwargs"]["data_files"].values()]
        for path in paths:
            if not path.is_file():
                raise TextError(f"{self.file} names {path}, which is not there.", param="tasks")
        return paths
