"""Pruned checkpoints in vLLM: the same tokens and log-probabilities as in transformers, native and through vLLM's own Transformers
backend; and vLLM as a proposer. ``make test-vllm`` runs the slow part, with a vLLM in an environment of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import selfpruner
from selfpruner.errors import UnsupportedModelError
from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.export.modeling_selfpruner import SelfPrunerConfig, SelfPrunerForCausalLM
from selfpruner.export.vllm_plugin import ARCHITECTURES, check
from selfpruner.operators.plan_format import PlanFormat
from selfpruner.proposers.base import Request
from selfpruner.proposers.openai import OpenAIProposer
from selfpruner.proposers.reply import follows
from selfpruner.proposers.settings import ProposerSettings
from selfpruner.testing import ExportedModelSuite
from selfpruner.testing.cut_models import folder, prune
from selfpruner.testing.spaces import space_of
from selfpruner.testing.tiny_models import tiny_tokenizer, tokens_of
from tests.helpers import ROOT


# -- the plugin, without vLLM ------------------------------------------------------------------------------------------
def config(*layers: tuple[int, int, int], **options: Any) -> SelfPrunerConfig:
    """One layer per (query heads, KV heads, FFN channels); the dense layer has 8, 4 and 64."""
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    return SelfPrunerConfig(
        **dict(zip(keys, (8, 4, 64), strict=True)),
        hidden_size=32,
        head_dim=8,
        num_hidden_layers=len(layers),
        per_layer_config={index: dict(zip(keys, layer, strict=True)) for index, layer in enumerate(layers)},
        **options,
    )


def test_every_tensor_parallel_size_that_divides_is_taken() -> None:
    mixed = config((8, 4, 64), (4, 4, 32), (0, 0, 48), (8, 2, 0))
    for size in (1, 2, 4):
        check(mixed, size)  # two KV heads on four devices are copied


@pytest.mark.parametrize(
    ("layer", "size", "problem"),
    [
        ((3, 3, 64), 2, "keeps 3 query heads, which 2 devices"),
        ((6, 3, 64), 2, "keeps 3 KV heads, which 2 devices"),
        ((8, 4, 62), 4, "keeps 62 FFN channels, which 4 devices"),
        ((12, 3, 64), 4, "keeps 3 KV heads, which 4 devices"),
    ],
)
def test_a_plan_that_devices_cannot_share_is_refused(layer: tuple[int, int, int], size: int, problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem) as caught:
        check(config((8, 4, 64), layer), size)
    assert caught.value.message.startswith("Layer 1 ")
    assert f"tensor_parallel={size}" in caught.value.message
    check(config((8, 4, 64), layer), 1)


def test_what_vllm_cannot_compute_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no gated form of the activation 'relu'"):
        check(config((8, 4, 64), (4, 2, 64), hidden_act="relu"), 1)
    with pytest.raises(UnsupportedModelError, match="No layer of this plan has attention"):
        check(config((0, 0, 64), (0, 0, 32)), 1)


@pytest.mark.parametrize("family", MODELING_FILES)
def test_every_family_has_a_native_class_and_is_checked(tmp_path: Path, family: str) -> None:
    _, model = folder(tmp_path / "base", family)
    own = prune(model, drop=True, biased=True).pruned.config
    assert MODELING_FILES[family].causal_lm.__name__ in ARCHITECTURES
    check(own, 1)
    with pytest.raises(UnsupportedModelError, match="which 16 devices cannot share evenly"):
        check(own, 16)


def test_the_plugin_is_an_entry_point_that_imports_no_vllm() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["selfpruner"].split(":")
    script = (
        "import sys; sys.modules['vllm'] = None\n"
        f"from {module} import {function}\n"
        "print('selfpruner.export.vllm_model' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"], "the class needs vLLM"


# -- with vLLM ---------------------------------------------------------------------------------------------------------
PYTHON = os.environ.get("SELFPRUNER_VLLM_PYTHON", "")
with_vllm = pytest.mark.skipif(
    not PYTHON,
    reason="needs vLLM in an environment of its own: `make test-vllm` makes one and names its python in SELFPRUNER_VLLM_PYTHON",
)
slow = [pytest.mark.slow, pytest.mark.timeout(3600), with_vllm]

READY_SECONDS = 900.0  # on two busy cores; one to two minutes on two idle ones
LENGTH, NEW, CACHE_GIB = 512, 32, 1
# Largest difference of log-probabilities in float32; ordinary noise is 1e-5 to 1e-4.
TOLERANCE = 2e-4
PROMPTS = (
    "The capital of France is",
    "Water boils when it is heated because",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a king who had three daughters. The eldest",
)
# Attention and FFN of layer l: rates that make widths, query heads and KV heads all vary.
RATES = [rate for layer in range(30) for rate in ((0.0, 0.25, 0.45, 0.12)[layer % 4], (0.1, 0.0, 0.3, 0.2, 0.05)[layer % 5])]
# The families with forms of their own.
OTHERS = ("gemma2", "gemma3_text", "phi3", "opt")
BACKENDS = {"native": [], "transformers": ["--trust-remote-code", "--model-impl", "transformers"]}


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)


@contextmanager
def process(log: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of vLLM's environment with all its children, ended with the block."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "HF_MODULES_CACHE": str(log.parent / "modules"),
        **environment,
    }
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as out:
        running = subprocess.Popen(
            [PYTHON, *arguments], stdout=out, stderr=out, env={**outside, **settings}, cwd=log.parent, start_new_session=True
        )
    try:
        yield running
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(running.pid, kind)
                running.wait(timeout=30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        running.wait()


@contextmanager
def serving(folder: Path, backend: str, place: Path, *options: str, **environment: str) -> Iterator[Server]:
    """vLLM's API server for ``folder`` on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place.mkdir(parents=True)
    where = ["--model", str(folder), "--served-model-name", "pruned", "--host", "127.0.0.1", "--port", str(port)]
    small = ["--dtype", "float32", "--max-model-len", str(LENGTH), "--max-num-seqs", "4", "--enforce-eager"]
    # A stranger's vLLM knows nothing of selfpruner: the Transformers backend has to do with the folder's own code.
    plugins = {} if backend == "native" else {"VLLM_PLUGINS": "none"}
    log = place / "server.log"
    command = ["-m", "vllm.entrypoints.openai.api_server", *where, *small, *BACKENDS[backend], *options]
    with process(log, *command, **plugins, **environment) as server:
        found = Server(f"http://127.0.0.1:{port}", log)
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                urllib.request.urlopen(found.url + "/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, f"vLLM ended with code {server.returncode}: {log.read_text()[-4000:]}"
                assert time.monotonic() < deadline, f"vLLM is not ready after {READY_SECONDS} s: {log.read_text()[-4000:]}"
                time.sleep(1)
        yield found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2-135M under one plan, as it is and repaired, which gives biases to what was cut."""
    root = tmp_path_factory.mktemp("vllm")
    found = {}
    for name, compensation in (("plain", "none"), ("biased", "least_squares")):
        found[name] = root / name
        text = {"sources": [{"source": "pydoc"}], "sequences": 16, "length": 128}
        selfpruner.prune(
            found[name], rates=RATES, model="smollm2-135m", compensation=compensation, calibration=text, cache=root / "cache"
        )
        layers = json.loads((found[name] / "plan.json").read_text())["layers"]
        for what in ("ffn_channels", "query_heads", "kv_groups"):
            assert len({layer[what] for layer in layers}) > 1, f"every layer keeps as many {what}"
    with safe_open(found["plain"] / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.endswith(".bias")]  # noqa: SIM118 - not a mapping
    with safe_open(found["biased"] / "model.safetensors", "pt") as file:
        for projection in ("o_proj", "down_proj"):
            biases = [name for name in file.keys() if name.endswith(f"{projection}.bias")]  # noqa: SIM118
            assert 0 < len(biases) < len(layers), f"{len(biases)} layers have a bias on {projection}"
    return found


@cache
def reference(folder: Path) -> tuple[PreTrainedModel, list[list[int]]]:
    """The checkpoint in transformers and float32, and the prompts' tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = selfpruner.load(folder, dtype=torch.float32)
    return model, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def greedy(model: PreTrainedModel, prompt: list[int], new: int) -> tuple[list[int], Tensor]:
    """``new`` greedy tokens of transformers after ``prompt``, and the log-probability of every token but the first."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        how = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        table = model(out[:, :-1]).logits[0].double().log_softmax(-1)
    return out[0, len(prompt) :].tolist(), table.gather(-1, out[0, 1:, None])[:, 0]


def assert_same(server: Server, model: PreTrainedModel, prompts: list[list[int]]) -> float:
    """Greedy tokens are equal, and log-probabilities within ``TOLERANCE``; returns their largest difference."""
    how = {"model": "pruned", "temperature": 0, "max_tokens": NEW, "min_tokens": NEW}
    asked = {"logprobs": 0, "prompt_logprobs": 0, "return_token_ids": True}
    choices = server.post("/v1/completions", {"prompt": prompts, **how, **asked})["choices"]
    largest = 0.0
    for prompt, choice in zip(prompts, choices, strict=True):
        tokens, expected = greedy(model, prompt, NEW)
        assert choice["token_ids"] == tokens
        seen = [entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)]
        found = torch.tensor(seen + choice["logprobs"]["token_logprobs"], dtype=torch.float64)
        largest = max(largest, float((found - expected).abs().max()))
    assert largest <= TOLERANCE
    return largest


# Run by vLLM's python, all models in one process: starting takes longer than all the rest.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

work = json.load(open(sys.argv[1]))
how = SamplingParams(temperature=0, max_tokens=work["new"], min_tokens=work["new"], logprobs=0, prompt_logprobs=0)
found = {}
for name, folder in work["folders"].items():
    try:
        model = LLM(
            folder,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=4,
            enforce_eager=True,
            distributed_executor_backend="uni",
            **work["backend"],
        )
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
        continue
    rows = []
    for out in model.generate([{"prompt_token_ids": prompt} for prompt in work["prompts"]], how, use_tqdm=False):
        (new,) = out.outputs
        pairs = [*zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:]), *zip(new.token_ids, new.logprobs)]
        rows.append({"tokens": list(new.token_ids), "logprobs": [seen[token].logprob for token, seen in pairs]})
    found[name] = rows
    del model
    cleanup_dist_env_and_memory()
json.dump(found, open(sys.argv[2], "w"))
"""


@dataclass
class Tried:
    """Tiny models that one vLLM process is to run, each saved in a folder under ``place``."""

    place: Path
    models: dict[str, PreTrainedModel] = field(default_factory=dict)

    def add(self, name: str, family: str, drop: bool, biased: bool, **options: Any) -> None:
        # Heads of 32: vLLM's attention on CPUs takes no narrower ones. OPT's are a part of the hidden size, and so are those that
        # a long rope of Phi-3 is checked against.
        wide = {"hidden": 128} if family in ("opt", "phi3") else {}
        _, model = folder(self.place / name, family, head_dim=32, **wide, **options)
        self.models[name] = prune(model, drop=drop, biased=biased).pruned
        self.models[name].save_pretrained(self.place / name / "pruned")
        tiny_tokenizer().save_pretrained(self.place / name / "pruned")
        config, form = self.place / name / "pruned" / "config.json", MODELING_FILES[family]
        shutil.copyfile(form.code, config.parent / form.code.name)
        config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": form.auto_map}))

    def run(self, backend: dict[str, Any], **environment: str) -> dict[str, Any]:
        """Greedy tokens and log-probabilities of every model must be those of transformers; returns why others failed to load."""
        prompts = [tokens_of(1, length, seed=length)[0].tolist() for length in (40, 23)]
        folders = {name: str(self.place / name / "pruned") for name in self.models}
        work, out, log = (self.place / name for name in ("work.json", "found.json", "forms.log"))
        work.write_text(json.dumps({"folders": folders, "prompts": prompts, "new": 16, "backend": backend}))
        with process(log, "-c", SCRIPT, str(work), str(out), VLLM_ENABLE_V1_MULTIPROCESSING="0", **environment) as running:
            assert running.wait(timeout=3000) == 0, log.read_text()[-4000:]
        failed = {}
        for name, rows in json.loads(out.read_text()).items():
            if isinstance(rows, str):
                failed[name] = rows
                continue
            for prompt, row in zip(prompts, rows, strict=True):
                tokens, expected = greedy(self.models[name], prompt, 16)
                assert row["tokens"] == tokens, name
                difference = float((torch.tensor(row["logprobs"], dtype=torch.float64) - expected).abs().max())
                # Random weights say things as improbable as no real model's, and rounding grows with that.
                least = float(expected.min())
                print(f"{name}: largest difference of log-probabilities {difference:.1e}, the least of them {least:.1f}")
                assert difference <= TOLERANCE * max(1.0, -least / 10), name
        return failed


class TestForms:
    """Every form of pruned models, tiny: all families, q and k norms, biases, windows, caps, dropped blocks, untied heads."""

    pytestmark = slow

    def test_the_native_classes_give_the_tokens_of_transformers(self, tmp_path: Path) -> None:
        tried = Tried(tmp_path)
        for form in ExportedModelSuite.__subclasses__():
            tried.add(form.__name__, form.family, form.drop, form.biased, tied=form.tied, **form.options)
        for family in OTHERS:
            tried.add(family, family, False, False)
            tried.add(f"{family}-dropped-biased", family, True, True)
        # Up to the original length: beyond it vLLM takes the long factors for all texts, transformers for those that are longer.
        factors = {"short_factor": [1 + index / 32 for index in range(16)], "long_factor": [1 + index / 4 for index in range(16)]}
        rope = {"rope_type": "longrope", **factors}
        tried.add("phi3-long", "phi3", False, True, rope_parameters=rope, original_max_position_embeddings=256)
        tried.add("gelu", "llama", True, True, hidden_act="gelu_pytorch_tanh")
        tried.add("relu", "llama", False, False, hidden_act="relu")
        failed = tried.run({})
        assert failed.pop("relu").startswith("UnsupportedModelError: vLLM has no gated form of the activation 'relu'")
        assert failed == {}

    def test_its_transformers_backend_takes_the_other_families_too(self, tmp_path: Path) -> None:
        """As they are, with the folder's own code; ``TestServed`` does that for a Llama."""
        tried = Tried(tmp_path)
        for family in OTHERS:
            tried.add(family, family, False, True)
        assert tried.run({"model_impl": "transformers", "trust_remote_code": True}, VLLM_PLUGINS="none") == {}


class TestTensorParallel:
    """Two processes that share a model whose layers differ; and one that cannot be shared."""

    pytestmark = slow

    @pytest.fixture
    def model(self, request: pytest.FixtureRequest, tmp_path: Path) -> SelfPrunerForCausalLM:
        """Saved in ``tmp_path / "pruned"``; each layer has ``request.param`` KV heads less than the one before."""
        _, dense = folder(tmp_path / "dense", "qwen3", heads=8, kv_heads=4, head_dim=32)
        pruned = prune(dense, drop=True, biased=True, group_step=request.param).pruned
        pruned.save_pretrained(tmp_path / "pruned")
        tiny_tokenizer().save_pretrained(tmp_path / "pruned")
        return pruned

    @staticmethod
    def on_two(place: Path) -> AbstractContextManager[Server]:
        # One core each: left alone, vLLM binds each of them to a NUMA node of its own.
        return serving(place / "pruned", "native", place / "server", "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="0|1")

    @pytest.mark.parametrize("model", [2], indirect=True)
    def test_two_devices_compute_what_one_does(self, model: SelfPrunerForCausalLM, tmp_path: Path) -> None:
        if os.cpu_count() == 1:
            pytest.skip("needs two cores")
        with self.on_two(tmp_path) as server:
            largest = assert_same(server, model, [tokens_of(1, length, seed=length)[0].tolist() for length in (40, 23)])
        print(f"\ntensor parallel 2: largest difference of log-probabilities {largest:.1e}")

    @pytest.mark.parametrize("model", [1], indirect=True)
    @pytest.mark.usefixtures("model")
    def test_a_plan_that_cannot_be_shared_is_refused_at_load(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="vLLM ended with code 1"), self.on_two(tmp_path):
            pass
        assert (
            "UnsupportedModelError: Layer 1 keeps 3 KV heads, which 2 devices cannot share"
            in (tmp_path / "server" / "server.log").read_text()
        )


@dataclass(frozen=True)
class Served:
    name: str
    backend: str
    folder: Path
    server: Server


@pytest.fixture(scope="module", params=product(BACKENDS, ("plain", "biased")), ids="-".join)
def served(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One server per backend and checkpoint, for all the tests below."""
    backend, variant = request.param
    with serving(checkpoints[variant], backend, tmp_path_factory.mktemp("server") / "place") as server:
        yield Served(f"{backend}, {variant}", backend, checkpoints[variant], server)


class TestServed:
    pytestmark = slow

    def test_tokens_and_log_probabilities_are_those_of_transformers(self, served: Served) -> None:
        largest = assert_same(served.server, *reference(served.folder))
        print(f"\n{served.name}: largest difference of log-probabilities {largest:.1e}")
        (resolved,) = set(re.findall(r"Resolved architecture: (\w+)", served.server.log.read_text()))
        assert (resolved in ARCHITECTURES) == (served.backend == "native")

    def test_the_kv_cache_holds_more_tokens(self, served: Served) -> None:
        (found,) = set(re.findall(r"KV cache size: ([\d,]+) tokens", served.server.log.read_text()))
        tokens = int(found.replace(",", ""))
        layers = json.loads((served.folder / "plan.json").read_text())["layers"]
        per_token = sum(layer["kv_groups"] for layer in layers) * 2 * 64 * 4
        dense_per_token = len(layers) * 3 * 2 * 64 * 4
        print(f"\n{served.name}: room for {tokens:,} tokens, dense {CACHE_GIB * 2**30 // dense_per_token:,}")
        assert 0.99 * CACHE_GIB * 2**30 / per_token <= tokens <= CACHE_GIB * 2**30 / per_token
        assert per_token < 0.95 * dense_per_token

    def test_it_proposes_under_a_json_schema(self, served: Served) -> None:
        """The reply of a model this small follows the schema only because the server makes it."""
        url = served.server.url + "/v1"
        proposer = OpenAIProposer("vllm", ProposerSettings(kind="openai", model="pruned", base_url=url, timeout=600, max_retries=0))
        messages = ({"role": "user", "content": "Tell me about the sea."},)
        schema = PlanFormat(space_of()).schema(1)
        reply = asyncio.run(proposer.complete(Request("initialize", messages, schema, 0.8, 400, seed=1)))
        assert follows(reply.text, schema), reply.text
        assert proposer._dialect.response_format == "json_schema", "the server refused the schema"
        assert 0 < reply.completion_tokens <= 400
        body = {"model": "pruned", "messages": list(messages), "max_tokens": 400, "temperature": 0.8, "seed": 1}
        free = served.server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
        assert not follows(free, schema), "the schema changed nothing"
