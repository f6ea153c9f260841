"""The cache: listed, bounded by what was unused for longest, cleaned; never what a process uses; foreseen before it is filled."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from selfpruner.cli import app as cli
from selfpruner.config import SearchConfig
from selfpruner.errors import ConfigError, DiskFullError
from selfpruner.evaluation.session import prepare
from selfpruner.files import cache_folder
from selfpruner.files.cache_folder import clean, entries, let_go, make_room, remove, size, use
from selfpruner.jobs.handler import SessionHandler
from selfpruner.models import load, resolve
from selfpruner.progress import Foreseen
from selfpruner.testing.tiny_models import sample_text
from selfpruner.workers.base import Session
from selfpruner.workers.lifeline import tied
from selfpruner.workers.tasks import PrepareRequest


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    let_go()
    yield
    let_go()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Five entries of 1,000 bytes, the first one unused for longest; nobody uses them."""
    place = tmp_path / "cache"
    for age, name in enumerate(("statistics/a", "texts/t", "factors/b", "models/c", "levels/d")):
        (place / name).mkdir(parents=True)
        (place / name / "file").write_bytes(bytes(1000))
        use(place / name, f"model {name}", "what")
        let_go()
        marked(place / name, time.time() - 1000 + age)
    return place


def marked(entry: Path, used: float) -> None:
    os.utime(entry.parent.parent / "used" / f"{entry.parent.name}-{entry.name}.json", (used, used))


def names(cache: Path) -> list[str]:
    return [f"{entry.kind}/{entry.path.name}" for entry in entries(cache)]


@contextmanager
def user(entry: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses ``entry``."""
    (entry.parent / "user.py").write_text(
        "import sys, time; from pathlib import Path; from selfpruner.files.cache_folder import use\n"
        "use(Path(sys.argv[1]), 'm', 'w'); print(flush=True); time.sleep(60)"
    )
    command = tied("-P", str(entry.parent / "user.py"), str(entry))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (entry.parent / "user.py").unlink()
        yield process
        process.kill()


def test_entries_say_whose_they_are(cache: Path) -> None:
    assert names(cache) == ["statistics/a", "texts/t", "factors/b", "models/c", "levels/d"]
    first = entries(cache)[0]
    assert (first.bytes, first.model, first.what) == (1000, "model statistics/a", "what")
    (cache / "statistics" / "of-an-older-version").mkdir()
    (cache / "models" / "c.lock").touch()
    assert [entry.model for entry in entries(cache) if entry.path.name.startswith("of-")] == [""]
    assert len(entries(cache)) == 6
    assert entries(cache / "nowhere") == []


def test_what_is_unused_for_longest_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.delenv(cache_folder.LIMIT, raising=False)
    make_room(cache, 10_000, told.append)
    monkeypatch.setenv(cache_folder.LIMIT, "5KB")
    make_room(cache, 0, told.append)
    assert (len(entries(cache)), told) == (5, [])
    make_room(cache, 1500, told.append)
    assert names(cache) == ["texts/t", "models/c", "levels/d"], "texts are small, and a job that goes on needs its own"
    assert "removed 2 KiB" in told[0]
    assert not list((cache / "used").glob("statistics-*"))
    use(cache / "models" / "c", "m", "w")
    make_room(cache, 4500, told.append)
    assert names(cache) == ["texts/t", "models/c"]
    assert "all of it is in use" in told[-1]


def test_what_a_process_uses_stays_until_it_ends(cache: Path) -> None:
    entry = entries(cache)[0]
    with user(entry.path) as process:
        assert not remove(entry)
        removed, kept = clean(cache)
        assert [e.path for e in kept] == [entry.path]
        assert len(removed) == 4
        assert (entry.path / "file").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert remove(entry)
    assert entries(cache) == []


def test_cleaning_by_age_and_kind_and_what_killed_processes_left(cache: Path) -> None:
    for name, age in (("statistics/x.1.tmp", 0), ("texts/y.2.tmp", 2 * 86_400)):
        (cache / name).write_bytes(b"half")
        os.utime(cache / name, (time.time() - age,) * 2)
    removed, _ = clean(cache, older_than=2000)
    assert removed == []
    assert (cache / "statistics/x.1.tmp").exists()
    assert not (cache / "texts/y.2.tmp").exists()
    marked(cache / "factors" / "b", time.time() - 5000)
    clean(cache, older_than=2000)
    clean(cache, kinds=["levels"])
    assert names(cache) == ["statistics/a", "texts/t", "models/c"]


def test_the_command(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFPRUNER_CACHE", str(cache))
    monkeypatch.setenv(cache_folder.LIMIT, "20GiB")
    assert cli.run(["cache"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"1,?000 B +statistics +model statistics/a  what  a\n", out)
    assert f"5 KiB of 20.0 GiB allowed in {cache}" in out
    assert cli.run(["cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 5000
    for arguments, words in (
        (["clean"], "--all"),
        (["clean", "--older-than", "soon"], "7d"),
        (["clean", "--kind", "statistic"], "statistics"),
    ):
        assert cli.run(["cache", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert cli.run(["cache", "clean", "--kind", "factors", "--older-than", "1m"]) == 0
    assert cli.run(["cache", "clean", "--all", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["removed"]) == 4
    assert entries(cache) == []


def test_a_limit_that_is_no_size_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache_folder.LIMIT, "a lot")
    config = SearchConfig(rate=0.2, model=str(tmp_path / "none")).model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"SELFPRUNER_CACHE_LIMIT is 'a lot'.*20GiB"):
        SessionHandler("cpu").handle(Session("k", config, str(tmp_path)), PrepareRequest(), lambda _: None, lambda: False)


def test_managing_the_cache_needs_no_torch() -> None:
    code = "import sys, selfpruner.cli.cache; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1,023 B"), (1536, "2 KiB"), (5 << 20, "5 MiB"), (3 << 29, "1.5 GiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


# -- preparing ---------------------------------------------------------------------------------------------------------
def config_of(folder: Path, **fields: object) -> SearchConfig:
    (folder / "text.txt").write_text(sample_text(8000))
    text = {"sources": [{"source": str(folder / "text.txt")}], "sequences": 16, "length": 64}
    return SearchConfig.model_validate({"rate": 0.2, "calibration": text, "dtype": "float32", **fields})


@pytest.mark.parametrize(
    ("fields", "unknown"),
    [
        ({}, None),
        ({"compensation": "none", "criterion": "wanda_sp"}, None),
        ({"criterion": "taylor"}, "its gradients take"),
        ({"pattern": "n_m", "criterion": "wanda"}, "its levels take"),
    ],
)
def test_what_preparing_takes_is_said_before_it_begins(
    fields: dict[str, object], unknown: str | None, tiny_llama: Path, tmp_path: Path
) -> None:
    cache, told = tmp_path / "cache", list[str]()
    config, loaded = config_of(tmp_path, **fields), load(resolve(str(tiny_llama), tmp_path), "cpu", "float32")
    prepare(config, loaded, cache, ["calibration"], told.append, lambda: False)
    (said,) = [text for text in told if isinstance(text, Foreseen)]
    first = next(index for index, text in enumerate(told) if "of layer 1" in text)
    assert told.index(said) < first
    assert re.search(r"about \d+ to \d+ seconds.*MiB of memory and \d+ KiB of disk", said)
    assert (unknown or "guess") in said
    foreseen = 1024 * int(re.search(r"(\d+) KiB of disk", said)[1])  # type: ignore[index]
    kept = {entry.kind: entry.bytes for entry in entries(cache)}
    kept.pop("texts")
    assert sum(kept.values()) == pytest.approx(foreseen, rel=0.35), "the files' headers count in so small a model"
    assert {entry.model for entry in entries(cache)} == {str(tiny_llama)}
    told.clear()
    prepare(config, loaded, cache, ["calibration"], told.append, lambda: False)
    assert not [text for text in told if isinstance(text, Foreseen)], "nothing is left to do"


def test_a_disk_without_room_is_refused_before_anything_is_measured(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[str]()
    config, loaded = config_of(tmp_path), load(resolve(str(tiny_llama), tmp_path), "cpu", "float32")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    with pytest.raises(DiskFullError, match=r"selfpruner cache .* only 50,000 bytes are free"):
        prepare(config, loaded, tmp_path / "cache", ["calibration"], told.append, lambda: False)
    assert not [text for text in told if "layer" in text]


def test_a_job_that_begins_makes_room_but_not_of_its_own(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, loaded = tmp_path / "cache", load(resolve(str(tiny_llama), tmp_path), "cpu", "float32")
    monkeypatch.setenv(cache_folder.LIMIT, "150KB")
    first = prepare(config_of(tmp_path), loaded, cache, ["calibration"], lambda _: None, lambda: False)
    mine = names(cache)
    prepare(config_of(tmp_path, criterion="wanda_sp"), loaded, cache, ["calibration"], lambda _: None, lambda: False)
    assert set(mine) < set(names(cache)), "one process holds all of it"
    let_go()
    other = config_of(tmp_path, criterion="wanda_sp", seed=1)
    prepare(other, loaded, cache, ["calibration"], lambda _: None, lambda: False)
    left = names(cache)
    assert not [name for name in mine if name in left and not name.startswith("texts/")]
    again = prepare(config_of(tmp_path), loaded, cache, ["calibration"], lambda _: None, lambda: False)
    assert [b.options for b in again.engine.blocks] == [b.options for b in first.engine.blocks], "made again, it is the same"


def test_a_matrix_of_moments_is_kept_once(tiny_llama: Path, tmp_path: Path) -> None:
    from selfpruner.architectures import describe
    from selfpruner.calibration.cache import cached_statistics
    from selfpruner.calibration.statistics import layer_statistics

    arch = describe(load(resolve(str(tiny_llama), tmp_path), "cpu", "float32").model)
    tokens = torch.randint(128, (16, 64), generator=torch.Generator().manual_seed(0))
    direct = list(layer_statistics(arch, tokens))
    read = list(cached_statistics(arch, tokens, tmp_path / "s", "f"))
    for one, other in zip(direct, read, strict=True):
        for site, found in one.items():
            assert torch.equal(found.scatter, found.scatter.T)
            assert torch.equal(found.scatter.float(), other[site].scatter)
            assert found.judge is not None
            assert torch.equal(found.judge.scatter, other[site].judge.scatter)  # type: ignore[union-attr]
    assert not list((tmp_path / "s").rglob("*.tmp"))
