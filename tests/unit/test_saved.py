"""A pruned model that was saved outside of an export, after further training say, goes wherever its checkpoint went."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.models.auto import AutoModel, AutoModelForCausalLM

import selfpruner
from selfpruner import api
from selfpruner.cli import app as cli
from selfpruner.errors import ConfigError, CorruptCheckpointError, ExportError, ModelError, UnsupportedModelError
from selfpruner.export import checkpoint, formats, proof
from selfpruner.export.build import build
from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.pruning.layer_shapes import LayerShape
from selfpruner.testing.cut_models import CARD, folder, prune
from selfpruner.testing.tiny_models import tiny_tokenizer, tokens_of
from selfpruner.timing import transformers_model
from tests.helpers.exports import OWN_FORMS

TRAINED = ["q_proj", "down_proj"]


def trained(model: Any, place: Path, **how: Any) -> Path:
    """``model`` with random adapters merged into it, saved with a tokenizer as anybody would."""
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by names that it has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=TRAINED, init_lora_weights=False))
        merged: Any = adapted.merge_and_unload()
    merged.save_pretrained(place, **how)
    tiny_tokenizer().save_pretrained(place)
    return place


def logits_of(place: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = selfpruner.load(place, dtype=torch.float32)(tokens, use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama without biases whose layers differ, trained further. Read only."""
    root = tmp_path_factory.mktemp("tuned")
    return trained(prune(folder(root / "base", "llama")[1], drop=True, biased=False).pruned, root / "tuned")


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose layers have one shape: saved, it is an ordinary Llama."""
    root = tmp_path_factory.mktemp("uniform")
    model = folder(root / "base", "llama")[1]
    half = {
        name: tensor[:, :32] if "down_proj" in name else tensor[:32]
        for name, tensor in model.state_dict().items()
        if ".mlp." in name
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "prove", lambda *_: {"problems": []})
        path = root / "checkpoint"
        checkpoint.write(build(model, [LayerShape(2, 2, 32)] * 3, half), tiny_tokenizer(), None, path, CARD)
    return trained(AutoModelForCausalLM.from_pretrained(path), root / "tuned")


@pytest.fixture
def text(tmp_path: Path, sample_text: Callable[[int, int], str]) -> str:
    (tmp_path / "text.txt").write_text(sample_text(6000, 1))
    return str(tmp_path / "text.txt")


# -- what is saved -----------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("verified_here")
@pytest.mark.parametrize("family", ["llama", *OWN_FORMS])
def test_every_form_is_saved_whole_and_made_a_checkpoint_of(family: str, tmp_path: Path) -> None:
    pruned = prune(folder(tmp_path / "base", family)[1], drop=True, biased=False).pruned
    pruned.save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    form = MODELING_FILES[family]
    assert (tmp_path / "saved" / form.code.name).read_bytes() == form.code.read_bytes()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == form.auto_map
    tokens = tokens_of(2, 24)
    with torch.inference_mode():
        expected = pruned(tokens, use_cache=False).logits
    bound = 1e-5 * float(expected.abs().max())
    made = api.export(tmp_path / "saved", tmp_path / "made")
    assert (logits_of(made.path, tokens) - expected).abs().max() <= bound
    assert made.parameters == checkpoint.count_parameters(pruned)
    # Without units.json masked weights are put first, which computes the same.
    masked = api.export(tmp_path / "saved", tmp_path / "masked", format="masked").path
    assert json.loads((masked / "config.json").read_text())["model_type"] == family
    with torch.inference_mode():
        assert (AutoModelForCausalLM.from_pretrained(masked)(tokens, use_cache=False).logits - expected).abs().max() <= bound


def test_saved_again_after_every_way_to_load(tuned: Path, tmp_path: Path) -> None:
    """In shards, in another type, as the body alone, by selfpruner.load and by transformers: always with the modelling file."""
    tokens = tokens_of(2, 16)
    expected = logits_of(tuned, tokens)
    selfpruner.load(tuned).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits_of(tmp_path / "shards", tokens), expected)
    AutoModelForCausalLM.from_pretrained(tuned, trust_remote_code=True).half().save_pretrained(tmp_path / "half")
    assert selfpruner.load(tmp_path / "half").dtype == torch.float16
    AutoModel.from_pretrained(tuned).save_pretrained(tmp_path / "body")
    for name in ("shards", "half", "body"):
        assert (tmp_path / name / "modeling_selfpruner.py").is_file()


@pytest.mark.usefixtures("verified_here")
def test_a_head_that_training_untied_stays(tuned: Path, tmp_path: Path) -> None:
    """Whatever its config says of tying: as a merge of an adapter on the head leaves it."""
    copy = Path(shutil.copytree(tuned, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file({**tensors, "lm_head.weight": head}, copy / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((copy / "config.json").read_text())["tie_word_embeddings"]
    tokens = tokens_of(2, 16)
    expected = logits_of(tuned, tokens).flip(-1)
    for place in (copy, api.export(copy, tmp_path / "made").path):
        assert (logits_of(place, tokens) - expected).abs().max() <= 1e-5 * float(expected.abs().max())


# -- what takes it -----------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("verified_here")
@pytest.mark.parametrize("which", ["tuned", "uniform"])
def test_it_is_measured_and_converted(which: str, request: pytest.FixtureRequest, tmp_path: Path, text: str) -> None:
    place: Path = request.getfixturevalue(which)
    cache = tmp_path / "cache"
    size = checkpoint.count_parameters(selfpruner.load(place))
    found = api.evaluate(place, text=[text], sequences=4, length=64, device="cpu", cache=cache)
    assert found.parameters == size
    again = api.evaluate(
        place, against=str(place) if which == "uniform" else None, text=[text], sequences=4, length=64, cache=cache
    )
    assert again.perplexity == pytest.approx(found.perplexity, rel=1e-3)
    quality = api.quality([place], tmp_path / "quality.json", generation=True, device="cpu", cache=cache)
    assert quality.found[str(place)]["generation"]["parameters"] == size
    assert transformers_model.work_of(transformers_model.load(str(place), "cpu", "auto", cache)).parameters == size
    made = api.export(place, tmp_path / "gguf", format="gguf")
    assert made.verification["problems"] == []
    assert [path.name for path in made.path.glob("*.gguf")] == ["tuned-F32.gguf"]
    checked = api.export(place, tmp_path / "made")
    card = (checked.path / "README.md").read_text()
    assert ("pruned by" in card, "its folder does not record" in card) == (False, True)
    assert api.export(place, tmp_path / "made").parameters == size  # a second call keeps it
    assert api.export(checked.path, tmp_path / "masked", format="masked").parameters == size


def test_what_cannot_be_asked_of_it_says_what_can(tuned: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"cannot be pruned again.* evaluate, benchmark and export take it as it is"):
        api.prune(tmp_path / "out", rate=0.2, model=str(tuned), calibration={"sources": [{"source": text}]}, cache=tmp_path)
    with pytest.raises(ConfigError, match="leave out job and plan"):
        api.export(tuned, tmp_path / "out", plan="0" * 16)
    with pytest.raises(ConfigError, match="--against"):
        api.evaluate(tuned, text=["self"], cache=tmp_path)
    assert cli.run(["verify", str(tuned)]) == 1
    with pytest.raises(ExportError, match=r"trained further and saved since.*selfpruner export .*tuned -o FOLDER"):
        formats.verify(tuned)
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_whole_model_is_refused(tuned: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tuned, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    # As peft names what it wraps, saved without merging.
    wrapped = {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in tensors.items()}
    save_file(wrapped, copy / "model.safetensors", metadata={"format": "pt"})
    for use in (selfpruner.load, lambda folder: api.export(folder, tmp_path / "out")):
        with pytest.raises(ModelError, match=r"q_proj.*Adapters have to be merged"):
            use(copy)
    (copy / "model.safetensors").rename(copy / "model.bin")
    with pytest.raises(ModelError, match="pickle weights only"):
        selfpruner.load(copy)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"it is an adapter\. Merge it"):
        selfpruner.load(adapter)
    without = Path(shutil.copytree(tuned, tmp_path / "without", ignore=shutil.ignore_patterns("tokenizer*")))
    assert selfpruner.load(without).dtype == torch.float32
    with pytest.raises(ModelError, match=r"no tokenizer that loads.*tokenizer\.save_pretrained"):
        api.export(without, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("verified_here")
def test_what_was_saved_over_its_checkpoint_is_told_apart(tuned: Path, tmp_path: Path) -> None:
    made = api.export(tuned, tmp_path / "made").path
    model = selfpruner.load(made)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(made)
    with pytest.raises(CorruptCheckpointError, match="save it to a folder of its own"):
        selfpruner.load(made)
    (made / "manifest.json").unlink()
    with pytest.raises(ExportError, match="incomplete"):
        selfpruner.load(made)
