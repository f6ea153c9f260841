"""What every export format must do: write every family, prove it, leave nothing when it fails or is killed, be proven again."""

from __future__ import annotations

from pathlib import Path

import pytest

import selfpruner.testing.tiny_models as tiny
from selfpruner.export import formats, proof
from selfpruner.export.gguf import Gguf
from selfpruner.export.masked import Masked
from selfpruner.export.transformers_format import Transformers
from selfpruner.files import manifest
from selfpruner.testing import FormatSuite


class TestTransformers(FormatSuite):
    format = Transformers
    biased = tiny.FAMILIES

    def test_a_copy_is_the_same_files(self, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(proof, "prove", lambda *_: {"problems": []})
        source = checkpoints["llama"]
        made = formats.convert(source, tmp_path / "out", "transformers").path
        assert manifest.read(made)["files"] == manifest.read(source)["files"]


class TestMasked(FormatSuite):
    format = Masked


class TestGguf(FormatSuite):
    format = Gguf
    families = ("llama", "mistral", "qwen2", "phi3", "qwen3")
    biased = ("llama", "mistral", "qwen2", "phi3")


def test_the_suite_covers_every_format() -> None:
    covered = {suite.format.name for suite in FormatSuite.__subclasses__()}
    assert covered == set(formats.FORMATS)
