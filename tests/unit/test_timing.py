"""Speed side by side: what is counted against hand and against torch, ratios, real processes, servers, bad input."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

import selfpruner
from benchmarks import speed as benchmark
from selfpruner import models
from selfpruner.cli import app as cli
from selfpruner.errors import BenchmarkError, ConfigError, UnknownNameError
from selfpruner.evaluation import speed
from selfpruner.export.build import build
from selfpruner.files.tensors import TensorFile
from selfpruner.pruning.layer_shapes import LayerShape
from selfpruner.testing import tiny_models as tiny
from selfpruner.testing.tiny_models import load_tiny, tokens_of
from selfpruner.timing import llamacpp_model, run, transformers_model
from selfpruner.timing.model_cost import AttentionCost, ModelCost, decode_bound, prefill_bound
from selfpruner.timing.report import BenchmarkReport, Settings, TimedModel, interval
from selfpruner.timing.served_model import Server
from selfpruner.timing.tasks import DecodeRequest, DecodeResult, LoadResult, MemoryResult, PrefillRequest, PrefillResult
from selfpruner.workers.thread_pool import InProcessPool

# The tiny Llama: 3 layers, hidden 32, 4 heads and 2 KV groups of 8, 64 channels, vocabulary 128.
MATRICES = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
HEAD = 128 * 32


def cut(model: PreTrainedModel, shapes: list[LayerShape]) -> PreTrainedModel:
    """The tiny Llama with the first units of every layer only."""
    weights = {}
    for index, shape in enumerate(shapes):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        for name, rows in (("q", 8 * shape.heads), ("k", 8 * shape.kv_groups), ("v", 8 * shape.kv_groups)):
            if shape.heads:
                weights[attention + f"{name}_proj.weight"] = model.get_parameter(attention + f"{name}_proj.weight")[:rows]
        if shape.heads:
            weights[attention + "o_proj.weight"] = model.get_parameter(attention + "o_proj.weight")[:, : 8 * shape.heads]
        for name in ("gate", "up"):
            weights[mlp + f"{name}_proj.weight"] = model.get_parameter(mlp + f"{name}_proj.weight")[: shape.channels]
        weights[mlp + "down_proj.weight"] = model.get_parameter(mlp + "down_proj.weight")[:, : shape.channels]
    weights["model.layers.1.mlp.down_proj.bias"] = torch.zeros(32)
    return build(model, shapes, weights)


SHAPES = [LayerShape(2, 1, 40), LayerShape(1, 2, 64), LayerShape(0, 0, 16)]


# -- what is counted -----------------------------------------------------------------------------------------------------
def test_the_arithmetic_of_a_hand_counted_model() -> None:
    dense = transformers_model.work_of(load_tiny("llama"))
    assert (dense.matrices, dense.head) == (MATRICES, HEAD)
    # Two operations a weight; attention's own: four per element of the 32 wide queries and position seen, 1 + 2 + 3 + 4 of them.
    assert dense.prefill_operations(4) == 2 * 4 * MATRICES + 2 * HEAD + 3 * 4 * 32 * 10
    # A step reads all weights in float32: matrices, the tied head, two norms a layer and the last. Keys and values of a token are
    # 2 x 2 groups x 8 numbers a layer; the two steps see 5 and 6 positions.
    step = 4 * (MATRICES + HEAD + 7 * 32)
    assert dense.step_bytes == dense.weight_bytes == step
    assert dense.cache_bytes == 3 * 2 * 2 * 8 * 4
    assert dense.decode_bytes(2, 4, 2) == 2 * step + 2 * dense.cache_bytes * (5 + 6)

    other = transformers_model.work_of(cut(load_tiny("llama"), SHAPES))
    matrices = (2 * 32 * 16 + 2 * 32 * 16 + 3 * 32 * 40) + (2 * 32 * 16 + 2 * 32 * 8 + 3 * 32 * 64) + 3 * 32 * 16
    own = 4 * (16 + 16) * 10
    assert prefill_bound(dense, other, 4) == dense.prefill_operations(4) / (2 * 4 * matrices + 2 * HEAD + own)
    norms_and_bias = 6 * 32 + 32  # the last layer has one norm only
    few = 4 * (matrices + HEAD + norms_and_bias)
    cache = 2 * 8 * 4 * (2 + 1)
    assert decode_bound(dense, other, 8, 4, 1) == (step + 8 * 384 * 5) / (few + 8 * cache * 5)


def test_an_untied_embedding_is_not_read_in_a_step() -> None:
    work = transformers_model.work_of(load_tiny("llama", tied=False))
    assert work.weight_bytes - work.step_bytes == 4 * HEAD
    assert work.parameters == MATRICES + 2 * HEAD + 7 * 32


def test_a_window_bounds_what_a_token_sees() -> None:
    layer = AttentionCost(width=8, cache_bytes=10, window=3)
    work = ModelCost(0, 0, 0, 0, 0, (layer,))
    assert work.prefill_operations(5) == 4 * 8 * (1 + 2 + 3 + 3 + 3)
    assert work.decode_bytes(1, 5, 2) == 10 * (3 + 3)
    assert work.decode_bytes(1, 1, 3) == 10 * (2 + 3 + 3)
    mistral = transformers_model.work_of(load_tiny("mistral", sliding_window=6))
    assert {layer.window for layer in mistral.attention} == {6}
    qwen = transformers_model.work_of(load_tiny("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2))
    assert [layer.window for layer in qwen.attention] == [None, None, 6]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_operations_are_those_that_torch_counts(family: str) -> None:
    model = load_tiny(family, tied=False)
    model.set_attn_implementation("eager")
    work, length = transformers_model.work_of(model), 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens_of(1, length), use_cache=False, logits_to_keep=1)
    # Eager attention also multiplies with what the mask hides.
    hidden = sum(4 * layer.width for layer in work.attention) * (length * length - length * (length + 1) // 2)
    assert counter.get_total_flops() == work.prefill_operations(length) + hidden


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_of_the_files_and_of_a_real_cache(tmp_path: Path, family: str, tied: bool) -> None:
    folder = tiny.tiny_model(tmp_path, family, tied=tied, dtype="bfloat16")
    file = TensorFile(folder / "model.safetensors")
    stored = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in file.shapes.values())
    model = transformers_model.load(str(folder), "cpu", "bfloat16", tmp_path / "cache")
    work = transformers_model.work_of(model)
    assert work.weight_bytes == stored
    assert work == transformers_model.work_of(AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16"))
    assert transformers_model.outline(str(folder), "auto", tmp_path / "cache")[0].work.weight_bytes == stored
    assert cache_bytes(model, 10) == 10 * work.cache_bytes


def test_a_pruned_cache_shrinks_as_counted() -> None:
    model = cut(load_tiny("llama"), SHAPES)
    # A layer without attention marks every token with one key and one value, which nothing reads.
    assert cache_bytes(model, 10) == 10 * (transformers_model.work_of(model).cache_bytes + 2 * 4)


def cache_bytes(model: PreTrainedModel, length: int) -> int:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(tokens_of(1, length), past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_a_gguf_file_is_counted_as_stored(tmp_path: Path) -> None:
    """Two layers of different widths: (4, 2) heads and 64 channels, (2, 1) heads and 32 channels; head_dim 8."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "deci")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_head_count([4, 2])
    writer.add_head_count_kv([2, 1])
    writer.add_key_length(8)
    writer.add_value_length(8)
    half = np.dtype(np.float16)
    for layer, (heads, groups, channels) in enumerate(((4, 2, 64), (2, 1, 32))):
        shapes = {"attn_q": (8 * heads, 32), "attn_k": (8 * groups, 32), "attn_v": (8 * groups, 32), "attn_output": (32, 8 * heads)}
        shapes |= {"ffn_gate": (channels, 32), "ffn_up": (channels, 32), "ffn_down": (32, channels)}
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros(shape, half))
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.zeros(32, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((128, 32), half))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    work, kind = llamacpp_model.work_of(path)
    matrices = (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + (2 * 32 * 16 + 2 * 32 * 8 + 3 * 32 * 32)
    assert (work.matrices, work.head, kind) == (matrices, 128 * 32, "f16")
    assert work.weight_bytes == work.step_bytes == 2 * (matrices + 128 * 32) + 2 * 32 * 4
    assert work.attention == (AttentionCost(32, 2 * 2 * 8 * 2), AttentionCost(16, 2 * 8 * 2))


# -- ratios --------------------------------------------------------------------------------------------------------------
def test_intervals_have_the_coverage_they_claim() -> None:
    for count in (1, 2, 5, 6, 7, 9, 12, 15):
        values = [float(value) for value in range(count)]
        low, high, coverage = interval(values[::-1])
        # All ways in which draws fall below or above the median, each as likely as the other.
        inside = sum(low < below <= high for below in map(sum, itertools.product((0, 1), repeat=count)))
        assert coverage == inside / 2**count
        assert low == count - 1 - high
        assert coverage >= 0.95 or (low, high) == (0, count - 1)
    assert interval([1.0] * 9)[2] > 0.95 > interval([1.0] * 5)[2]
    assert interval([3.0, 1.0, 2.0, 9.0, 5.0, 6.0, 7.0, 8.0, 4.0])[:2] == (2.0, 8.0)


def report_of(*names: str) -> BenchmarkReport:
    def subject(name: str, work: ModelCost, seconds: float) -> TimedModel:
        measures = ("prefill", "first_token", "decode_1", "decode_8")
        times = {measure: [seconds, 3 * seconds, 2 * seconds] for measure in measures}
        counts = {"prefill": [100] * 3, "first_token": [100] * 3, "decode_1": [10] * 3, "decode_8": [80] * 3}
        return TimedModel(name, work, "cpu", "float32", 1, 100.0, 50.0, "process", times, counts)

    dense, small = ModelCost(10, 1000, 100, 4400, 4400, ()), ModelCost(5, 500, 100, 2400, 2400, ())
    made = [subject(name, small if index else dense, 1 - 0.25 * bool(index)) for index, name in enumerate(names)]
    return BenchmarkReport(Settings("transformers", 100, 10, 3), tuple(made))


def test_a_report_holds_ratios_against_their_bound() -> None:
    report = report_of("dense", "a|b")
    body = report.to_dict()
    (prefill, *_), decode = body["ratios"], body["ratios"][-1]
    assert prefill["ratio"] == pytest.approx(4 / 3)
    assert prefill["bound"] == (2 * 100 * 1000 + 200) / (2 * 100 * 500 + 200)
    assert prefill["achieved"] == pytest.approx(prefill["ratio"] / prefill["bound"])
    assert (prefill["low"], prefill["high"], prefill["coverage"]) == (pytest.approx(4 / 3), pytest.approx(4 / 3), 0.75)
    assert (decode["measure"], decode["bound"]) == ("decode_8", 4400 / 2400)
    assert body["models"][0]["tokens_per_second"] == {"prefill": 50.0, "decode_1": 5.0, "decode_8": 40.0}
    assert body["models"][1]["first_token_seconds"] == 1.5
    table = report.markdown().splitlines()
    assert "| | dense | a\\|b | ratio | interval | bound | achieved |" in table
    assert "| decode at batch 8, tokens/s | 40.0 | 53.3 | 1.333 | 1.333 to 1.333 | 1.833 | 0.73 |" in table
    assert len({row.count(" | ") for row in table if row.startswith("| ") and "a\\|b" not in row and "---" not in row}) == 1
    assert "ratio" not in report_of("dense").markdown()


class Recorded:
    """A subject that notes when it is asked."""

    def __init__(self, name: str, asked: list[tuple[str, str, int]], limit: int = 512, dtype: str = "float32") -> None:
        self.name, self.asked = name, asked
        work = ModelCost(1, 1, 1, 1, 1, ())
        self.facts = LoadResult(work=work, limit=limit, dtype=dtype, device="cpu", threads=1, base_mib=1.0)

    async def load(self, memory: int | None) -> LoadResult:  # noqa: ARG002
        return self.facts

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        self.asked.append((self.name, request.kind, 0))
        return PrefillResult(seconds=1.0, first_token=1.0)

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        self.asked.append((self.name, request.kind, request.batch))
        return DecodeResult(seconds=1.0, tokens=4)

    async def memory(self) -> MemoryResult:
        return MemoryResult(mib=2.0, of="process")

    async def close(self) -> None: ...


def test_models_take_turns_measure_by_measure() -> None:
    asked: list[tuple[str, str, int]] = []
    subjects = {name: Recorded(name, asked) for name in "AB"}
    report = asyncio.run(run.measure(subjects, Settings("transformers", 8, 4, 2)))
    turn = [(name, kind, batch) for kind, batch in (("prefill", 0), ("decode", 1), ("decode", 8)) for name in "AB"]
    assert asked == turn * 3
    assert all(len(report.subjects[0].seconds[measure]) == 2 for measure in report.measures), "the first round warms up"
    with pytest.raises(ConfigError, match="positions of A"):
        asyncio.run(run.measure(subjects, Settings("transformers", 510, 4, 2)))
    subjects["B"] = Recorded("B", asked, dtype="float16")
    with pytest.raises(ConfigError, match="float16 and float32"):
        asyncio.run(run.measure(subjects, Settings("transformers", 8, 4, 2)))


# -- transformers --------------------------------------------------------------------------------------------------------
def test_reading_a_prompt_copies_no_weight_and_leaves_none_changed() -> None:
    model = load_tiny("llama", tied=False).to(torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        found = speed.read(model, tokens_of(1, 16))
    with_head = [event.name for event in profile.events() if len(event.input_shapes) > 1 and event.input_shapes[1][-1:] == [128]]
    assert "aten::mm" in with_head, "one product with the head"
    assert "aten::bmm" not in with_head, "and not a batched one with a copy of it"
    assert not model.lm_head.weight.requires_grad
    assert found.cache.get_seq_length() == 16
    with torch.inference_mode():
        assert found.token.item() == int(model(tokens_of(1, 16), use_cache=False).logits[0, -1].argmax())
    assert speed.write(model, found.cache, found.token, 5) > 0
    assert found.cache.get_seq_length() == 21


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "checkpoint"
    fields = {
        "criterion": "magnitude",
        "compensation": "none",
        "calibration": {"sources": [{"source": "self"}], "sequences": 2, "length": 16},
    }
    selfpruner.prune(folder, model=str(tiny_llama), rate=0.3, ffn_step=8, device="cpu", cache=folder.parent / "cache", **fields)
    return folder


def test_dense_and_pruned_in_processes_of_their_own(
    tmp_path: Path, tiny_llama: Path, pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "speed.json"
    command = ["benchmark", str(tiny_llama), str(pruned), "-o", str(output), "--prompt-tokens", "24", "--new-tokens", "6"]
    assert (
        cli.run([*command, "--repetitions", "2", "--device", "cpu", "--dtype", "float32", "--cache", str(tmp_path / "cache")]) == 0
    )
    out, _ = capsys.readouterr()
    body = json.loads(output.read_text())
    dense, small = body["models"]
    assert dense["weight_bytes"] == 4 * (MATRICES + HEAD + 7 * 32)
    held_bytes = transformers_model.work_of(selfpruner.load(pruned, dtype=torch.float32)).weight_bytes
    assert small["weight_bytes"] == held_bytes < dense["weight_bytes"]
    assert small["cache_bytes_per_token"] <= dense["cache_bytes_per_token"] == 3 * 2 * 2 * 8 * 4
    for row in (dense, small):
        assert all(len(values) == 2 and min(values) > 0 for values in row["seconds"].values())
        assert all(first >= all_ for first, all_ in zip(row["seconds"]["first_token"], row["seconds"]["prefill"], strict=True))
        assert row["tokens"]["decode_8"] == [48, 48]
        assert row["peak_mib"] > row["base_mib"] > 0
        assert (row["device"], row["dtype"], row["peak_of"]) == ("cpu", "float32", "process")
    assert [row["measure"] for row in body["ratios"]] == ["prefill", "first_token", "decode_1", "decode_8"]
    assert all(row["bound"] > 1 and row["low"] <= row["ratio"] <= row["high"] for row in body["ratios"])
    assert f"| {dense['weight_bytes'] / 1e6:,.1f} |" in out


@pytest.fixture
def timed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are timed in this process, where what is asked is not how they are told apart."""

    def pool(devices: list[str], handler: str, **_: Any) -> InProcessPool:
        module, name = handler.split(":")
        return InProcessPool(lambda: getattr(import_module(module), name)(devices[0]))

    monkeypatch.setattr(run, "ProcessPool", pool)


@pytest.mark.usefixtures("timed_here")
def test_a_shape_of_random_weights_needs_no_files(tmp_path: Path) -> None:
    fields = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 100}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    less = {**fields, "model_type": "selfpruner", "per_layer_config": {"1": {"num_attention_heads": 2, "num_key_value_heads": 1}}}
    for body in (fields, less):
        model = transformers_model.load(body, "cpu", "float32", tmp_path)
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        assert float(model.model.layers[0].mlp.gate_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        found = speed.read(model, tokens_of(1, 8, vocab=100))
        assert speed.write(model, found.cache, found.token, 2) > 0
    settings = Settings("transformers", 8, 2, 1, batches=(1,))
    report = asyncio.run(run.run({"dense": fields, "less": less}, settings, devices=("cpu",), dtype="float32", cache=tmp_path))
    assert report.ratio(report.subjects[1], "decode_1").bound > 1


@pytest.mark.slow
def test_compiled_steps_write_too(tmp_path: Path, tiny_llama: Path, pruned: Path) -> None:
    found = selfpruner.benchmark(
        [tiny_llama, pruned], prompt_tokens=8, new_tokens=4, repetitions=1, compiled=True, device="cpu", cache=tmp_path
    )
    assert all(subject.rate("decode_8") > 0 for subject in found.subjects)


# -- a server ------------------------------------------------------------------------------------------------------------
class Streaming:
    """Streams tokens of ``/v1/completions`` with pauses. ``mode`` is what it gets wrong."""

    PAUSE = 0.02

    def __init__(self, mode: str) -> None:
        self.bodies: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self._send(json.dumps({"data": [{"id": "served"}] + [{"id": "other"}] * (mode == "two")}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                if mode == "refuses":
                    self.send_error(400, f"no such thing for {self.headers['Authorization']}")
                    return
                self._send(b"")
                count = body["max_tokens"] - (mode == "stops")
                if mode == "at once":
                    self._chunk({"choices": [{"text": "a" * count}], "usage": {"completion_tokens": count}})
                    count = 0
                for token in range(1, count + 1):
                    if mode == "fails" and token == 2:
                        self._chunk({"error": {"message": f"engine died of {self.headers['Authorization']}"}})
                        return
                    time.sleep(outer.PAUSE)
                    usage = {} if mode == "no usage" else {"usage": {"completion_tokens": token}}
                    self._chunk({"choices": [{"text": "a"}], **usage})
                self.wfile.write(b"data: [DONE]\n\n")

            def _send(self, text: bytes) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text)

            def _chunk(self, body: dict[str, Any]) -> None:
                self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")
                self.wfile.flush()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def streaming(request: pytest.FixtureRequest) -> Iterator[Streaming]:
    server = Streaming(getattr(request, "param", ""))
    yield server
    server.close()


KEY = "sk-nobody-is-told"


def ask(url: str, call: Callable[[Server], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        server = Server(url, "served", 100, key=KEY)
        try:
            return await call(server)
        finally:
            await server.close()

    return asyncio.run(go())


@pytest.mark.parametrize("streaming", ["", "no usage"], indirect=True)
def test_a_server_is_timed_by_what_it_streams(streaming: Streaming, tmp_path: Path, tiny_llama: Path) -> None:
    asked = {"backend": "vllm", "urls": [streaming.url], "prompt_tokens": 16, "new_tokens": 8, "repetitions": 1}
    report = selfpruner.benchmark([tiny_llama], **asked, cache=tmp_path)
    (subject,) = report.subjects
    # The first token is no part of writing; the others come a pause apart, in every stream at once.
    assert subject.seconds["prefill"][0] >= Streaming.PAUSE
    assert subject.tokens["decode_1"] == [8]
    assert subject.seconds["decode_1"][0] > 7 * Streaming.PAUSE
    assert 8 <= subject.tokens["decode_8"][0] <= 64
    assert subject.peak_mib is None
    assert "peak" not in report.markdown()
    assert report.subjects[0].work.weight_bytes == 4 * (MATRICES + HEAD + 7 * 32)
    prompts = [tuple(body["prompt"]) for body in streaming.bodies]
    assert len(set(prompts)) == len(prompts), "nothing it has read before"
    assert all(len(prompt) == 16 and max(prompt) < 128 for prompt in prompts)


@pytest.mark.parametrize(
    ("streaming", "message"),
    [
        ("refuses", "refused a completion with 400"),
        ("stops", "wrote 4 of 5"),
        ("fails", "engine died"),
        ("at once", "all at once"),
    ],
    indirect=["streaming"],
)
def test_what_a_server_gets_wrong_is_named(streaming: Streaming, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message) as error:
        ask(streaming.url, lambda server: server.decode(DecodeRequest(batch=1, prompt=8, new_tokens=4)))
    assert KEY not in error.value.message


def test_which_server_and_which_model() -> None:
    with pytest.raises(ConfigError, match="no address"):
        Server("127.0.0.1:8000", "served", 100)
    with pytest.raises(BenchmarkError, match="Start the server"):
        ask("http://127.0.0.1:9", lambda server: server.model())
    two = Streaming("two")
    try:

        async def other() -> str:
            server = Server(two.url, "mine", 100)
            try:
                return await server.model()
            finally:
                await server.close()

        with pytest.raises(ConfigError, match="does not serve mine, but served, other"):
            asyncio.run(other())
    finally:
        two.close()


# -- bad input -----------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("timed_here")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--backend", "tensorrt"], 2, "Unknown backend 'tensorrt'"),
        (["--backend", "vllm"], 2, "needs the address"),
        (["--url", "http://127.0.0.1:1/v1"], 2, "takes no --url"),
        (["--prompt-tokens", "0"], 2, "prompt_tokens must be at least 1"),
        (["--repetitions", "0"], 2, "repetitions must be at least 1"),
        (["--prompt-tokens", "500", "--new-tokens", "64"], 2, "more than the 512 positions"),
        (["--dtype", "float8"], 2, "Unknown dtype 'float8'"),
        (["--device", "cuda:7"], 2, "cuda:7"),
        (["--backend", "vllm", "--url", "http://127.0.0.1:9/v1", "--compile"], 2, "Only --backend transformers"),
        (["nowhere/at/all", "--prompt-tokens", "16"], 2, "no model"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], code: int, message: str, tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    assert cli.run(["benchmark", str(tiny_llama), "-o", str(output), "--cache", str(tmp_path), *arguments]) == code
    _, err = capsys.readouterr()
    assert message in err
    assert sum(" · " not in line for line in err.splitlines()) == 1, "beside how far it is"
    assert not output.exists()


def test_figures_that_cannot_be_written_leave_those_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(file: Path, text: str, *_: object) -> None:
        file.write_bytes(text[:10].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("selfpruner.api.benchmark", lambda *_, **__: report_of("dense"))
    monkeypatch.setattr(Path, "write_text", half)
    output = tmp_path / "out.json"
    output.write_bytes(b"{}")
    assert cli.run(["benchmark", "m", "-o", str(output)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert ([file.name for file in tmp_path.iterdir()], output.read_bytes()) == (["out.json"], b"{}")


def test_where_to_write_is_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    for place, says in (
        (pipe, "is no ordinary file"),
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "none" / "out.json", "cannot be written"),
    ):
        assert cli.run(["benchmark", "nowhere/at/all", "-o", str(place)]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(ConfigError, match="once only"):
        selfpruner.benchmark(["a/b/c", "a/b/c"])
    with pytest.raises(ConfigError, match="at least one model"):
        selfpruner.benchmark([])
    with pytest.raises(UnknownNameError):
        selfpruner.benchmark(["a/b/c"], backend="vlm")


def test_llama_cpp_needs_its_package_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp_model, "PACKAGE", "no_such_package")
    with pytest.raises(BenchmarkError, match="not installed") as caught:
        selfpruner.benchmark([tmp_path / "model.gguf"], backend="llamacpp")
    assert caught.value.code == "backend_missing"
    monkeypatch.setattr(llamacpp_model, "PACKAGE", "json")
    with pytest.raises(ConfigError, match="holds 0 GGUF files"):
        llamacpp_model.file_of(str(tmp_path))
    (tmp_path / "one.gguf").touch()
    assert llamacpp_model.file_of(str(tmp_path)) == llamacpp_model.file_of(str(tmp_path / "one.gguf")) == tmp_path / "one.gguf"
    assert llamacpp_model.file_of("smollm2-135m") == models.embedded_file("smollm2-135m").resolve()
    with pytest.raises(ConfigError, match="has its own types"):
        selfpruner.benchmark([tmp_path], backend="llamacpp", dtype="float16")


def test_llama_cpp_runs_a_file(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test-llamacpp", exc_type=ImportError)
    found = selfpruner.benchmark(
        ["smollm2-135m"], backend="llamacpp", prompt_tokens=16, new_tokens=4, repetitions=1, cache=tmp_path
    )
    (subject,) = found.subjects
    assert subject.work.parameters == 134_515_008
    assert all(subject.rate(measure) > 0 for measure in found.measures)


# -- shapes of random weights --------------------------------------------------------------------------------------------
def test_shapes_vary_as_a_plan_does_and_remove_what_is_asked() -> None:
    plan = [0.0, 0.1, 0.5, 0.2]
    assert benchmark.layer_rates(plan, 4, 0.2) == pytest.approx(plan)
    assert benchmark.layer_rates(plan, 7, 0.2)[::2] == pytest.approx(
        [x * benchmark.layer_rates(plan, 7, 0.2)[2] / 0.1 for x in plan]
    )
    capped = benchmark.layer_rates(plan, 4, 0.5)
    assert sum(capped) == pytest.approx(2.0)
    assert max(capped) == 0.9
    dense = benchmark.dense_config("llama-2-7b")
    for rate in (0.3, 0.5):
        for multiple in (8, 64, 128, 256):
            pruned = benchmark.pruned_config(dense, benchmark.layer_rates(plan, 32, rate), multiple)
            layers = pruned["per_layer_config"].values()
            assert all(layer["intermediate_size"] % multiple == 0 for layer in layers)
            # All steps together miss the target by half of one.
            assert (
                abs(benchmark.removed(dense, pruned) - rate) * 32
                <= 0.5 * 3 * 4096 * multiple / (4 * 4096 * 4096 + 3 * 4096 * 11008) + 1e-9
            )
    # One layer by hand: 32 of 32 heads and 11008 channels, half of them gone.
    (half,) = benchmark.pruned_config({**dense, "num_hidden_layers": 1}, [0.5], 256)["per_layer_config"].values()
    assert half == {"num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 22 * 256}


@pytest.mark.usefixtures("timed_here")
def test_the_script_runs_on_a_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "speed.json"
    sizes = ["--prompt-tokens", "8", "--new-tokens", "2", "--repetitions", "1", "--device", "cpu", "--dtype", "float32"]
    benchmark.main(["--random-shape", "tiny", "--rates", "0.5", "--multiples", "8", *sizes, "--output", str(output)])
    body = json.loads(output.read_text())
    assert [row["multiple"] for row in body["rows"]] == [8]
    for row in body["rows"]:
        dense, pruned = row["models"]
        # Norms and embeddings stay.
        matrices = dense["work"]["matrices"]
        assert dense["work"]["parameters"] - pruned["work"]["parameters"] == pytest.approx(row["removed"] * matrices)
        assert row["removed"] == pytest.approx(0.5, abs=0.02)
        assert all(ratio["ratio"] > 0 and ratio["bound"] > 1 for ratio in row["ratios"])
    assert capsys.readouterr().out.count("| 1.70 |") == 3
    with pytest.raises(SystemExit):
        benchmark.main(["--random-shape", "tiny", "--multiples", "1024"])
