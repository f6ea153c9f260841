"""Checkpoints in older versions of transformers. What a file says to them is tried here; that they compute the same, by
``make test-oldest``, which has those versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

import selfpruner.testing.tiny_models as tiny
from selfpruner.export import formats, proof
from selfpruner.export.build import build, plain_config
from selfpruner.export.checkpoint import LayerShape, write
from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.export.older import oldest_version, with_older_fields
from selfpruner.testing.cut_models import CARD, Keep, cut, folder, prune, units_of
from selfpruner.testing.tiny_models import tokens_of
from tests.helpers.ropes import CASES, options_of

FILES = sorted({form.code for form in MODELING_FILES.values()})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("version", ["4.46.3", "4.57.6", "5.0.0.dev0", "5.14.0"])
def test_a_modelling_file_says_which_version_it_needs(tmp_path: Path, file: Path, version: str) -> None:
    # A package of that version that has nothing else: whatever the file asked of it before would be its first error.
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    environment = {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-P", str(file)], capture_output=True, text=True, env=environment, timeout=60)
    assert ran.returncode == 1
    said = ran.stderr.splitlines()[-1]
    assert said.startswith("ImportError: ")
    assert f"takes transformers 5.15 or later; this is {version}" in said
    assert "pip install --upgrade 'transformers>=5.15'" in said


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fresh process, for tests that compare for themselves."""
    monkeypatch.setattr(proof, "prove", lambda *_: {"problems": []})


def tokenizer() -> PreTrainedTokenizerFast:
    """With special tokens that version 5 alone writes as a list."""
    backend = tiny.tiny_tokenizer().backend_tokenizer
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", padding_side="left")
    made.chat_template = tiny.CHAT_TEMPLATE
    made.add_special_tokens({"additional_special_tokens": ["<unk>"]})
    return made


def narrow(model: PreTrainedModel, shape: LayerShape) -> PreTrainedModel:
    """``model`` with the first groups and channels of every layer."""
    weights: dict[str, torch.Tensor] = {}
    heads = tuple(range(shape.heads))
    for layer in range(model.config.num_hidden_layers):
        weights |= cut(model, layer, Keep(heads, tuple(range(shape.channels))), list(range(shape.kv_groups)))
    return build(model, [shape] * model.config.num_hidden_layers, weights)


def varied(family: str, rope: str) -> dict[str, Any]:
    """Options of a tiny model whose rotary base no version has by default."""
    options = options_of(family, rope)
    tables = options["rope_parameters"]
    for table in tables.values() if family == "gemma3_text" else [tables]:
        table["rope_theta"] *= 5
    return options


@pytest.mark.parametrize(("family", "rope"), CASES)
def test_a_rope_is_the_same_in_the_words_of_both_versions(tmp_path: Path, family: str, rope: str) -> None:
    source, model = folder(tmp_path, family, **varied(family, rope))
    body = with_older_fields(json.loads((source / "config.json").read_text()))
    rotary = model.config.rope_parameters
    assert body["rope_theta"] == (rotary["full_attention"] if family == "gemma3_text" else rotary)["rope_theta"] == 50_000
    assert ("rope_scaling" in body) == (rope != "default")
    for fields in (body, {key: value for key, value in body.items() if key != "rope_parameters"}):
        if family == "gemma3_text" and len(fields) < len(body):
            continue  # version 4 has one kind of table for windows, and this model another
        (source / "config.json").write_text(json.dumps(fields))
        with torch.inference_mode():
            for length in (20, 40):
                found = AutoModelForCausalLM.from_pretrained(source).eval()(tokens_of(1, length)).logits
                assert torch.equal(found, model(tokens_of(1, length)).logits)


@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ordinary_checkpoints_of_every_kind_say_what_older_versions_read(tmp_path: Path, family: str) -> None:
    source, model = folder(tmp_path / "base", family, **({} if family == "opt" else varied(family, "default")))
    shape = LayerShape(4 if family == "opt" else 2, 1 if family == "opt" else 2, 48)
    uniform = write(narrow(model, shape), tokenizer(), source, tmp_path / "uniform", CARD).path
    case = prune(model, drop=False, biased=False)
    varying = write(case.pruned, tokenizer(), source, tmp_path / "varying", CARD, units=units_of(case)).path
    masked = formats.convert(varying, tmp_path / "masked", "masked").path
    for made in (uniform, masked):
        body = json.loads((made / "config.json").read_text())
        assert body.get("rope_theta") == (None if family == "opt" else 50_000)
        assert body.get("rope_local_base_freq") == (25_000 if family == "gemma3_text" else None)
        card = (made / "README.md").read_text()
        assert f"It takes transformers {oldest_version(body)} or later" in card
        assert ('attn_implementation="eager"' in card) == (family == "gemma2")
    for made in (uniform, masked, varying):
        written = json.loads((made / "tokenizer_config.json").read_text())
        assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert written["additional_special_tokens"] == ["<unk>"]
        assert written["chat_template"] == tiny.CHAT_TEMPLATE
        for auto in (AutoTokenizer, PreTrainedTokenizerFast):
            again = auto.from_pretrained(made)
            assert (again.chat_template, again.padding_side) == (tiny.CHAT_TEMPLATE, "left")
            assert {"</s>", "<pad>", "<unk>"} <= set(again.all_special_tokens)
    assert "It takes transformers 5.15 or later" in (varying / "README.md").read_text()


VERSIONS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "llama": [("4.45", {}), ("4.57", {"rope": "yarn"}), ("4.45", {"rope": "llama3"}), ("5.15", {"rope": "proportional"})],
    "mistral": [("4.45", {}), ("4.48", {"rope": "linear"}), ("4.45", {"sliding_window": 8})],
    "qwen2": [
        ("4.45", {}),
        ("4.48", {"heads": 8}),
        ("4.53", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
    "qwen3": [("4.51", {}), ("4.51", {"heads": 8})],
    "gemma2": [("4.45", {}), ("4.48", {"rope": "dynamic"}), ("4.53", {"layer_types": ["full_attention"] * 3})],
    "gemma3_text": [("4.50", {}), ("4.53", {"layer_types": ["full_attention", "sliding_attention"] * 2})],
    "phi3": [("4.46", {}), ("4.46", {"rope": "longrope"}), ("4.48", {"heads": 8})],
    "opt": [("4.45", {})],
}


def options_for(family: str, options: dict[str, Any]) -> dict[str, Any]:
    rope = options.get("rope", "default")
    return (varied(family, rope) if family != "opt" else {}) | {key: value for key, value in options.items() if key != "rope"}


@pytest.mark.parametrize(
    ("family", "version", "options"), [(family, *case) for family, cases in VERSIONS.items() for case in cases], ids=str
)
def test_the_oldest_version_depends_on_what_a_config_says(
    tmp_path: Path, family: str, version: str, options: dict[str, Any]
) -> None:
    source, _ = folder(tmp_path, family, **options_for(family, options))
    assert oldest_version(json.loads((source / "config.json").read_text())) == version


# -- with the versions themselves --------------------------------------------------------------------------------------
READER = """
import sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

torch.set_grad_enabled(False)
for folder in sys.argv[1:]:
    known = load_file(Path(folder) / "known.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", trust_remote_code=True).eval()
    for length in (20, 40):
        found = model(known["tokens"][:, :length]).logits
        difference, most = (found - known[f"logits{length}"]).abs().max(), known[f"logits{length}"].abs().max()
        assert difference <= 1e-4 * most, (transformers.__version__, folder, length, float(difference), float(most))
    for auto in (AutoTokenizer, PreTrainedTokenizerFast):
        if auto is AutoTokenizer and list(Path(folder).glob("*.py")):
            continue  # it would ask
        tokenizer = auto.from_pretrained(folder)
        read = tokenizer("to be<unk> or not</s>", return_tensors="pt")
        assert read["input_ids"][0].tolist() == known["ids"].tolist(), (transformers.__version__, folder)
        assert model.generate(**read, max_new_tokens=2, use_cache=False).shape[1] > len(known["ids"])
        assert tokenizer.chat_template and tokenizer.padding_side == "left"
print("read", len(sys.argv) - 1)
"""


@pytest.mark.slow
@pytest.mark.skipif("SELFPRUNER_OLDEST" not in os.environ, reason="needs other versions of transformers: make test-oldest")
@pytest.mark.usefixtures("unproven")
@torch.inference_mode()
def test_the_oldest_version_computes_the_same(tmp_path: Path) -> None:
    """Uniform plans, with fewer heads where the family has a word for it, masked ones, and with their own code those that vary."""
    wanted: dict[str, list[str]] = {}
    cases = [(family, {"rope": rope}) for family, rope in CASES]
    # Without those that other heads make: they come of a plan below.
    cases += [
        (family, how) for family, found in VERSIONS.items() for _, how in found if "heads" not in how and how.keys() != {"rope"}
    ]
    for number, (family, options) in enumerate(cases):
        root = tmp_path / f"{number}-{family}"
        source, model = folder(root / "base", family, **options_for(family, options))
        shapes = [LayerShape(4, 1, 48)] if family == "opt" else [LayerShape(2, 2, 48), LayerShape(1, 2, 64)]
        models = [one for one in (narrow(model, shape) for shape in shapes) if plain_config(one)]
        made = [write(one, tokenizer(), source, root / f"uniform{i}", CARD).path for i, one in enumerate(models)]
        case = prune(model, drop=True, biased=False)
        varying = write(case.pruned, tokenizer(), source, root / "varying", CARD, units=units_of(case)).path
        models += [case.pruned] * 2
        made += [varying, formats.convert(varying, root / "masked", "masked").path]
        for one, place in zip(models, made, strict=True):
            tokens = tokens_of(2, 40)
            known = {f"logits{length}": one(tokens[:, :length]).logits for length in (20, 40)}
            ids = torch.tensor(tokenizer()("to be<unk> or not</s>")["input_ids"])
            save_file({"tokens": tokens, "ids": ids, **known}, place / "known.safetensors")
            body = json.loads((place / "config.json").read_text())
            wanted.setdefault("5.15" if place == varying else oldest_version(body), []).append(str(place))
    versions = Path(os.environ["SELFPRUNER_OLDEST"])
    assert wanted.keys() <= {path.name for path in versions.iterdir()}
    for version, folders in wanted.items():
        environment = {**os.environ, "PYTHONPATH": str(versions / version), "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-P", "-c", READER, *folders]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
        assert ran.returncode == 0, ran.stderr[-6000:]
        assert ran.stdout.splitlines()[-1] == f"read {len(folders)}"
        print(f"transformers {version} reads {len(folders)} checkpoints")
