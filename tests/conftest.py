"""Shared fixtures: few torch threads, one tiny model per run, text to feed it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Child processes of the tests inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

pytest.register_assert_rewrite("tests.helpers", "selfpruner.testing")

from selfpruner.workers import lifeline  # noqa: E402
from tests.helpers.fake_openai import FakeOpenAI  # noqa: E402

# A run that was started by nohup or in a script's background ignores these; tests send them, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if "PYTEST_XDIST_WORKER" in os.environ:
    lifeline.hold(os.getppid())  # a run of the tests that is killed takes its processes along


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder: 3 layers, hidden 32, 4 query heads, 2 KV heads of 8, FFN 64, vocabulary 128, tied. Read only."""
    import torch

    from selfpruner.testing.tiny_models import tiny_model

    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("tiny_llama"), "llama")


@pytest.fixture(scope="session")
def sample_text() -> Callable[[int, int], str]:
    """``sample_text(n_words, seed)``: reproducible English-like text."""
    from selfpruner.testing.tiny_models import sample_text

    return sample_text


@pytest.fixture
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are proven in this process instead of a fresh one: with the installed classes, from the folder's files."""
    from selfpruner.export import proof, verify, verify_gguf, verify_streamed

    def run(arguments: list[str], _scratch: Path, _go_on: Callable[[], None]) -> dict[str, Any]:
        how, script, folder, reference, *rest = arguments
        if how != "-m":
            return verify.verify(folder, reference, "cpu", own_code=False)
        if script == verify_gguf.__name__:
            return verify_gguf.verify(Path(folder), reference, "cpu")
        return verify_streamed.verify(Path(folder), reference, "cpu", int(rest[1]))

    monkeypatch.setattr(proof, "_run", run)


@pytest.fixture
def fake_openai() -> Iterator[FakeOpenAI]:
    """A scripted OpenAI-compatible server on loopback."""
    server = FakeOpenAI()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """A command that configures logs does so for its own test: its stream is closed in the next one."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def warm_verifier() -> Iterator[None]:
    """Verifications that this process starts are forks of one that has torch loaded."""
    from selfpruner.export import proof
    from tests.helpers.warm_verifier import WarmProcess

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "subprocess", SimpleNamespace(Popen=WarmProcess, DEVNULL=subprocess.DEVNULL))
        yield
    WarmProcess.stop()


@pytest.fixture
def fresh_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are processes that start from nothing, as a user's are."""
    from selfpruner.export import proof

    monkeypatch.setattr(proof, "subprocess", subprocess)
