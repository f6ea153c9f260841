"""Checkpoints out: the pruned model equals the masked dense one, loads where selfpruner is not, and survives a killed writer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

import selfpruner.testing.tiny_models as tiny
from selfpruner.errors import CancelledTaskError, CorruptCheckpointError, DiskFullError, ExportError
from selfpruner.export import checkpoint, proof
from selfpruner.export import verify as verify_script
from selfpruner.export.build import expected_parameters, plain_config
from selfpruner.export.checkpoint import CardInfo, LayerShape, build, count_parameters, load, write
from selfpruner.export.formats import verify
from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.files import manifest
from selfpruner.models.family_layouts import layout_of
from selfpruner.testing.cut_models import CARD, Case, Keep, cut, folder, prune
from selfpruner.testing.tiny_models import rows_of, tokens_of
from tests.helpers import ROOT
from tests.helpers.exports import OWN_FORMS, greedy, masked_logits

LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
VARIANTS = {
    "mha": {"kv_heads": 4},
    "gqa": {"kv_heads": 2},
    "gqa-untied-biased-dropped": {"kv_heads": 2, "tied": False},
    "mqa-wide-head-biased": {"kv_heads": 1, "head_dim": 16},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_a_sliced_model_equals_the_masked_one(tmp_path: Path, family: str, variant: str) -> None:
    _, model = folder(tmp_path, family, **VARIANTS[variant])
    case = prune(model, drop="dropped" in variant, biased="biased" in variant)
    tokens = tokens_of(2, 24)
    logits = case.pruned(tokens, use_cache=False).logits
    expected = masked_logits(case, tokens)
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert (expected - model(tokens).logits).abs().max() > 0.1, "the cut must matter, or equality proves nothing"
    assert count_parameters(case.pruned) == expected_parameters(case.pruned.config) < count_parameters(model)
    assert plain_config(case.pruned) is None

    without = greedy(case.pruned, tokens, use_cache=False)
    assert greedy(case.pruned, tokens) == without
    assert greedy(case.pruned, tokens, cache_implementation="static", disable_compile=True) == without
    case.pruned.set_attn_implementation("eager")
    assert case.pruned.config._attn_implementation == "eager"
    assert (case.pruned(tokens).logits - logits).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["qwen2", *OWN_FORMS])
@torch.inference_mode()
def test_left_padding_changes_nothing(tmp_path: Path, family: str) -> None:
    # The first layer has no attention: the cache and the mask must still know how many tokens there are.
    case = prune(folder(tmp_path, family)[1], drop=True, biased=True)
    short, long = tokens_of(1, 9), tokens_of(1, 15, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    together = greedy(case.pruned, batch, attention_mask=mask)
    assert together == greedy(case.pruned, short) + greedy(case.pruned, long)
    assert together == greedy(case.pruned, batch, attention_mask=mask, cache_implementation="static", disable_compile=True)


def test_a_sliding_window_stays_where_it_was(tmp_path: Path) -> None:
    _, mistral = folder(tmp_path / "m", "mistral", sliding_window=6)
    _, qwen = folder(tmp_path / "q", "qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2)
    tokens = tokens_of(1, 24)
    for model in (mistral, qwen):
        case = prune(model, drop=False, biased=False)
        with torch.inference_mode():
            assert (case.pruned(tokens).logits - masked_logits(case, tokens)).abs().max() <= 1e-4
        assert greedy(case.pruned, tokens) == greedy(case.pruned, tokens, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "opt"])
def test_fewer_heads_everywhere_make_an_ordinary_model_where_the_family_has_such(tmp_path: Path, family: str) -> None:
    _, model = folder(tmp_path / "two", family)
    groups = [0] if family != "opt" else [0, 1]
    weights: dict[str, Tensor] = {}
    for layer in range(3):
        weights |= cut(model, layer, Keep((0, 1), None), groups)
    pruned = build(model, [LayerShape(len(groups), 2 // len(groups), 64)] * 3, weights)
    plain = plain_config(pruned)
    if family == "opt":
        assert plain is None, "its heads divide the hidden size"
        return
    assert type(plain) is type(model.config)
    twin = type(model)(plain).eval()
    twin.load_state_dict(pruned.state_dict())
    with torch.inference_mode():
        assert twin(tokens_of(1, 12)).logits.equal(pruned(tokens_of(1, 12)).logits)

    # Heads that do not divide the hidden size are none of an ordinary Llama or Gemma.
    _, model = folder(tmp_path / "three", family, kv_heads=4)
    weights = {}
    for layer in range(3):
        weights |= cut(model, layer, Keep((0, 1, 3), None), [0, 1, 3])
    plain = plain_config(build(model, [LayerShape(3, 1, 64)] * 3, weights))
    assert (None if plain is None else type(plain)) is (type(model.config) if family == "phi3" else None)


def test_building_copies_nothing_it_need_not(tmp_path: Path) -> None:
    _, model = folder(tmp_path, "llama")
    dense = LayerShape(2, 2, 64)
    pruned = build(model, [dense, dense, LayerShape(2, 2, 0)], {})
    base = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert all(tensor.data_ptr() == base[name] for name, tensor in pruned.state_dict().items())
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    half = build(model, [dense] * 3, {}, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    _, model = folder(tmp_path, "llama")
    dense = LayerShape(2, 2, 64)
    with pytest.raises(ExportError, match=r"gate_proj\.weight should have shape \(40, 32\) but is of shape \(64, 32\)"):
        build(model, [LayerShape(2, 2, 40), dense, dense], {})
    with pytest.raises(ExportError, match=r"no place for: model\.layers\.9"):
        build(model, [dense] * 3, {"model.layers.9.mlp.down_proj.bias": torch.zeros(32)})
    with pytest.raises(ExportError, match="3 layers, but 2 layer shapes"):
        build(model, [dense] * 2, {})
    with pytest.raises(ExportError, match="0 query heads do not divide into 2 KV heads"):
        build(model, [LayerShape(2, 0, 64)] * 3, {})


def test_a_uniform_plan_is_an_ordinary_model_of_its_family(tmp_path: Path) -> None:
    for family in tiny.FAMILIES:
        _, model = folder(tmp_path / family, family, kv_heads=4)
        weights: dict[str, Tensor] = {}
        for layer in range(3):
            weights |= cut(model, layer, Keep(None, tuple(range(48))), [])
        pruned = build(model, [LayerShape(4, 1, 48)] * 3, weights)
        plain = plain_config(pruned)
        assert type(plain) is type(model.config)
        assert plain.architectures == [type(model).__name__]
        twin = type(model)(plain).eval()
        twin.load_state_dict(pruned.state_dict())
        with torch.inference_mode():
            assert twin(tokens_of(1, 12)).logits.equal(pruned(tokens_of(1, 12)).logits), "nothing of the config was lost"
        # A bias that the family does not know takes the modeling file.
        name = f"{layout_of(model.config).layer(0)}.{rows_of(model, 'down')[0]}.bias"
        if name not in pruned.state_dict():
            assert plain_config(build(model, [LayerShape(4, 1, 48)] * 3, {**weights, name: torch.ones(32)})) is None


# -- the folder --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Written:
    """A checkpoint written for real, after an earlier writer was killed in the same place."""

    case: Case
    tokenizer: PreTrainedTokenizerBase
    source: Path
    path: Path
    result: checkpoint.Exported


KILLED_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from selfpruner.testing.cut_models import CARD, folder, prune
from transformers import AutoTokenizer
from selfpruner.export.checkpoint import write
source, model = folder(Path(sys.argv[1]), "qwen2")
case = prune(model, drop=True, biased=True)
write(case.pruned, AutoTokenizer.from_pretrained(source), source, Path(sys.argv[2]), CARD)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("export")
    source, path = root / "base", root / "out" / "checkpoint"
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(root / "killed-base"), str(path), str(ROOT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    left = []
    deadline = time.monotonic() + 120
    while not left and writer.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        left = list(path.parent.glob(".tmp-*/model.safetensors"))
    os.killpg(writer.pid, signal.SIGKILL)
    writer.wait()
    assert left, "the writer was killed before it wrote anything"
    assert [entry.name.startswith(".tmp-") for entry in path.parent.iterdir()] == [True], "a killed writer leaves nothing visible"

    folder(source, "qwen2")
    (source / "LICENSE.txt").write_text("terms\n")
    case = prune(AutoModelForCausalLM.from_pretrained(source), drop=True, biased=True)
    tokenizer = AutoTokenizer.from_pretrained(source)
    return Written(case, tokenizer, source, path, write(case.pruned, tokenizer, source, path, CARD))


def test_an_export_is_complete_and_verified(written: Written) -> None:
    assert [entry.name for entry in written.path.parent.iterdir()] == ["checkpoint"], "the killed writer's folder was swept up"
    names = {path.name for path in written.path.iterdir()}
    assert names >= {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "README.md"),
        *("plan.json", "manifest.json", "modeling_selfpruner.py", "LICENSE.txt"),
    }
    result = written.result
    assert result.manifest_sha256 == manifest.sha256(written.path / "manifest.json")
    assert result.verification["problems"] == []
    assert result.verification["code"] == "transformers_modules", "verified with the folder's own code"
    assert result.verification["max_difference"] <= 1e-3
    assert result.verification["parameters"] == result.parameters == count_parameters(written.case.pruned)
    body = json.loads((written.path / "manifest.json").read_text())
    assert body["files"].keys() == names - {"manifest.json", "proof"} | {"proof/reference.safetensors"}
    assert body["plan"] == json.loads((written.path / "plan.json").read_text())
    assert body["plan"]["layers"][0] == {"query_heads": 0, "kv_groups": 0, "ffn_channels": 56}


def test_the_card_says_what_was_done(written: Written) -> None:
    text = (written.path / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    import yaml

    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "selfpruner", "structured-pruning"],
        "base_model": "example/tiny",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
    }
    for expected in ("| 0 | 0 | 0 | 56 | 10.0% |", "| pruned | 37.4 | 0.26 |", "least_squares", "trust_remote_code=True"):
        assert expected in body


@torch.inference_mode()
def test_load_needs_no_remote_code(written: Written) -> None:
    model = load(written.path)
    assert isinstance(model, MODELING_FILES["qwen2"].causal_lm)
    tokens = tokens_of(2, 12)
    assert torch.equal(model(tokens).logits, written.case.pruned(tokens).logits)
    assert load(written.path, dtype=torch.bfloat16, check=False).dtype == torch.bfloat16


@pytest.mark.parametrize("family", OWN_FORMS)
def test_every_form_is_verified_with_its_own_code(tmp_path: Path, family: str, request: pytest.FixtureRequest) -> None:
    if family == OWN_FORMS[0]:
        request.getfixturevalue("fresh_verifier")  # once in a process that starts from nothing
    options = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 24} if family == "phi3" else {}
    source, model = folder(tmp_path / "base", family, **options)
    case = prune(model, drop=True, biased=True)
    result = write(case.pruned, AutoTokenizer.from_pretrained(source), source, tmp_path / "checkpoint", CARD)
    assert result.verification["problems"] == []
    assert result.verification["code"] == "transformers_modules"
    assert result.verification["class"] == MODELING_FILES[family].causal_lm.__name__
    assert MODELING_FILES[family].code.name in (tmp_path / "checkpoint" / "README.md").read_text()
    verify(tmp_path / "checkpoint")
    with torch.inference_mode():
        assert load(tmp_path / "checkpoint")(tokens_of(1, 12)).logits.equal(case.pruned(tokens_of(1, 12)).logits)


CLASSIFIERS = """
import sys
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
print(tokenizer("to be or not")["input_ids"])
for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
    model = auto.from_pretrained(sys.argv[1], num_labels=3, trust_remote_code=True)
    print(type(model).__module__.split(".")[0], type(model).__name__, model.score.out_features)
"""


def test_a_stranger_classifies_and_reads_the_tokenizer_without_code(written: Written) -> None:
    command = [sys.executable, "-P", "-c", CLASSIFIERS, str(written.path)]
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        str(written.tokenizer("to be or not")["input_ids"]),
        "transformers_modules SelfPrunerForSequenceClassification 3",
        "transformers_modules SelfPrunerForTokenClassification 3",
    ]
    assert "custom code" not in ran.stderr


def test_exporting_again_keeps_what_is_there(written: Written) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in written.path.iterdir()}
    again = write(written.case.pruned, written.tokenizer, written.source, written.path, CARD)
    assert again.reused
    assert again.manifest_sha256 == written.result.manifest_sha256
    assert before == {path.name: path.stat().st_mtime_ns for path in written.path.iterdir()}
    other = CardInfo(base_model="example/tiny", rate=0.4, criterion="obs", compensation="none")
    with pytest.raises(ExportError, match="another plan"):
        write(written.case.pruned, written.tokenizer, written.source, written.path, other)


@pytest.fixture
def copy(written: Written, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written.path, tmp_path / "copy"))


def _flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)


@pytest.mark.parametrize("name", ["model.safetensors", "modeling_selfpruner.py", "tokenizer.json"])
def test_a_changed_file_is_found_and_named(copy: Path, name: str) -> None:
    _flip(copy / name)
    for use in (load, verify):
        with pytest.raises(CorruptCheckpointError, match=f"{name} does not match its sha256"):
            use(copy)


def test_truncated_missing_and_incomplete_folders(copy: Path) -> None:
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors has [\d,]+ bytes instead of"):
        load(copy)
    shard.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors is listed"):
        verify(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        load(copy)
    (copy / "manifest.json").unlink()
    for check in (True, False):
        with pytest.raises(ExportError, match="incomplete"):
            load(copy, check=check)


def test_a_manifest_cannot_point_outside(copy: Path) -> None:
    (copy.parent / "secret").write_text("x")
    body = json.loads((copy / "manifest.json").read_text())
    body["files"]["../secret"] = {"sha256": manifest.sha256(copy.parent / "secret"), "bytes": 1}
    (copy / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(CorruptCheckpointError, match=r"\.\./secret is listed"):
        verify(copy)


def test_tensors_that_do_not_fit_the_config_are_found(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    body = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").unlink()
    manifest.write(copy, plan=body["plan"], parameters=body["parameters"], verification={})
    with pytest.raises(ExportError, match=r"matches its sha256, but it does not compute what it did: .*model\.norm\.weight"):
        verify(copy)


# -- verification and failures, without a process each -----------------------------------------------------------------
@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``write`` without the fresh process, for tests that check something else or start one of their own."""
    monkeypatch.setattr(proof, "prove", lambda *_: {"problems": []})

    def run(case: Case, source: Path, path: Path, **options: Any) -> Path:
        return write(case.pruned, AutoTokenizer.from_pretrained(source), source, path, CARD, **options).path

    return run


def test_an_incomplete_or_corrupt_checkpoint_is_replaced_but_nothing_else(
    copy: Path, written: Written, unverified: Callable[..., Path]
) -> None:
    _flip(copy / "model.safetensors")
    unverified(written.case, written.source, copy)
    manifest.check(copy)
    (copy / "manifest.json").unlink()
    unverified(written.case, written.source, copy)
    manifest.check(copy)
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]
    home = copy.parent / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("mine")
    with pytest.raises(ExportError, match="not empty and no checkpoint"):
        unverified(written.case, written.source, home)
    assert (home / "thesis.tex").read_text() == "mine"


def test_shards_and_index(written: Written, tmp_path: Path, unverified: Callable[..., Path]) -> None:
    path = unverified(written.case, written.source, tmp_path / "sharded", shard_bytes=20_000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    manifest.check(path)
    with torch.inference_mode():
        tokens = tokens_of(1, 12)
        assert torch.equal(load(path)(tokens).logits, written.case.pruned(tokens).logits)


def test_failures_leave_nothing_behind(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(**options: Any) -> None:
        write(written.case.pruned, written.tokenizer, None, tmp_path / "out" / "checkpoint", CARD, **options)

    monkeypatch.setattr(proof, "_run", lambda *_: {"problems": ["logits differ by 3"]})
    with pytest.raises(ExportError, match="does not verify: logits differ by 3"):
        attempt()
    polls = iter([False, True])
    with pytest.raises(CancelledTaskError):
        attempt(cancelled=lambda: next(polls, True), shard_bytes=20_000)
    assert list((tmp_path / "out").iterdir()) == []

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(proof, "write_tensors", full)
    with pytest.raises(DiskFullError, match="No space left while writing"):
        attempt()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_frozen_verification_is_cancelled(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "frozen.py"
    script.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(checkpoint.verify_script, "__file__", str(script))
    started = time.monotonic()
    with pytest.raises(CancelledTaskError):
        write(
            *(written.case.pruned, written.tokenizer, None, tmp_path / "out" / "checkpoint", CARD),
            cancelled=lambda: time.monotonic() > started + 0.5,
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_crashing_verification_is_an_error(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "crashing.py"
    script.write_text("import sys; sys.exit('no torch here')")
    monkeypatch.setattr(checkpoint.verify_script, "__file__", str(script))
    with pytest.raises(ExportError, match="ended with code 1: no torch here"):
        write(written.case.pruned, written.tokenizer, None, tmp_path / "out" / "checkpoint", CARD)


def test_verification_finds_wrong_logits_parameters_and_tensors(written: Written, copy: Path, tmp_path: Path) -> None:
    tokens = tokens_of(2, 24)
    logits = written.case.pruned(tokens).logits.detach().clone()
    facts = {
        "parameters": str(written.result.parameters),
        "dtype": "float32",
        "text": "the end",
        "ids": json.dumps(written.tokenizer("the end")["input_ids"]),
    }

    def problems(**changes: str) -> str:
        save_file({"tokens": tokens, "logits": logits}, tmp_path / "reference", metadata={**facts, **changes})
        return "; ".join(verify_script.verify(str(copy), str(tmp_path / "reference"), "cpu")["problems"])

    assert problems() == ""
    assert "parameters instead of 7" in problems(parameters="7")
    assert "tokenizer" in problems(ids="[5]")
    logits[0, 3, 5] += 0.02
    assert "logits differ by 0.02, allowed 0.00" in problems()
    logits[0, 3, 5] = float("nan")
    assert "logits differ by nan" in problems()
    logits[0, 3, 5] = 0
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "missing_keys: model.norm.weight" in problems()


STRANGER = """
import json, sys
sys.modules["selfpruner"] = None  # importing it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
root = sys.argv[1]
found = {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", trust_remote_code=True)
    wanted = load_file(f"{root}/{name}.reference")
    with torch.inference_mode():
        logits = model(wanted["tokens"]).logits
        difference = (logits.float() - wanted["logits"]).abs().max().item()
        model.save_pretrained(f"{root}/{name}-again")
        again = AutoModelForCausalLM.from_pretrained(f"{root}/{name}-again", trust_remote_code=True)
        exact = torch.equal(again(wanted["tokens"]).logits, logits)
        how = dict(attention_mask=torch.ones_like(wanted["tokens"]), min_new_tokens=6, max_new_tokens=6, do_sample=False)
        cache, none = (model.generate(wanted["tokens"], use_cache=use, **how).tolist() for use in (True, False))
    AutoTokenizer.from_pretrained(f"{root}/{name}", trust_remote_code=True)("the end")
    found[name] = [difference, exact, cache == none, str(model.dtype), type(model).__module__.split(".")[0]]
found["model"] = type(AutoModel.from_pretrained(f"{root}/{name}", trust_remote_code=True)).__name__
found["imported"] = [name for name in sys.modules if name.startswith("selfpruner.")]
print(json.dumps(found))
"""


def test_a_stranger_loads_every_family(tmp_path: Path, unverified: Callable[..., Path]) -> None:
    """One fresh process in which selfpruner cannot be imported; in float32, bfloat16, as an ordinary model, saved from memory."""
    names = (*tiny.FAMILIES, "bf16", "saved", "plain")
    for index, family in enumerate(names):
        name = family if family in tiny.FAMILIES else "llama"
        source, model = folder(
            tmp_path / f"base-{family}", name, tied=index % 2 == 0, kv_heads=2, layers=2 if family == "plain" else 3
        )
        if family == "bf16":
            model.to(torch.bfloat16)
        if family == "plain":
            case = Case(model, build(model, [LayerShape(2, 2, 64)] * 2, {}), [], {})
        else:
            case = prune(model, drop=True, biased=True)
        if family == "saved":
            path = tmp_path / family
            case.pruned.save_pretrained(path)
            AutoTokenizer.from_pretrained(source).save_pretrained(path)
        else:
            path = unverified(case, source, tmp_path / family)
        assert any(path.glob("modeling_*.py")) == (family != "plain")
        tokens = tokens_of(2, 16)
        with torch.inference_mode():
            logits = case.pruned(tokens).logits.float()
        save_file({"tokens": tokens, "logits": logits}, tmp_path / f"{family}.reference")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, str(tmp_path), *names],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        difference, exact, cached, dtype, code = found[name]
        assert difference <= (1e-5 if name != "bf16" else 0.1), name
        assert exact, name
        assert cached or name == "bf16", name
        assert dtype == ("torch.bfloat16" if name == "bf16" else "torch.float32")
        assert code == ("transformers" if name == "plain" else "transformers_modules")
    assert found["model"] == "LlamaModel"
    assert found["imported"] == []
