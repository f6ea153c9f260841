"""evaluate, quality and benchmark obey memory: a model that is larger is streamed, or refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selfpruner import api
from selfpruner.cli import app as cli
from selfpruner.errors import ConfigError, OutOfMemoryError
from selfpruner.export import checkpoint
from selfpruner.models import streaming
from selfpruner.testing.tiny_models import sample_text, tiny_model

# 32 layers of 1 MiB in float32, of which streaming holds six times one and 8 MiB.
SHAPE = {"layers": 32, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 512}
ROOM = "17MiB"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("model") / "llama", "llama", **SHAPE)
    (folder.parent / "text.txt").write_text(sample_text(10_000))
    return folder


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> dict[str, Any]:
    text = [str(model.parent / "text.txt")]
    return {"text": text, "sequences": 2, "length": 64, "device": "cpu", "cache": tmp_path / "cache", "progress": False}


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ceilings of the models that were streamed."""
    ceilings: list[int] = []
    stream = streaming.stream

    def noted(config: Any, paths: Any, device: Any, dtype: Any, memory: int) -> Any:
        ceilings.append(memory)
        return stream(config, paths, device, dtype, memory)

    monkeypatch.setattr(streaming, "stream", noted)
    monkeypatch.setattr(checkpoint, "stream", noted)
    return ceilings


def test_evaluate_streams_what_is_larger(model: Path, asked: dict[str, Any], streams: list[int], tmp_path: Path) -> None:
    whole = api.evaluate(model, **asked)
    assert streams == []
    held = api.evaluate(model, memory=ROOM, **asked)
    assert held.perplexity == pytest.approx(whole.perplexity, rel=1e-3)
    assert held.parameters == whole.parameters
    both = api.evaluate(model, against=str(model), memory="34MiB", **asked)
    assert both.kl == pytest.approx(0, abs=1e-4)
    assert len(streams) == 3
    assert all(ceiling < 17 << 20 for ceiling in streams), "two models share what there is, and their logits take their part"
    text = {"sources": [{"source": asked["text"][0]}], "sequences": 4, "length": 32}
    how = {"criterion": "magnitude", "compensation": "none", "calibration": text, "dtype": "float32", "device": "cpu"}
    pruned = api.prune(tmp_path / "pruned", rate=0.2, model=str(model), cache=asked["cache"], progress=False, **how)
    streams.clear()
    in_memory = api.evaluate(pruned.path, **asked)
    streamed = api.evaluate(pruned.path, memory="15MiB", **asked)
    assert len(streams) == 1
    assert (streamed.parameters, streamed.perplexity) == (pruned.parameters, pytest.approx(in_memory.perplexity, rel=1e-3))


def test_what_cannot_be_is_refused_with_what_to_do(
    model: Path, asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"Set memory to \d+MiB or more"):
        api.evaluate(model, memory="1MiB", **asked)
    with pytest.raises(ConfigError, match="Use shorter sequences, or more memory"):
        api.evaluate(model, memory=1000, **asked)
    with pytest.raises(ConfigError, match="memory: "):
        api.evaluate(model, memory="lots", **asked)
    rest = {"device": "cpu", "cache": asked["cache"], "progress": False}
    with pytest.raises(OutOfMemoryError, match="writing probes are not streamed"):
        api.quality([model], tmp_path / "quality.json", generation=True, memory=ROOM, **rest)
    with pytest.raises(OutOfMemoryError, match="MiB of memory are left for it"):
        api.benchmark([model], memory="4MiB", **rest)
    line = ["evaluate", str(model), "-t", asked["text"][0], "--device", "cpu", "--cache", str(asked["cache"]), "--memory", "1MiB"]
    assert cli.run(line) == 2
    assert "Set memory to" in capsys.readouterr().err
