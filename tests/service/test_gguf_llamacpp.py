"""GGUF files run by llama.cpp itself against transformers: logits, greedy tokens, tokens of texts. `make test-llamacpp`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto import AutoTokenizer

from selfpruner.export import formats, gguf_runtime, gguf_tokenizer
from selfpruner.export.base import FinishedCheckpoint
from selfpruner.export.build import build
from selfpruner.export.checkpoint import load
from selfpruner.export.gguf import FAMILIES, Gguf
from selfpruner.pruning.layer_shapes import LayerShape
from selfpruner.testing.cut_models import Case, folder
from selfpruner.testing.tiny_models import tokens_of
from tests.helpers.gguf_files import PIECES, ROPES, VARYING, export, pruned, sentencepiece, uniform, with_pre_tokenizer

pytestmark = pytest.mark.skipif(
    not gguf_runtime.installed(), reason="llama-cpp-python is not installed; `make test-llamacpp` compiles and runs this"
)

PROMPTS, GENERATED = 4, 32
# With flash attention llama.cpp rounds keys and values to float16, whatever the cache holds.
BOUND, FLASH_BOUND = 1e-3, 0.1
WORDS = ("The capital of France is", "def add(a, b):\n    return", "My favourite book is about a", "Water boils at")


def greedy(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    """Each token through the cache; unlike ``generate`` it treats no token as an end."""
    given, cache, found = torch.tensor([tokens]), None, []
    while len(found) < GENERATED:
        out: Any = model(given, past_key_values=cache, use_cache=True)
        cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(int(given))
    return found


@torch.inference_mode()
def compare(
    model: PreTrainedModel, path: Path, prompts: list[list[int]], *, flash: bool = False, exact: PreTrainedModel | None = None
) -> float:
    """The largest difference of two logits; greedy tokens have to be equal, with flash attention up to a choice that was a tie.

    With ``exact``, the model in float64, llama.cpp is compared with that, and may be as far away as float32 is in transformers.
    """
    longest = max(map(len, prompts)) + GENERATED
    runtime = gguf_runtime.LlamaCpp(path, longest, flash_attention=flash)
    largest = 0.0
    try:
        for prompt in prompts:
            tokens, bound = torch.tensor([prompt]), FLASH_BOUND if flash else BOUND
            expected = model(tokens).logits[0].double()
            if exact is not None:
                truth = exact(tokens).logits[0].double()
                bound += 2 * float((expected - truth).abs().max())
                expected = truth
            difference = float((torch.from_numpy(runtime.logits(prompt)) - expected).abs().max())
            assert difference <= bound
            found, wanted = runtime.greedy(prompt, GENERATED), greedy(model, prompt)
            if flash and found != wanted:
                # What rounding may change is a choice between two tokens that were nearly as likely.
                same = next(index for index, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
                logits = model(torch.tensor([prompt + wanted[:same]])).logits[0, -1]
                assert float(logits[wanted[same]] - logits[found[same]]) <= 2 * FLASH_BOUND
            else:
                assert found == wanted
            largest = max(largest, difference)
    finally:
        runtime.close()
    return largest


def random_prompts() -> list[list[int]]:
    return [tokens_of(1, 6 + 5 * index, seed=index)[0].tolist() for index in range(PROMPTS)]


@pytest.mark.parametrize("flash", [False, True], ids=["", "flash"])
@pytest.mark.parametrize("variant", VARYING)
def test_varying_plans(tmp_path: Path, variant: str, flash: bool) -> None:
    made = pruned(tmp_path, **VARYING[variant])
    compare(made.case.pruned, made.file, random_prompts(), flash=flash)
    if not flash:
        found = made.verify()
        assert (found["problems"], found["llama_cpp"]) == ([], gguf_runtime.LlamaCpp(made.file, 8).version)
        assert found["llama_cpp_max_difference"] <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_plans(tmp_path: Path, family: str) -> None:
    for name, shape in (("square", LayerShape(2, 2, 48)), ("narrow", LayerShape(1, 2, 48))):
        made = uniform(tmp_path / name, family, shape)
        compare(made.case.pruned, made.file, random_prompts())


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_scaling(tmp_path: Path, rope: str) -> None:
    made = uniform(tmp_path, "llama", LayerShape(1, 2, 48), rope_parameters={"rope_theta": 10000.0, **ROPES[rope]})
    compare(made.case.pruned, made.file, random_prompts())


def test_rotary_scaling_of_a_varying_plan(tmp_path: Path) -> None:
    made = pruned(tmp_path, "llama", biased=True, rope_parameters={"rope_theta": 10000.0, **ROPES["llama3"]})
    compare(made.case.pruned, made.file, random_prompts())


@pytest.mark.parametrize("last", ["attention", "ffn", "nothing", "all"])
def test_blocks_that_are_gone(tmp_path: Path, last: str) -> None:
    """In every place: first, middle and last."""
    source, model = folder(tmp_path / "base", "llama", layers=6)
    kinds = {"all": (2, 2, 64), "ffn": (0, 0, 64), "attention": (2, 2, 0), "nothing": (0, 0, 0)}
    order = ["nothing", "ffn", "attention", "ffn", "nothing", last]
    case = Case(model, build(model, [LayerShape(*kinds[kind]) for kind in order], {}), [], {})
    made = export(tmp_path, case, source)
    compare(case.pruned, made.file, random_prompts())


@pytest.mark.parametrize("quantize", [name for name in Gguf.quantizations if name != "f32"])
def test_types(tmp_path: Path, quantize: str) -> None:
    """Weights of a size that real models have; what llama.cpp stores in another type is not counted as wrong."""
    source, model = folder(tmp_path / "base", "llama", hidden=256, ffn=768, heads=8, head_dim=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "embed" not in name:
                parameter.mul_(0.1)
    half = [LayerShape(2, 4, 768), LayerShape(2, 3, 512), LayerShape(1, 4, 544)]
    dense: dict[str, torch.Tensor] = model.state_dict()
    weights = {}
    for layer, shape in enumerate(half):
        heads, groups, width = 32 * shape.heads, 32 * shape.kv_groups, shape.channels
        cuts = {"q_proj": heads, "k_proj": groups, "v_proj": groups, "gate_proj": width, "up_proj": width}
        for name, value in dense.items():
            if name.startswith(f"model.layers.{layer}."):
                kind = name.split(".")[-2]
                if kind in cuts:
                    weights[name] = value[: cuts[kind]]
                elif kind in ("o_proj", "down_proj"):
                    weights[name] = value[:, : heads if kind == "o_proj" else width]
    made = export(tmp_path, Case(model, build(model, half, weights), [], {}), source, quantize)
    found = made.verify()
    assert found["problems"] == []
    assert found["llama_cpp_error"] <= found["allowed_error"] / 2
    assert abs(found["llama_cpp_error"] - found["error"]) <= 0.5 * found["error"] + 0.01, "both read the same weights"


def test_an_export_is_proven_by_llama_cpp(tmp_path: Path) -> None:
    made = pruned(tmp_path, "llama", biased=True)
    result = formats.convert(made.checkpoint.folder, tmp_path / "out", "gguf", quantize="q4_0")
    assert result.verification["problems"] == []
    assert result.verification["llama_cpp"]
    assert {path.suffix for path in result.path.iterdir()} == {".gguf", ".json", ".md", ""}
    assert formats.verify(result.path)["verification"]["types"] == result.verification["types"]


TEXTS = (
    gguf_tokenizer.PROBE,
    "",
    " ",
    "\n",
    "The 3 quick brown foxes didn't pay $1,299.99 \t in 2024!\n\n\n  Ok?",
    "naïve café — “quoted” … 你好，世界 🙂🙃 Привет, мир! 한국어 हिन्दी ½",
)


@pytest.mark.parametrize("kind", [*gguf_tokenizer._pre_tokenizers(), "sentencepiece", "sentencepiece without prefix"])
def test_tokens(tmp_path: Path, kind: str) -> None:
    """llama.cpp cuts texts as transformers does and as our computation of its tokens does."""
    if kind.startswith("sentencepiece"):
        tokenizer = sentencepiece(PIECES, prefix=kind == "sentencepiece")
    else:
        pre, ignore_merges = gguf_tokenizer._pre_tokenizers()[kind]
        tokenizer = with_pre_tokenizer(pre, ignore_merges=ignore_merges)
    source, model = folder(tmp_path / "base", "llama", vocab=300)
    tokenizer.save_pretrained(source)
    made = export(tmp_path, Case(model, build(model, [LayerShape(2, 2, 64)] * 3, {}), [], {}), source)
    runtime = gguf_runtime.LlamaCpp(made.file, 16)
    for text in TEXTS:
        expected = AutoTokenizer.from_pretrained(source)(text, verbose=False)["input_ids"]
        assert runtime.tokenize(text) == expected, text
        assert gguf_tokenizer.encode(made.keys, text) == expected, text
    runtime.close()


# -- the real model ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M with every width, query-head and KV count varying by layer, repaired with biases."""
    from selfpruner import api

    root = os.environ.get("SELFPRUNER_DATA")
    if not root:
        pytest.skip("needs real text: set SELFPRUNER_DATA to the folder that has wikitext2/")
    place = tmp_path_factory.mktemp("real")
    shutil.copyfile(Path(root) / "wikitext2" / "wiki.train.head.raw", place / "train.txt")
    calibration = {"sources": [{"source": str(place / "train.txt")}], "sequences": 16, "length": 256}
    rates = [0.1 + 0.4 * ((7 * index) % 30) / 29 for index in range(30)]
    how = {"criterion": "flap", "calibration": calibration, "device": "cpu"}
    made = api.prune(place / "checkpoint", rate=0.3, rates=rates, cache=place / "cache", **how)
    return made.path


@pytest.mark.timeout(1800)
def test_the_real_model(real: Path, tmp_path: Path) -> None:
    shapes = FinishedCheckpoint.open(real).shapes
    assert min(len({getattr(shape, name) for shape in shapes}) for name in ("channels", "heads", "kv_groups")) > 1
    made = formats.convert(real, tmp_path / "f32", "gguf", quantize="f32")
    assert made.verification["architecture"] == "deci"
    (path,) = made.path.glob("*.gguf")
    model, tokenizer = load(real, dtype=torch.float32), AutoTokenizer.from_pretrained(real)
    prompts = [tokenizer(text)["input_ids"] for text in WORDS]
    # Where hidden states are as large as 2e4, in float32 transformers itself is 1e-3 away from float64.
    exact = load(real, dtype=torch.float64)
    found = {"difference": compare(model, path, prompts, exact=exact), "flash": compare(model, path, prompts, flash=True)}
    del exact
    runtime = gguf_runtime.LlamaCpp(path, 16)
    assert runtime._model.metadata["tokenizer.ggml.pre"] == "smollm"
    for text in (*TEXTS, *WORDS):
        assert runtime.tokenize(text) == tokenizer(text)["input_ids"]
    runtime.close()
    for quantize in ("q8_0", "q4_k_m"):
        smaller = formats.convert(real, tmp_path / quantize, "gguf", quantize=quantize)
        assert smaller.bytes < made.bytes / 2
        found |= {quantize: smaller.verification["llama_cpp_error"]}
    print(json.dumps(found))
