"""GGUF out: what the file says, what it computes when it is read back, and what is refused. No llama.cpp here; see
test_gguf_llamacpp.py for the same files run by it."""

from __future__ import annotations

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers.models.auto import AutoModelForCausalLM

import selfpruner.testing.tiny_models as tiny
from selfpruner.errors import ExportError, FormatError
from selfpruner.export import gguf, gguf_runtime, gguf_tokenizer, verify_gguf
from selfpruner.export.base import FinishedCheckpoint
from selfpruner.export.build import build
from selfpruner.export.gguf import Gguf
from selfpruner.models import gguf as model_gguf
from selfpruner.pruning.layer_shapes import LayerShape
from selfpruner.testing.cut_models import Case, folder, prune
from selfpruner.testing.tiny_models import tokens_of
from tests.helpers import GOLDEN, ROOT
from tests.helpers.gguf_files import (
    PIECES,
    ROPES,
    VARYING,
    Made,
    checkpoint_of,
    export,
    pruned,
    sentencepiece,
    uniform,
    with_pre_tokenizer,
    wrapped,
)


def described(made: Made) -> str:
    """A file's metadata and tensors as text, long arrays as their sha256."""
    lines = []
    for name, value in made.keys.items():
        long = isinstance(value, list) and len(value) > 8
        digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
        lines.append(f"{name} = {f'{len(value)} values, sha256 {digest}' if long else json.dumps(value)}")
    return "\n".join([*lines, "", *(f"{name} {kind} {list(shape)}" for name, (kind, shape) in made.tensors.items()), ""])


# -- what is written ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARYING)
def test_a_varying_plan_is_read_back_equal(tmp_path: Path, variant: str) -> None:
    made = pruned(tmp_path, **VARYING[variant])
    found = made.verify()
    assert found["problems"] == []
    assert found["architecture"] == ("openelm" if variant.startswith("qwen3") else "deci")
    assert found["max_difference"] <= 1e-5 * found["max_logit"]
    assert {kind for kind, _ in made.tensors.values()} == {"F32"}
    assert ("output.weight" in made.tensors) == (not made.checkpoint.config.get("tie_word_embeddings", False))
    assert made.file.name == "tiny-pruned-F32.gguf"


@pytest.mark.parametrize(
    "name", [*("llama", "mistral", "qwen2", "qwen3", "phi3"), *("llama-uniform", "qwen2-uniform", "qwen2-narrow", "qwen3-uniform")]
)
def test_golden_headers(tmp_path: Path, name: str) -> None:
    """To renew a golden file, delete it and run this test: it writes the file and fails."""
    family, _, kind = name.partition("-")
    if kind:
        made = uniform(tmp_path, family, LayerShape(1 if kind == "narrow" else 2, 2, 48))
    else:
        made = pruned(tmp_path, family, biased=family != "qwen3")
    golden = GOLDEN / f"gguf_{name}.txt"
    if not golden.exists():
        golden.write_text(described(made))
        pytest.fail(f"{golden} was missing and has been written")
    assert described(made) == golden.read_text()
    assert made.verify()["problems"] == []


@pytest.mark.parametrize("family", gguf.FAMILIES)
@torch.inference_mode()
def test_transformers_reads_a_uniform_plan(tmp_path: Path, family: str) -> None:
    """Another reader, for the architectures that it knows; and selfpruner can go on from its own file."""
    made = uniform(tmp_path, family, LayerShape(2, 2, 48))
    assert made.keys["general.architecture"] == {"mistral": "llama", "phi3": "llama"}.get(family, family)
    model = AutoModelForCausalLM.from_pretrained(model_gguf.convert(made.file, tmp_path / "models"))
    tokens = tokens_of(2, 20)
    assert (model(tokens).logits - made.case.pruned(tokens).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in gguf.FAMILIES])
def test_other_families_are_refused(tmp_path: Path, family: str) -> None:
    source, model = folder(tmp_path / "base", family)
    with pytest.raises(FormatError, match=f"of the family {family} cannot be written. GGUF is written for llama"):
        export(tmp_path, prune(model, drop=False, biased=False), source)


def test_blocks_that_are_gone(tmp_path: Path) -> None:
    """No heads is said as 0, but for the first layer; an FFN of zeros follows an attention; nothing at all is left out."""
    source, model = folder(tmp_path / "base", "llama", layers=5)
    full, no_attention, no_ffn, nothing = LayerShape(2, 2, 64), LayerShape(0, 0, 64), LayerShape(2, 2, 0), LayerShape(0, 0, 0)
    case = Case(model, build(model, [nothing, no_attention, no_ffn, no_attention, full], {}), [], {})
    made = export(tmp_path, case, source)
    keys, tensors = made.keys, made.tensors
    assert keys["deci.block_count"] == 4
    assert keys["deci.attention.head_count"] == [1, 4, 0, 4]
    assert keys["deci.attention.head_count_kv"] == [1, 2, 0, 2]
    assert keys["deci.feed_forward_length"] == [64, 32, 64, 64]
    assert not [name for name in tensors if name.startswith("blk.2.attn")]
    reader = {tensor.name: tensor.data for tensor in GGUFReader(made.file).tensors}
    assert not reader["blk.0.attn_output.weight"].any()
    assert not reader["blk.1.ffn_down.weight"].any()
    assert made.verify()["problems"] == []
    with pytest.raises(FormatError, match="lost every block"):
        Gguf().check(checkpoint_of(tmp_path / "none", Case(model, build(model, [nothing] * 5, {}), [], {}), source), None)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_scaling(tmp_path: Path, rope: str) -> None:
    made = uniform(tmp_path, "llama", LayerShape(1, 2, 48), rope_parameters={"rope_theta": 10000.0, **ROPES[rope]})
    found = made.verify()
    assert found["problems"] == []
    assert found["max_difference"] <= 1e-5 * found["max_logit"]
    assert ("rope_freqs.weight" in made.tensors) == (rope == "llama3")


def test_a_window_bounds_the_context(tmp_path: Path) -> None:
    assert pruned(tmp_path / "m", "mistral", sliding_window=32).keys["deci.context_length"] == 32
    assert pruned(tmp_path / "q", "qwen2").keys["deci.context_length"] == 512


@pytest.mark.parametrize(
    ("quantize", "types"), [("f16", {"F16", "F32"}), ("bf16", {"BF16", "F32"}), ("q8_0", {"Q8_0", "F16", "F32"})]
)
def test_types(tmp_path: Path, quantize: str, types: set[str]) -> None:
    made = pruned(tmp_path, "llama", quantize, biased=True, ffn=96, hidden=64)
    found = made.verify()
    assert found["problems"] == []
    assert found["max_difference"] > 0, "what is rounded cannot be equal"
    assert set(found["types"]) == types
    # Vectors, biases among them, stay float32; rows that are no multiple of 32 numbers are float16.
    for name, (kind, shape) in made.tensors.items():
        assert (kind == "F32") == (len(shape) == 1), name
        if quantize == "q8_0" and len(shape) > 1:
            assert kind == ("F16" if shape[1] % 32 else "Q8_0"), name
    text = Gguf().use(made.checkpoint, quantize)
    assert ("`ffn_step` that is a multiple of 32" in text) == (quantize == "q8_0")


def test_the_checkpoints_own_type_is_the_default(tmp_path: Path) -> None:
    made = pruned(tmp_path, "llama", dtype="bfloat16")
    assert {kind for kind, _ in made.tensors.values()} == {"BF16", "F32"}
    assert made.file.name == "tiny-pruned-BF16.gguf"
    found = made.verify()
    assert (found["problems"], found["max_difference"]) == ([], 0.0)


def test_numbers_that_float16_cannot_hold(tmp_path: Path) -> None:
    source, model = folder(tmp_path / "base", "llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = 1e6
    case = Case(model, build(model, [LayerShape(2, 2, 64)] * 3, {}), [], {})
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight has numbers that torch\.float16 cannot hold"):
        export(tmp_path, case, source, "f16")


def test_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of rows give the same file, also where a run has to be whole heads."""
    once = pruned(tmp_path / "once", "llama", biased=True)
    monkeypatch.setattr(gguf, "_PIECE", 8 * 32)
    assert pruned(tmp_path / "pieces", "llama", biased=True).file.read_bytes() == once.file.read_bytes()


def test_cancelling(tmp_path: Path) -> None:
    made = pruned(tmp_path, "llama")
    polls = iter(range(100))

    def go_on() -> None:
        if next(polls) > 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Gguf().write(made.checkpoint, tmp_path, None, go_on)


# -- what is refused ---------------------------------------------------------------------------------------------------
def refusal(made: FinishedCheckpoint, quantize: str | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        Gguf().check(made, quantize)
    return caught.value.message


def test_what_llama_cpp_lacks_beside_norms_on_q_and_k(tmp_path: Path) -> None:
    source, model = folder(tmp_path / "base", "qwen3")
    bias = {"model.layers.1.mlp.down_proj.bias": torch.ones(32)}
    case = Case(model, build(model, [LayerShape(2, 2, 64)] * 3, bias), [], {})
    assert "biases on its matrices" in refusal(checkpoint_of(tmp_path / "biased", case, source))
    source, model = folder(tmp_path / "untied", "qwen3", tied=False)
    message = refusal(checkpoint_of(tmp_path / "varying", prune(model, drop=False, biased=False), source))
    assert "layers that differ and an lm_head of its own" in message
    assert "initial: uniform" in message
    source, model = folder(tmp_path / "scaled", "qwen3", rope_parameters={"rope_theta": 1e4, **ROPES["llama3"]})
    assert "this rotary scaling" in refusal(checkpoint_of(tmp_path / "s", prune(model, drop=False, biased=False), source))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary embedding 'dynamic'"),
        (
            {"rope_parameters": {**ROPES["yarn"], "rope_theta": 1e4, "beta_fast": 16.0}},
            "rotary embedding 'yarn' with beta_fast",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    source, model = folder(tmp_path / "base", "llama", **options)
    case = Case(model, build(model, [LayerShape(2, 2, 64)] * 3, {}), [], {})
    assert match in refusal(checkpoint_of(tmp_path / "checkpoint", case, source))


def test_the_quantiser_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pruned(tmp_path, "llama").checkpoint
    monkeypatch.setattr(gguf_runtime, "installed", lambda: False)
    assert "pip install 'llama-cpp-python>=0.3.36'" in refusal(made, "q4_k_m")
    Gguf().check(made, "q8_0")


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def split(pattern: str, behavior: str = "isolated") -> Any:
    p: Any = pre_tokenizers
    return p.Sequence([p.Split(Regex(pattern), behavior), p.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("name", gguf_tokenizer._pre_tokenizers())
def test_pre_tokenizers_are_told_apart(name: str) -> None:
    pre, ignore_merges = gguf_tokenizer._pre_tokenizers()[name]
    keys = gguf_tokenizer.metadata(with_pre_tokenizer(pre, ignore_merges=ignore_merges), 128)
    assert (keys["tokenizer.ggml.pre"], keys["tokenizer.ggml.model"]) == (name, "gpt2")


P: Any = pre_tokenizers
STRANGE = {
    "no contractions": split(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + gguf_tokenizer._REST),
    "marks are letters": split(gguf_tokenizer._QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+")),
    "two digits": split(gguf_tokenizer._QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,2}|")),
    "no newlines after punctuation": split(gguf_tokenizer._QWEN2.replace(r"[\r\n]*|", "|")),
    "contractions end words": split(gguf_tokenizer._TEKKEN.replace(r"*|\p{N}", r"*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}")),
    "long runs of spaces": split(gguf_tokenizer._LLAMA3.removesuffix(r"|\s+(?!\S)|\s+") + r"|\s{512}(?!\S)|\s{1,2}(?!\S)|\s{1}"),
    "lines": P.Sequence([P.Split(Regex(r"[^\n]+|[\n]+"), "isolated"), split(gguf_tokenizer._QWEN2)]),
    "a space before": P.ByteLevel(add_prefix_space=True),
    "digits together": P.Sequence([P.Digits(individual_digits=False), P.ByteLevel(add_prefix_space=False)]),
    "punctuation apart": P.Sequence([P.Punctuation(), P.ByteLevel(add_prefix_space=False)]),
    "nothing": P.ByteLevel(add_prefix_space=False, use_regex=False),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_pre_tokenizer_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match="in a way that has no name"):
        gguf_tokenizer.metadata(with_pre_tokenizer(STRANGE[name]), 128)


def test_a_known_split_with_another_rule_for_words_is_refused() -> None:
    with pytest.raises(FormatError, match="in a way that has no name"):
        gguf_tokenizer.metadata(with_pre_tokenizer(split(gguf_tokenizer._QWEN2), ignore_merges=True), 128)


def test_normalised_text_and_other_models_are_refused() -> None:
    lower: Any = Tokenizer.from_str(tiny.tiny_tokenizer().backend_tokenizer.to_str())
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(FormatError, match=r"normalises text \(Lowercase\)"):
        gguf_tokenizer.metadata(wrapped(lower), 128)
    words: Any = Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(FormatError, match="is a WordLevel model"):
        gguf_tokenizer.metadata(wrapped(words), 128)


def test_tokens_types_and_special_ids() -> None:
    tokenizer = wrapped(
        Tokenizer.from_str(tiny.tiny_tokenizer().backend_tokenizer.to_str()), eos_token="</s>", pad_token="<pad>", bos_token="<s>"
    )
    tokenizer.add_tokens(["tool_call"])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool use": "{{ tools }}"}
    keys = gguf_tokenizer.metadata(tokenizer, 132, ends=[2, 1, 0])
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    assert own["tokens"][:4] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert own["token_type"][:5] == [3, 3, 3, 3, 1]
    assert own["tokens"][128:] == ["tool_call", "[PAD129]", "[PAD130]", "[PAD131]"]
    assert own["token_type"][128:] == [4, 5, 5, 5]
    ids = {name: own[f"{name}_token_id"] for name in ("bos", "eos", "eot", "eom", "padding")}
    assert ids == {"bos": 1, "eos": 2, "eot": 1, "eom": 0, "padding": 0}
    assert (own["add_bos_token"], own["add_eos_token"]) == (False, False)
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert keys["tokenizer.chat_template.tool use"] == "{{ tools }}"


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool) -> None:
    tokenizer = sentencepiece(PIECES, prefix=prefix)
    keys = gguf_tokenizer.metadata(tokenizer, 300)
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    assert (own["model"], own["add_bos_token"], own["add_space_prefix"]) == ("llama", True, prefix)
    assert own["token_type"][:4] == [2, 3, 3, 6]
    words = [piece for piece in PIECES if len(piece) > 1 and set(piece) != {"▁"}]
    order = [own["scores"][own["tokens"].index(piece)] for piece in words]
    assert order == sorted(set(order), reverse=True)
    runs = {own["scores"][own["tokens"].index("▁" * length)] for length in (2, 3, 4, 5)}
    assert len(runs) < 4
    assert max(runs) < min(order)
    for text in (
        "the thing and the other",
        "  the    an\n\teeeee",
        *(" " * count + "a" for count in range(14)),
        "naïve 🙂 ings",
        "a",
    ):
        assert gguf_tokenizer.encode(keys, text) == tokenizer(text)["input_ids"]
    assert gguf_tokenizer.encode(keys, "") == [1]


def test_merges_that_scores_cannot_say_are_refused() -> None:
    with pytest.raises(FormatError, match="from some pairs and not from others"):
        gguf_tokenizer.metadata(sentencepiece([piece for piece in PIECES if "▁▁" not in piece], lost=1), 300)


# -- the proof ---------------------------------------------------------------------------------------------------------
def rewritten(made: Made, path: Path, keys: dict[str, Any] | None = None, scaled: str = "") -> Made:
    """The same file with other metadata, or with one tensor doubled."""
    reader = GGUFReader(made.file)
    path.mkdir()
    writer = GGUFWriter(path / made.file.name, str(made.keys["general.architecture"]))
    for name, value in {**made.keys, **(keys or {})}.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            gguf._add(writer, name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data) * (2 if tensor.name == scaled else 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Made(made.case, made.checkpoint, path, made.reference)


def test_verification_finds_what_is_wrong(tmp_path: Path) -> None:
    made = pruned(tmp_path, "llama", biased=True)

    def problems(name: str, **changes: Any) -> str:
        return "; ".join(rewritten(made, tmp_path / name, **changes).verify()["problems"])

    assert problems("same") == ""
    assert "logits differ" in problems("tensor", scaled="blk.2.attn_v.weight")
    assert "logits differ" in problems("bias", scaled="blk.1.ffn_down.bias")
    assert "logits differ" in problems("rope", keys={"deci.rope.freq_base": 500.0})
    assert "logits differ" in problems("eps", keys={"deci.attention.layer_norm_rms_epsilon": 0.1})
    tokens = made.keys["tokenizer.ggml.tokens"]
    assert "other tokens" in problems("tokens", keys={"tokenizer.ggml.tokens": [*tokens[:4], *reversed(tokens[4:])]})
    assert "other tokens" in problems("bos", keys={"tokenizer.ggml.add_bos_token": True})


def test_verification_of_quantised_weights_finds_a_wrong_tensor(tmp_path: Path) -> None:
    source, model = folder(tmp_path / "base", "llama", hidden=64, ffn=128)
    case = prune(model, drop=False, biased=True)
    made = export(tmp_path, case, source, "q8_0")
    assert made.verify()["problems"] == []
    with torch.no_grad():
        case.pruned.get_parameter("model.layers.1.self_attn.q_proj.weight").mul_(-1)
    other = export(tmp_path / "other", case, source, "q8_0")
    (wrong,) = Made(case, made.checkpoint, other.folder, made.reference).verify()["problems"]
    assert "of their spread, allowed" in wrong


def test_the_verifying_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = pruned(tmp_path, "llama", biased=True)
    command = [sys.executable, *Gguf().verifier(made.folder, made.reference, "cpu")]

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert (done.returncode, json.loads(done.stdout.splitlines()[-1])["problems"]) == (0, [])
    body = bytearray(made.file.read_bytes())
    made.file.write_bytes(body[: len(body) // 2])
    # The same program again, without the seconds that its imports take.
    monkeypatch.setattr(sys, "argv", command[2:])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(verify_gguf.__file__, run_name="__main__")
    assert end.value.code == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
