"""What users of this field's tools report in public, tried here: every situation names its report in tests/README.md.

Situations that other tests hold already are not repeated.
"""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from selfpruner import api, models
from selfpruner.api import Pruned
from selfpruner.cli import app as cli
from selfpruner.config import SearchConfig
from selfpruner.errors import ConflictError, ModelError, ModelNotFoundError, SelfprunerError
from selfpruner.export.folder import write_folder
from selfpruner.files import manifest
from selfpruner.jobs.handler import SessionHandler
from selfpruner.jobs.run import run_job, session_of
from selfpruner.judging.quality import MeasurementFile
from selfpruner.planning.space import Plan
from selfpruner.testing.spaces import space_of
from selfpruner.testing.tiny_models import sample_text
from selfpruner.workers.base import Session
from selfpruner.workers.tasks import PrepareRequest
from tests.helpers.searching import MemoryRecorder, prepared_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Every tensor under another name."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")

    return apply


def pointer(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(POINTER)


def only_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def with_a_byte_order_mark(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())


def leading_nowhere(name: str) -> Callable[[Path], None]:
    """A snapshot of a hub cache, copied without its blobs."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(f"../../blobs/{name}")

    return apply


# -- what is refused, before weights are read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (config(pad_token_id=128), ModelError, "pad_token_id = 128, and the model has the tokens 0 to 127"),
        (config(pad_token_id=[0]), ModelError, r"pad_token_id = \[0\].*or to null"),
        (pointer("model.safetensors"), ModelError, "pointer of Git LFS.*git lfs pull"),
        (pointer("tokenizer.json"), ModelError, r"tokenizer\.json is a pointer of Git LFS"),
        (renamed(lambda name: f"_orig_mod.{name}"), ModelError, r"_orig_mod\.model\.embed_tokens.*save_pretrained"),
        (renamed(lambda name: f"base_model.model.{name}"), ModelError, "PEFT.*save_pretrained"),
        (renamed(lambda name: name.removeprefix("model.")), ModelError, "without its head"),
        (only_an_adapter, ModelNotFoundError, "PEFT adapter.*merge_and_unload"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
            ModelError,
            r"consolidated\.safetensors is not read",
        ),
        (leading_nowhere("config.json"), ModelError, r"config\.json is a link to a file that is not there .*cp -rL"),
        (leading_nowhere("model.safetensors"), ModelError, r"model\.safetensors is a link to a file that is not there"),
        (leading_nowhere("tokenizer.json"), ModelError, r"tokenizer\.json is a link to a file that is not there"),
        (lambda folder: (folder / "config.json").write_bytes(b'{"a": "\xa5"}'), ModelError, "cannot be read as JSON"),
        (with_a_byte_order_mark, ModelError, "cannot be read as JSON.*BOM"),
    ],
)
def test_refused_when_resolved(
    damage: Callable[[Path], object], error: type[SelfprunerError], words: str, folder: Path, tmp_path: Path
) -> None:
    damage(folder)
    with pytest.raises(error, match=words) as caught:
        models.resolve(str(folder), tmp_path)
    assert caught.value.param == "model"


def test_a_pointer_instead_of_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(POINTER)
    with pytest.raises(ModelError, match="pointer of Git LFS"):
        models.resolve(str(tmp_path / "model.gguf"), tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "The tokenizer of .* Copy the model's own tokenizer files"),
        # Without sentencepiece and tiktoken, transformers asks for tiktoken whatever the file is.
        (
            lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
            "The tokenizer of .* tokenizer.json among them",
        ),
        (config(problem_type="single_label_classification", num_labels=1), r"config\.json of .* cannot be loaded"),
    ],
)
def test_refused_before_the_weights_are_read(
    damage: Callable[[Path], object], words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfpruner.models.streaming.whole", lambda *_: pytest.fail("the weights were read"))
    damage(folder)
    with pytest.raises(ModelError, match=words):
        models.load(models.resolve(str(folder), tmp_path), "cpu", "float32")


# -- what works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "notes",
    [
        {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"},
        {"return_dict": False},
        {"output_attentions": True, "output_hidden_states": True},
    ],
)
def test_notes_of_how_a_model_was_run_change_nothing(notes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    tokens = torch.arange(3, 19)[None]
    before = models.load(models.resolve(str(folder), tmp_path), "cpu", "float32").model(tokens)
    edit(folder / "config.json", **notes)
    after = models.load(models.resolve(str(folder), tmp_path), "cpu", "float32").model(tokens)
    assert torch.equal(before.logits, after.logits)
    assert before.keys() == after.keys()


def beside(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """Tensors the config does not call for."""
    return lambda folder: save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")


def an_adapter(folder: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "owner/another", "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}, folder / "adapter_model.safetensors"
    )


def a_stale_index(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00030.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_second_copy(folder: Path) -> None:
    save_file({"layers.0.attention.wk.weight": torch.ones(16, 32)}, folder / "consolidated.safetensors")


def metadata_that_is_null(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(json.loads(raw[8 : 8 + length]) | {"__metadata__": None}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        beside(**{f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}),
        beside(**{"model.layers.9.mlp.up_proj.weight": torch.ones(64, 32)}),
        beside(**{"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        an_adapter,
        a_stale_index,
        a_second_copy,
        metadata_that_is_null,
    ],
)
def test_what_is_not_of_the_model_changes_nothing(change: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    tokens = torch.arange(3, 19)[None]
    before = models.load(models.resolve(str(folder), tmp_path), "cpu", "float32").model(tokens).logits
    change(folder)
    assert torch.equal(models.load(models.resolve(str(folder), tmp_path), "cpu", "float32").model(tokens).logits, before)


def test_a_link_to_another_disk_stays_a_link(tmp_path: Path) -> None:
    """Checkpoints and result files are made aside and moved into place; the place is where a link leads."""
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large")

    def export(parameters: int) -> Path:
        def fill(folder: Path) -> int:
            (folder / "plan.json").write_text("{}")
            return parameters

        plan = {"parameters": parameters}
        return write_folder(tmp_path / "out", plan=plan, export={}, fill=fill, prove=lambda _: {}, go_on=lambda: None).path

    assert export(1) == tmp_path / "out"
    assert (tmp_path / "out").is_symlink()
    assert manifest.check(tmp_path / "large")["parameters"] == 1
    assert export(1) == tmp_path / "out"  # complete and the same: kept
    (tmp_path / "large" / "plan.json").write_text("damaged")
    export(2)  # replaced
    assert manifest.check(tmp_path / "large")["parameters"] == 2

    (tmp_path / "quality.json").symlink_to(tmp_path / "large" / "quality.json")
    MeasurementFile(tmp_path / "quality.json").add({"fingerprint": "f", "setting": {}})
    assert MeasurementFile(tmp_path / "large" / "quality.json").find("f", {}) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out", "quality.json"]


def test_a_terminal_without_a_character_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pruned(tmp_path / "mod\N{LATIN SMALL LETTER E WITH GRAVE}le", 1, Plan((0,)), [0.0], {})
    monkeypatch.setattr("selfpruner.api.prune", lambda *_, **__: made)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.argv", ["selfpruner", "prune", "--rate", "0.2", "-o", str(made.path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    screen.seek(0)
    assert ended.value.code == 0
    assert "mod\\xe8le" in screen.read()


# -- files that change while a job or a server lives -------------------------------------------------------------------


def scale_ffn(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 1.5 * t if "mlp" in name else t for name, t in tensors.items()}, folder / "model.safetensors")


def rewrite(text: Path) -> None:
    text.write_text(sample_text(4000, seed=2))


def session_on(folder: Path, text: Path) -> Session:
    words = {"sources": [{"source": str(text)}], "sequences": 4, "length": 32}
    body = {"model": str(folder), "rate": 0.2, "device": "cpu", "dtype": "float32"}
    texts = dict.fromkeys(("calibration", "fitness_text", "report_text"), words)
    return session_of(SearchConfig.model_validate({**body, **texts}), folder.parent / "cache")


def test_a_warm_worker_begins_a_job_with_the_files_of_now(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text(4000, seed=1))
    handler, session = SessionHandler("cpu"), session_on(folder, text)

    def fingerprints() -> tuple[str, list[str]]:
        made = handler.handle(session, PrepareRequest(), lambda _: None, lambda: False)
        return made.model.fingerprint, [made.texts[role].fingerprint for role in ("calibration", "fitness", "report")]

    first = fingerprints()
    held = handler._prepared
    assert fingerprints() == first
    assert handler._prepared is held  # what did not change is not prepared again
    scale_ffn(folder)
    second = fingerprints()
    assert second[0] == models.resolve(str(folder), tmp_path).fingerprint != first[0]
    rewrite(text)
    third = fingerprints()
    assert third[0] == second[0]
    assert all(now != then for now, then in zip(third[1], second[1], strict=True))
    shutil.rmtree(folder)  # what is held will do
    assert fingerprints() == third


@pytest.mark.parametrize(
    ("then", "words"),
    [({"model": "m"}, "its model"), ({"fitness": "t"}, "its fitness text"), ({"model": "m", "fitness": "t"}, "and its")],
)
def test_a_job_does_not_go_on_with_other_files(then: dict[str, str], words: str) -> None:
    """Scores of the old model and the new one would decide together."""
    now = {
        "model": {"name": "x", "fingerprint": then.get("model", "same")},
        "texts": {"fitness": {"fingerprint": then.get("fitness", "same")}, "report": {"fingerprint": "same"}},
    }

    async def prepared(*_: Any) -> Any:
        return prepared_of(space_of())

    recorder = MemoryRecorder()
    recorder.event("prepared", "search.prepared", "", data=now)
    asked: Any = SimpleNamespace(run=prepared, workers=1)
    with pytest.raises(ConflictError, match=f"began with other files: .*{words}"):
        asyncio.run(
            run_job(
                SearchConfig(rate=0.2, preset="evolution"),
                job_id="job",
                pool=asked,
                proposer_settings={},
                recorder=recorder,
                cache=Path("cache"),
                checkpoint_dir=Path("checkpoint"),
            )
        )


def test_an_interrupted_search_whose_model_was_replaced_is_refused(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text(4000, seed=1))
    fields = {name: value for name, value in session_on(folder, text).config.items() if name not in ("rate", "rates")}
    small = {
        "preset": "evolution",
        "initial": ["uniform"],
        "generations": 0,
        "stages": [{"tokens": 32, "keep": 1}],
        "final_tokens": 32,
    }

    def interrupt(name: str, data: Mapping[str, Any]) -> None:
        if name == "job" and data["progress"] and data["progress"]["evaluations"]:
            raise KeyboardInterrupt

    def search(**more: Any) -> Any:
        return api.search(0.2, tmp_path / "run", cache=tmp_path / "cache", **{**fields, **small, "probe_tokens": 32, **more})

    with pytest.raises(KeyboardInterrupt):
        search(watch=interrupt)
    scale_ffn(folder)
    with pytest.raises(ConflictError, match="its model"):
        search()
