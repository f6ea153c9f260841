"""A streamed model is the same model, and takes no more memory than it may."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers.models.auto import AutoConfig, AutoModelForCausalLM

from selfpruner import models
from selfpruner.api import config_of
from selfpruner.architectures import describe
from selfpruner.architectures.cost import decoder_parameters, model_parameters
from selfpruner.architectures.kernels import soft_cap
from selfpruner.architectures.order import checkpoint_ffn, reorder_channels
from selfpruner.calibration.cache import cached_statistics
from selfpruner.calibration.statistics import layer_statistics
from selfpruner.config import SearchConfig
from selfpruner.errors import ConfigError, ModelError, ProposerError
from selfpruner.evaluation.pieces import divergences_in_pieces
from selfpruner.evaluation.session import make_engine
from selfpruner.export import checkpoint
from selfpruner.export.verify_streamed import verify
from selfpruner.files.card_info import CardInfo
from selfpruner.files.tensors import TensorFile, held_shapes, write_tensors
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import session_of
from selfpruner.models import LoadedModel, checks, streaming
from selfpruner.planning.space import Plan
from selfpruner.pruning.measurements import held_bytes
from selfpruner.testing.prepared_models import ready
from selfpruner.testing.tiny_models import sample_text, tiny_model, tokens_of
from selfpruner.workers.tasks import ExportRequest, MeasureRequest, PrepareRequest, ProposeRequest, TaskRequest
from selfpruner.workers.thread_pool import InProcessPool
from tests.helpers import ROOT
from tests.helpers.pruned import random_plans

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True},
    "qwen2": {"tied": False},
    "qwen3": {},
    "opt": {},
    "gemma2": {},
    "phi3": {},
}
TIGHT, WIDE = 1 << 14, 1 << 30  # the head in pieces; the head whole


def streamed(folder: Path, memory: int = TIGHT, dtype: torch.dtype = torch.float32) -> Any:
    return streaming.stream(AutoConfig.from_pretrained(folder), checks.weight_files(folder), CPU, dtype, memory)


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return streaming.whole(AutoConfig.from_pretrained(folder), checks.weight_files(folder), CPU, dtype)


# -- the same model ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [TIGHT, WIDE])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float32 as bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_resident_model(tmp_path: Path, family: str, kind: str, memory: int) -> None:
    stored, _, used = kind.partition(" as ")
    dtype: torch.dtype = getattr(torch, used or stored)
    folder = tiny_model(tmp_path, family, dtype=stored, **FAMILIES[family])
    one, other = ready(whole(folder, dtype)), ready(streamed(folder, memory, dtype))
    assert one.space == other.space
    plans, tokens = random_plans(one.space, 5), tokens_of(3, 20)
    for a, b in zip(one.engine.evaluate(plans, tokens), other.engine.evaluate(plans, tokens), strict=True):
        assert b.kl == pytest.approx(a.kl, rel=1e-5, abs=1e-6)
        assert b.nll == pytest.approx(a.nll, rel=1e-5)
    assert model_parameters(other.arch) == model_parameters(one.arch)
    assert decoder_parameters(other.arch) == decoder_parameters(one.arch)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_a_model_is_what_transformers_does(tmp_path: Path, family: str) -> None:
    folder = tiny_model(tmp_path, family, **FAMILIES[family])
    tokens = tokens_of(2, 16)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    mine = whole(folder)
    assert all(tensor.equal(theirs.state_dict()[name]) for name, tensor in mine.state_dict().items())
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert mine(tokens).logits.equal(expected)
        torch.testing.assert_close(streamed(folder)(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_layers_in_any_order(tmp_path: Path, family: str) -> None:
    """What was read ahead and not wanted is forgotten; a layer that left is gone for all to see."""
    folder = tiny_model(tmp_path, family, layers=5)
    resident, arch = describe(whole(folder)), describe(streamed(folder))
    for layer in (0, 3, 3, 1, 2, 0, 4, 0):
        assert arch.ffn(layer).up.equal(resident.ffn(layer).up)
        assert arch.attention(layer).o.equal(resident.attention(layer).o)
        assert sum(not next(p for p in one.parameters() if p.ndim > 1).is_meta for one in arch.decoder.layers) == 1
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1, 3):  # in use, read ahead, neither
        reorder_channels(arch, layer, order)
        reorder_channels(resident, layer, order)
    for layer in (0, 1, 2, 3):
        for name in arch.ffn(layer).matrices:
            assert getattr(arch.ffn(layer), name).equal(getattr(resident.ffn(layer), name))
        assert checkpoint_ffn(arch, layer).down.equal(checkpoint_ffn(resident, layer).down)


def test_a_file_that_shrinks_is_an_error_not_a_wrong_score(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, "llama")
    arch = describe(streamed(folder))
    arch.ffn(0)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(ModelError, match="changed while in use"):
        list(map(arch.ffn, (2, 1, 2, 0)))


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("step", [3, 7, 40])
def test_the_comparison_in_pieces_is_exact(step: int, cap: float | None) -> None:
    g = torch.Generator().manual_seed(1)
    head = torch.randn(40, 8, generator=g) * 3
    dense, *finals = (torch.randn(2, 5, 8, generator=g) for _ in range(3))
    tokens = torch.randint(40, (2, 5), generator=g)
    pieces = [(start, head[start : start + step]) for start in range(0, 40, step)]
    found = divergences_in_pieces(pieces, lambda x: x * 0.5, dense, finals, tokens, rows=4, cap=cap)
    p = soft_cap(0.5 * dense.double() @ head.double().T, cap).log_softmax(-1)
    for index, final in enumerate(finals):
        q = soft_cap(0.5 * final.double() @ head.double().T, cap).log_softmax(-1)
        torch.testing.assert_close(found.kl[index].double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
        nll = -q[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
        torch.testing.assert_close(found.nll[index][:, :-1].double(), nll, rtol=1e-4, atol=1e-5)
        assert not found.nll[index][:, -1].any(), "the last position has no next token"


def test_statistics_within_a_ceiling(tmp_path: Path) -> None:
    """Fewer tokens at once, and the residual stream in a file: the same moments."""
    arch = describe(whole(tiny_model(tmp_path, "llama")))
    tokens = tokens_of(24, 16)
    plain = list(layer_statistics(arch, tokens))
    bounded = list(layer_statistics(arch, tokens, memory=1 << 17, scratch=tmp_path / "scratch"))
    assert (tmp_path / "scratch").is_dir()
    assert not list((tmp_path / "scratch").iterdir())
    for one, other in zip(plain, bounded, strict=True):
        for a, b in zip(one.values(), other.values(), strict=True):
            torch.testing.assert_close(a.gram, b.gram, rtol=1e-4, atol=1e-3)
    list(cached_statistics(arch, tokens, tmp_path / "statistics", "key", memory=1 << 17))
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "statistics").rglob("*") if path.is_file())


# -- the setting ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "meant"),
    [("2GiB", 2 << 30), ("800 MiB", 800 << 20), ("1.5GB", 1_500_000_000), ("64m", 64_000_000), (12345, 12345), ("512", 512)],
)
def test_sizes(given: Any, meant: int) -> None:
    assert SearchConfig(rate=0.2, memory=given).memory == meant


@pytest.mark.parametrize("given", ["2 bananas", "-1", 0, "", "GiB", "9" * 15 + "TiB", "0.0", "1e3"])
def test_sizes_that_are_none(given: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of({"rate": 0.2, "memory": given})
    assert refused.value.param is not None
    assert refused.value.param.startswith("memory")


def large(folder: Path, layers: int = 16) -> Path:
    """37 MiB in 16 layers: more than a ceiling of 34 MiB."""
    shape: dict[str, Any] = {"layers": layers, "hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 512}
    return tiny_model(folder, "qwen2", tied=False, **shape)


def test_a_ceiling_too_low_says_what_would_do(tmp_path: Path) -> None:
    source = models.resolve(str(large(tmp_path)), tmp_path)
    with pytest.raises(ConfigError, match=r"Set memory to (\d+)MiB") as refused:
        models.load(source, "cpu", "float32", 10 << 20)
    assert refused.value.param == "memory"
    enough = int(str(refused.value).split("Set memory to ")[1].split("MiB")[0]) << 20
    assert models.load(source, "cpu", "float32", enough).streamed
    assert not models.load(source, "cpu", "float32", 60 << 20).streamed
    assert not models.load(source, "cpu", "float32").streamed


def test_the_engines_shares_fit_the_ceiling(tmp_path: Path) -> None:
    source = models.resolve(str(large(tmp_path)), tmp_path)
    for memory in (34 << 20, 40 << 20, 80 << 20):
        loaded = models.load(source, "cpu", "float32", memory)
        arch = describe(loaded.model)
        engine = make_engine(arch, loaded, [])
        assert held_bytes(arch, loaded) + engine.stream_bytes + engine.cache.max_bytes + engine.logit_bytes <= memory


# -- jobs ----------------------------------------------------------------------------------------------------------------
_MEASURED = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from selfpruner import models
from selfpruner.architectures import describe
from selfpruner.architectures.kernels import soft_cap
from selfpruner.api import config_of
from selfpruner.calibration.texts import TokenBatches
from selfpruner.evaluation.session import make_engine
from selfpruner.pruning.blocks import prepare_blocks
from selfpruner.models.memory import release
from selfpruner.testing.tiny_models import tiny_model, tokens_of
from selfpruner.planning.space import Plan

def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

def work(folder, memory):
    cache = Path(sys.argv[2]) / f"cache{memory}"
    loaded = models.load(models.resolve(str(folder), cache), "cpu", "float32", memory)
    arch = describe(loaded.model)
    text = TokenBatches(tokens_of(16, 64), (), "tokens")
    config = config_of({"rate": 0.2, "memory": memory})
    blocks, _ = prepare_blocks(config, arch, loaded, text, cache, lambda _: None, lambda: False)
    plans = [Plan(tuple(1 if block == child else 0 for block in range(len(blocks)))) for child in range(0, len(blocks), 8)]
    return loaded.streamed, [score.kl for score in make_engine(arch, loaded, blocks).evaluate(plans, tokens_of(4, 64, seed=2))]

work(tiny_model(Path(sys.argv[2]) / "warm", "qwen2"), None)  # libraries and their kernels
for memory in sys.argv[3:]:
    release()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    streamed, kl = work(sys.argv[1], int(memory) or None)
    print(json.dumps({"streamed": streamed, "kl": kl, "peak": status("VmHWM") - before}))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's resettable high-water mark")
def test_the_ceiling_is_obeyed(tmp_path: Path) -> None:
    """Resident memory beyond what the libraries take, over loading, statistics, ordering and a generation."""
    folder = large(tmp_path / "model", layers=24)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(folder), str(tmp_path), str(38 << 20), "0"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    bounded, free = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert bounded["streamed"]
    assert not free["streamed"]
    assert bounded["peak"] <= 38 << 20
    assert free["peak"] > 75 << 20, "or the measurement measures nothing"
    assert bounded["kl"] == pytest.approx(free["kl"], rel=1e-4, abs=1e-6)


def job_config(folder: Path, text: Path, **changes: Any) -> SearchConfig:
    source = {"sources": [{"source": str(text)}]}
    return config_of(
        {
            "model": str(folder),
            "rate": 0.25,
            "dtype": "float32",
            "preset": "evolution",
            "calibration": {**source, "sequences": 16, "length": 32},
            "fitness_text": {**source, "sequences": 8, "length": 32},
            "report_text": {**source, "sequences": 4, "length": 32},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    large(folder / "model")
    (folder / "text.txt").write_text(sample_text(6000))
    return folder


def run(config: SearchConfig, cache: Path, *requests: TaskRequest[Any]) -> list[Any]:
    async def main() -> list[Any]:
        pool = InProcessPool(lambda: SessionHandler("cpu"))
        try:
            return [await pool.run(session_of(config, cache), request) for request in requests]
        finally:
            await pool.close()

    return asyncio.run(main())


@pytest.mark.parametrize("method", ["least_squares", pytest.param("none", marks=pytest.mark.slow)])
def test_a_streamed_export_is_the_resident_one(place: Path, tmp_path: Path, method: str) -> None:
    """Pruned, dense and dropped blocks; the checkpoint is written tensor by tensor, and loads in transformers."""
    texts = place / "model", place / "text.txt"
    logits = {}
    tokens = tokens_of(2, 16, vocab=500)
    for memory in ("34MiB", None):
        config = job_config(*texts, memory=memory, compensation=method, drop_blocks=True)
        blocks = run(config, place / "cache", PrepareRequest())[0].space.blocks
        last = [len(block.options) - 1 for block in blocks]
        plan = (0, 1, 1, 0, last[4], 3, 2, last[7], *[min(1, index % 3) for index in range(len(blocks) - 8)])
        directory = tmp_path / str(memory)
        card = CardInfo(base_model="tiny", rate=0.25, criterion="obs", compensation=method, levels=plan)
        done, timed = run(
            config,
            place / "cache",
            ExportRequest(plan=plan, directory=str(directory), card=card),
            MeasureRequest(plans={"dense": (0,) * len(plan), "best": plan}),
        )
        assert done.verification["problems"] == []
        assert done.verification.get("streamed", False) == (memory is not None)
        assert (timed.not_timed is not None) == (memory is not None)
        assert timed.rows["best"].parameters == done.parameters
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
        with torch.no_grad():
            logits[memory] = model(tokens).logits
        with safe_open(directory / "model.safetensors", "pt") as file, safe_open(place / "model/model.safetensors", "pt") as base:
            name = "model.layers.1.mlp.gate_proj.weight"  # a block that nothing was taken from
            assert file.get_tensor(name).equal(base.get_tensor(name))
    torch.testing.assert_close(logits["34MiB"], logits[None], rtol=1e-3, atol=1e-3)


def test_verification_sees_a_wrong_tensor(place: Path, tmp_path: Path) -> None:
    config = job_config(place / "model", place / "text.txt", memory="34MiB")
    directory = tmp_path / "out"
    blocks = run(config, place / "cache", PrepareRequest())[0].space.blocks
    plan = (0, 1) * (len(blocks) // 2)
    card = CardInfo(base_model="tiny", rate=0.25, criterion="obs", compensation="least_squares", levels=plan)
    run(config, place / "cache", ExportRequest(plan=plan, directory=str(directory), card=card))
    model: Any = checkpoint.load(directory)
    tokens = tokens_of(2, 16, vocab=500)
    ids = json.dumps(models.load(models.resolve(str(place / "model"), tmp_path), "cpu").tokenizer("the")["input_ids"])
    parameters = sum(p.numel() for p in model.parameters())
    facts = {"parameters": str(parameters), "dtype": "float32", "text": "the", "ids": ids}
    held = {"tokens": tokens, "logits": model(tokens).logits.detach().float()}
    write_tensors(tmp_path / "reference", held_shapes(held), held.__getitem__, facts)
    assert verify(directory, str(tmp_path / "reference"), "cpu", 34 << 20)["problems"] == []
    file = directory / "model.safetensors"
    opened = TensorFile(file)
    tensors = {name: opened.read(name) for name in opened.shapes}
    tensors["model.layers.7.mlp.down_proj.weight"].mul_(1.5)
    write_tensors(file, held_shapes(tensors), tensors.__getitem__, {"format": "pt"})
    assert any(
        "logits differ" in problem for problem in verify(directory, str(tmp_path / "reference"), "cpu", 34 << 20)["problems"]
    )


def test_a_streamed_model_is_no_proposer(place: Path) -> None:
    config = job_config(place / "model", place / "text.txt", memory="34MiB")
    ask = ProposeRequest(messages=(), reply_schema={}, temperature=1.0, max_tokens=8, seed=0)
    with pytest.raises(ProposerError, match="Name another proposer"):
        run(config, place / "cache", ask)


def test_ordering_that_does_not_fit_says_what_would_do(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama", layers=24, hidden=64, ffn=1024, heads=2, kv_heads=2, head_dim=32)
    (tmp_path / "text.txt").write_text(sample_text(6000))
    with pytest.raises(ConfigError, match=r"Ordering .* Set it to \d+MiB or more") as refused:
        run(job_config(folder, tmp_path / "text.txt", memory="15MiB"), tmp_path / "cache", PrepareRequest())
    assert refused.value.param == "memory"


def test_the_model_writes_its_own_text_streamed(tmp_path: Path) -> None:
    from selfpruner.calibration import selftext

    folder = tiny_model(tmp_path / "model", "llama")
    source = models.resolve(str(folder), tmp_path)
    resident = models.load(source, "cpu", "float32")
    bounded = LoadedModel(streamed(folder), resident.tokenizer, source, torch.float32, TIGHT, True)
    how: dict[str, Any] = {"count": 3, "length": 24, "separator": [2], "seed": 1, "stream": "calibration"}
    texts = [selftext.write(loaded, cache=tmp_path / name, **how) for name, loaded in (("a", resident), ("b", bounded))]
    assert texts[0].equal(texts[1])


# -- files ---------------------------------------------------------------------------------------------------------------
def test_files_are_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"b": torch.randn(3, 4).bfloat16(), "a": torch.arange(5), "none": torch.empty(0, 2), "scalar": torch.tensor(1.5)}
    size = write_tensors(tmp_path / "x", held_shapes(tensors), tensors.__getitem__, {"note": "é"})
    assert size == sum(tensor.nbytes for tensor in tensors.values())
    checks.read_header(tmp_path / "x")
    again, mine = load_file(tmp_path / "x"), TensorFile(tmp_path / "x")
    assert mine.metadata == {"note": "é"}
    for name, tensor in tensors.items():
        assert again[name].equal(tensor)
        assert mine.read(name).equal(tensor)
    assert mine.read("b", start=1, stop=3).equal(tensors["b"][1:3])
    with pytest.raises(ValueError, match="rows"):
        write_tensors(tmp_path / "y", held_shapes({"b": tensors["b"]}), lambda _: [tensors["b"][:1]])


def test_a_plan_for_every_level(tmp_path: Path) -> None:
    """Every level of a block is cut from the files as from memory."""
    folder = large(tmp_path / "model", layers=4)
    one, other = ready(whole(folder), step=128), ready(streamed(folder), step=128)
    plans = [Plan((0,) * 6 + (level, 0)) for level in range(len(one.blocks[6].options))]
    plans += [Plan((0,) * 7 + (level,)) for level in range(len(one.blocks[7].options))]
    tokens = tokens_of(2, 16)
    for a, b in zip(one.engine.evaluate(plans, tokens), other.engine.evaluate(plans, tokens), strict=True):
        assert b.kl == pytest.approx(a.kl, rel=1e-4, abs=1e-6)
