"""The model card: what the hub reads, what it says of the base model, and nothing of the machine that wrote it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from transformers.models.auto import AutoTokenizer

import selfpruner
import selfpruner.testing.tiny_models as tiny
from selfpruner import api
from selfpruner.errors import ContractError
from selfpruner.export import formats, proof
from selfpruner.export.card import converted, with_origin, with_terms
from selfpruner.files.card_info import CardInfo
from selfpruner.testing.cut_models import CARD, folder, prune
from selfpruner.workers.tasks import ExportRequest
from tests.helpers.exports import written


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fresh process."""
    monkeypatch.setattr(proof, "prove", lambda *_: {"problems": []})


def test_the_card_takes_over_the_base_models_terms(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    assert with_terms(CARD, base).terms == {"license": "apache-2.0"}
    front = "license: other\nlicense_name: tiny\nlicense_link: https://example.org/terms\nlanguage:\n- en\n- de\ntags: [x]\n"
    (base / "README.md").write_text(f"---\n{front}---\n# Tiny\n")
    plain = CardInfo(base_model="example/tiny", rate=0.3, criterion="obs", compensation="none")
    assert with_terms(plain, base).terms == {
        "license": "other",
        "license_name": "tiny",
        "license_link": "https://example.org/terms",
        "language": ["en", "de"],
    }
    assert with_terms(CARD, base).terms["license"] == "apache-2.0"
    for broken in ("---\n- a list\n---\n", "---\nlicense: [\n---\n", "no front matter", "\x00\xff"):
        (base / "README.md").write_text(broken)
        assert with_terms(plain, base).terms == {}


@pytest.mark.usefixtures("unproven")
def test_the_card_is_one_the_hub_reads(tmp_path: Path) -> None:
    source, model = folder(tmp_path / "base", "llama")
    case = prune(model, drop=False, biased=False)
    made = written(tmp_path, case, source)
    card = ModelCard.load(made / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "selfpruner", "structured-pruning"],
        "base_model": "example/tiny",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
    }
    assert "trust_remote_code=True" in card.text
    masked = ModelCard.load(formats.convert(made, tmp_path / "masked", "masked").path / "README.md")
    assert masked.data == card.data or masked.data.to_dict() == card.data.to_dict()
    assert "trust_remote_code" not in masked.text
    assert "saves neither memory nor time" in masked.text
    other = ModelCard(converted(card.content, "gguf", "quantized", "x")).data.to_dict()
    assert other == card.data.to_dict() | {"library_name": "gguf", "base_model_relation": "quantized"}
    # A path is no repository, and the embedded model has one.
    for name, expected in (("/models/tiny", None), ("tiny", None), ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct")):
        info = CardInfo(base_model=name, rate=0.3, criterion="obs", compensation="none")
        shutil.rmtree(tmp_path / "checkpoint")
        found = ModelCard.load(written(tmp_path, case, source, info) / "README.md").data
        assert found.base_model == expected
        assert found.to_dict().get("base_model_relation") == ("finetune" if expected else None)
        assert found.license == ("apache-2.0" if expected else "unknown")


@pytest.mark.usefixtures("unproven")
def test_a_local_models_card_says_what_its_folder_says(tmp_path: Path) -> None:
    """Or what was asked for; a folder that says nothing leaves it unknown, and no name that looks like the hub's is one."""
    source, model = folder(tmp_path / "org" / "base", "llama")
    case = prune(model, drop=False, biased=False)
    info = CardInfo(base_model="org/base", rate=0.3, criterion="obs", compensation="none", calibration=("a/b.txt", "hub:x/y", "c4"))

    def made(**asked: str) -> tuple[dict[str, Any], str]:
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        local = with_origin(info, source, {}, **{"base_model": None, "license": None, **asked})  # type: ignore[arg-type]
        text = (written(tmp_path, case, source, local) / "README.md").read_text()
        return metadata_load(tmp_path / "checkpoint" / "README.md"), text

    found, text = made()
    assert ("base_model" in found, found["license"]) == (False, "unknown")
    assert "| Base model | `base`, a local one; what it is on the hub is unknown |" in text
    assert "| License | unknown: the base model's folder names none |" in text
    assert "| Calibration text | b.txt, hub:x/y, c4 |" in text
    (source / "LICENSE").write_text("Our own terms\n")
    assert made()[0]["license_link"] == "LICENSE"
    (source / "LICENSE").write_text(
        "                                 Apache License\n                           Version 2.0, January 2004\n"
    )
    assert made()[0]["license"] == "apache-2.0"
    (source / "README.md").write_text("---\nlicense: gemma\nbase_model: [google/gemma, /models/x, ../y]\n---\n")
    found = made()[0]
    assert (found["license"], found["base_model"], found["base_model_relation"]) == ("gemma", ["google/gemma"], "finetune")
    found, text = made(base_model="me/mine", license="mit")
    assert (found["license"], found["base_model"], found["base_model_relation"]) == ("mit", "me/mine", "finetune")
    assert "| Base model | `base` |" in text
    cached = tmp_path / "models--org--base" / "snapshots" / "0"
    assert with_origin(info, cached, {}, base_model=None, license=None).base_model == "org/base"
    assert json.loads((tmp_path / "checkpoint" / "plan.json").read_text())["base_model"] == "base"


@pytest.mark.usefixtures("verified_here")
def test_no_file_of_a_checkpoint_says_where_it_was_made(tmp_path: Path) -> None:
    """No path of this machine, in any file, metadata of tensors included; the plan tells by content what it is of."""
    base = tiny.tiny_model(tmp_path / "secret" / "base", "llama", ffn=96)
    text = tmp_path / "secret" / "text.txt"
    text.write_text(tiny.sample_text(6000))
    calibration = {"sources": [{"source": str(text)}], "sequences": 8, "length": 64}
    fields: dict[str, Any] = {"calibration": calibration, "ffn_step": 8, "device": "cpu", "license": "mit", "base_model": "me/mine"}
    rates = [0.15, 0.3, 0.45]
    made = [
        api.prune(tmp_path / "secret" / "out", rates=rates, model=str(base), cache=tmp_path / "secret" / "cache", **fields).path
    ]
    for name in ("masked", "gguf", "transformers"):
        made.append(api.export(made[0], tmp_path / "secret" / name, format=name).path)
    selfpruner.load(made[0]).save_pretrained(tmp_path / "secret" / "saved")
    AutoTokenizer.from_pretrained(made[0]).save_pretrained(tmp_path / "secret" / "saved")
    made.append(api.export(tmp_path / "secret" / "saved", tmp_path / "secret" / "again").path)
    for place in made:
        for path in place.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            assert not [word for word in ("secret", str(tmp_path), str(Path.home())) if word.encode() in content], path
    front = metadata_load(made[0] / "README.md")
    assert (front["license"], front["base_model"], front["base_model_relation"]) == ("mit", "me/mine", "finetune")
    plan = json.loads((made[0] / "plan.json").read_text())
    assert (plan["base_model"], plan["calibration"]) == ("base", ["text.txt"])
    assert {name: len(value) for name, value in plan["made_from"].items()} == {"model": 16, "calibration": 16}
    # Another model or text at the same place is another plan.
    text.write_text(tiny.sample_text(6000, seed=1))
    other = api.prune(tmp_path / "other", rates=rates, model=str(base), cache=tmp_path / "secret" / "cache", **fields).path
    assert json.loads((other / "plan.json").read_text())["made_from"]["calibration"] != plan["made_from"]["calibration"]


def test_a_card_goes_to_a_worker_as_it_is() -> None:
    sent = ExportRequest(plan=(0, 1), directory="out", card=CARD).to_json()
    assert ExportRequest.read(json.loads(json.dumps(sent))).card == CARD
    card = sent["card"]
    assert isinstance(card, dict)
    with pytest.raises(ContractError, match="colour"):
        ExportRequest.read({**sent, "card": {**card, "colour": "red"}})
