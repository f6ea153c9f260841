"""What every export format must do: write every family, prove it, leave nothing when it fails or is killed, be proven again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
from transformers.models.auto import AutoTokenizer

import selfpruner.testing.tiny_models as tiny
from selfpruner.errors import CancelledTaskError, CorruptCheckpointError, ExportError, FormatError, UnknownNameError
from selfpruner.export import formats, proof
from selfpruner.export.base import Format
from selfpruner.export.checkpoint import write
from selfpruner.files import manifest
from selfpruner.testing.cut_models import CARD, folder, prune, units_of

CONVERTER = """
import sys
from selfpruner.export import formats
formats.convert(sys.argv[1], sys.argv[2], sys.argv[3])
"""


class FormatSuite:
    """Subclass it with ``format``, and the ``families`` that it takes."""

    format: ClassVar[type[Format]]
    families: ClassVar[tuple[str, ...]] = tiny.FAMILIES
    biased: ClassVar[tuple[str, ...]] = ()  # those that can be written with a repair's biases
    dropped: ClassVar[bool] = True  # or with blocks that are gone

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoints(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        """A checkpoint of every family, widths, heads and KV groups varying by layer, written without a proof of its own."""
        root = tmp_path_factory.mktemp("checkpoints")
        made = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proof, "prove", lambda *_: {"problems": []})
            for index, family in enumerate(cls.families):
                source, model = folder(root / f"base-{family}", family, tied=index % 2 == 0)
                (source / "LICENSE").write_text("terms\n")
                case = prune(model, drop=cls.dropped, biased=family in cls.biased)
                tokenizer = AutoTokenizer.from_pretrained(source)
                made[family] = write(case.pruned, tokenizer, source, root / family, CARD, units=units_of(case)).path
        return made

    def test_is_registered(self) -> None:
        assert isinstance(formats.create(self.format.name), self.format)

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", cls.families)

    def test_every_family_is_written_and_proven(self, checkpoints: dict[str, Path], family: str, tmp_path: Path) -> None:
        result = formats.convert(checkpoints[family], tmp_path / "out", self.format.name)
        assert result.verification["problems"] == []
        body = manifest.check(result.path)
        assert body["export"] == {
            "format": self.format.name,
            "checkpoint": manifest.sha256(checkpoints[family] / manifest.NAME),
        }
        assert body["plan"] == manifest.read(checkpoints[family])["plan"]
        assert {"plan.json", "README.md", "LICENSE", proof.REFERENCE} <= body["files"].keys()
        assert f'library_name: "{self.format.library}"' in (result.path / "README.md").read_text()
        assert result.bytes > 1000
        again = formats.convert(checkpoints[family], tmp_path / "out", self.format.name)
        assert again.reused
        assert again.manifest_sha256 == result.manifest_sha256
        if family == self.families[0]:
            facts = formats.verify(result.path)
            assert (facts["format"], facts["parameters"]) == (self.format.name, manifest.kept(body["plan"]))
            assert facts["verification"]["max_difference"] == pytest.approx(result.verification["max_difference"], abs=1e-6)

    def test_what_was_changed_is_found(self, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(proof, "prove", lambda *_: {"problems": []})
        made = formats.convert(checkpoints[self.families[0]], tmp_path / "out", self.format.name).path
        largest = max((path for path in made.iterdir() if path.is_file()), key=lambda path: path.stat().st_size)
        body = bytearray(largest.read_bytes())
        body[-1] ^= 1
        largest.write_bytes(body)
        with pytest.raises(CorruptCheckpointError, match=f"{largest.name} does not match"):
            formats.verify(made)

    def test_wrong_weights_are_found_whatever_the_manifest_says(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        """The proof looks at what is computed: here at another model's logits."""
        source = Path(shutil.copytree(checkpoints[self.families[0]], tmp_path / "source"))
        other = checkpoints[self.families[1]] / proof.REFERENCE
        shutil.copyfile(other, source / proof.REFERENCE)
        body = manifest.read(source)
        (source / manifest.NAME).unlink()
        manifest.write(source, plan=body["plan"], parameters=body["parameters"], verification={})
        with pytest.raises(ExportError, match="does not verify"):
            formats.convert(source, tmp_path / "out", self.format.name)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    def test_refusals_come_before_any_work(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        source = checkpoints[self.families[0]]
        with pytest.raises(FormatError, match="no quantization 'q99'"):
            formats.convert(source, tmp_path / "out", self.format.name, quantize="q99")
        with pytest.raises(ExportError, match="the checkpoint itself"):
            formats.convert(source, source, self.format.name)
        with pytest.raises(UnknownNameError, match="Known: "):
            formats.convert(source, tmp_path / "out", "onnx")
        with pytest.raises(ExportError, match=r"no manifest\.json"):
            formats.convert(tmp_path / "nothing", tmp_path / "out", self.format.name)
        assert list(tmp_path.iterdir()) == []

    def test_cancelled_exports_leave_nothing(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        polls = iter([False] * 8)
        with pytest.raises(CancelledTaskError):
            formats.convert(checkpoints[self.families[0]], tmp_path / "out", self.format.name, cancelled=lambda: next(polls, True))
        assert list(tmp_path.iterdir()) == []

    def test_killed_exports_are_invisible_and_swept_up(
        self, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, place = checkpoints[self.families[0]], tmp_path / "exports" / "out"
        arguments = [str(source), str(place), self.format.name]
        writer = subprocess.Popen(
            [sys.executable, "-c", CONVERTER, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        left: list[Path] = []
        deadline = time.monotonic() + 120
        while not left and writer.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            left = list(place.parent.glob(f".tmp-*/{proof.REFERENCE}"))
        os.killpg(writer.pid, signal.SIGKILL)
        writer.wait()
        assert left, "the writer ended before it wrote anything"
        assert [path.name.startswith(".tmp-") for path in place.parent.iterdir()] == [True]
        monkeypatch.setattr(proof, "prove", lambda *_: {"problems": []})
        formats.convert(source, place, self.format.name)
        assert [path.name for path in place.parent.iterdir()] == ["out"]
