"""What an older transformers makes of a checkpoint: a modelling file's first error is the version it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from selfpruner.export.forms import FORMS

FILES = sorted({form.code for form in FORMS.values()})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("version", ["4.46.3", "4.57.6", "5.0.0.dev0", "5.13.1"])
def test_a_modelling_file_says_which_version_it_needs(tmp_path: Path, file: Path, version: str) -> None:
    # A package of that version that has nothing else: whatever the file asked of it before would be its first error.
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    ran = subprocess.run(
        [sys.executable, "-P", str(file)], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, timeout=60
    )
    assert ran.returncode == 1
    said = ran.stderr.splitlines()[-1]
    assert said.startswith("ImportError: ")
    assert f"takes transformers 5.14 or later; this is {version}" in said
    assert "pip install --upgrade 'transformers>=5.14'" in said
