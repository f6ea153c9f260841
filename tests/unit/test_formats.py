"""Formats beyond their conformance suite: masked weights stand where they stood, and the command line reaches all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

import selfpruner.testing.tiny_models as tiny
from selfpruner import api
from selfpruner.cli import app as cli
from selfpruner.errors import ConfigError, CorruptCheckpointError, ExportError, FormatError, NotFoundError
from selfpruner.export import formats, modeling_selfpruner, proof
from selfpruner.export import verify as verify_script
from selfpruner.export.checkpoint import load, write
from selfpruner.export.proof import reference_tokens, write_reference
from selfpruner.export.transformers_format import Transformers
from selfpruner.files import manifest
from selfpruner.files.card_info import CardInfo
from selfpruner.files.tensors import TensorFile
from selfpruner.models.family_layouts import Widths, layout_of
from selfpruner.testing.cut_models import Case, Keep, folder, prune
from selfpruner.testing.tiny_models import rows_of, tokens_of
from tests.helpers.exports import written


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fresh process, for tests that compare for themselves."""
    monkeypatch.setattr(proof, "prove", lambda *_: {"problems": []})


# -- masked ------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("drop", [False, True], ids=["narrow", "dropped"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_masked_weights_stand_where_they_stood(tmp_path: Path, family: str, drop: bool) -> None:
    source, model = folder(tmp_path / "base", family)
    case = prune(model, drop=drop, biased=False)
    made = formats.convert(written(tmp_path, case, source), tmp_path / "masked", "masked").path
    assert not list(made.glob("*.py"))
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == family
    masked = AutoModelForCausalLM.from_pretrained(made)
    assert type(masked) is type(model)
    tokens = tokens_of(2, 24)
    expected = case.pruned(tokens, use_cache=False).logits
    assert (masked(tokens, use_cache=False).logits - expected).abs().max() <= 1e-5 * float(expected.abs().max())

    # Every weight is the base model's where it was kept, and zero where it was not; norms of a gone block are anybody's.
    dense, layout = model.state_dict(), layout_of(model.config)
    widths = Widths.of(layout, model.config.to_dict())
    size, per_group = widths.head_dim, widths.heads // widths.kv_heads
    for layer, keep in enumerate(case.keeps):
        heads = [head * size + i for head in keep.heads or () for i in range(size)]
        groups = [g * size + i for g in sorted({head // per_group for head in keep.heads or ()}) for i in range(size)]
        channels = list(keep.channels or ())
        for part in (*layout.attention, *layout.ffn):
            kept = torch.tensor(channels if part in layout.ffn else groups if part in ("k", "v") else heads, dtype=torch.long)
            place, rows = rows_of(model, part)
            full, axis = f"{layout.layer(layer)}.{place}.weight", 1 if part in ("o", "down") else 0
            whole = dense[full][rows]
            wanted = torch.zeros_like(whole).index_copy(axis, kept, whole.index_select(axis, kept))
            assert torch.equal(masked.state_dict()[full][rows], wanted), (full, part)


BIASED = {
    "llama": "llama",
    "mistral": "llama",  # has no biases at all, and is a Llama without its window
    "qwen2": "llama",  # has biases on q, k and v, which a Llama has as well
    "opt": "opt",  # has them everywhere
}


@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_a_repairs_biases_are_written_where_a_model_can_have_them(tmp_path: Path, family: str) -> None:
    source, model = folder(tmp_path / "base", family)
    case = prune(model, drop=True, biased=True)
    checkpoint = written(tmp_path, case, source)
    if family not in BIASED:
        refusal = rf"An ordinary {family} model has no place for .*down_proj\.bias .*compensation least_squares_weights"
        with pytest.raises(FormatError, match=refusal) as error:
            formats.convert(checkpoint, tmp_path / "masked", "masked")
        assert error.value.param == "compensation"
        assert not (tmp_path / "masked").exists()
        return
    made = formats.convert(checkpoint, tmp_path / "masked", "masked").path
    assert json.loads((made / "config.json").read_text())["model_type"] == BIASED[family]
    tokens = tokens_of(2, 24)
    expected = case.pruned(tokens, use_cache=False).logits
    masked = AutoModelForCausalLM.from_pretrained(made)
    assert (masked(tokens, use_cache=False).logits - expected).abs().max() <= 1e-5 * float(expected.abs().max())


@pytest.mark.usefixtures("unproven")
def test_a_sliding_window_is_no_llama(tmp_path: Path) -> None:
    source, model = folder(tmp_path / "base", "mistral", sliding_window=6)
    checkpoint = written(tmp_path, prune(model, drop=False, biased=True), source)
    with pytest.raises(FormatError, match="An ordinary mistral model has no place"):
        formats.convert(checkpoint, tmp_path / "masked", "masked")


@pytest.mark.usefixtures("unproven")
def test_a_uniform_checkpoint_is_masked_as_well(tmp_path: Path) -> None:
    source, model = folder(tmp_path / "base", "qwen2", kv_heads=4)
    heads, channels = (0, 2), tuple(range(8, 56))
    rows = torch.tensor([head * 8 + i for head in heads for i in range(8)])
    dense, weights = model.state_dict(), {}
    for layer in range(3):
        place = f"model.layers.{layer}."
        for name in ("q", "k", "v"):
            for kind in ("weight", "bias"):
                full = f"{place}self_attn.{name}_proj.{kind}"
                weights[full] = dense[full][rows]
        weights[f"{place}self_attn.o_proj.weight"] = dense[f"{place}self_attn.o_proj.weight"][:, rows]
        for name in ("gate", "up"):
            weights[f"{place}mlp.{name}_proj.weight"] = dense[f"{place}mlp.{name}_proj.weight"][8:56]
        weights[f"{place}mlp.down_proj.weight"] = dense[f"{place}mlp.down_proj.weight"][:, 8:56]
    from selfpruner.export.build import build
    from selfpruner.pruning.layer_shapes import LayerShape

    case = Case(model, build(model, [LayerShape(2, 1, 48)] * 3, weights), [Keep(heads, channels)] * 3, {})
    checkpoint = written(tmp_path, case, source)
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "qwen2"
    made = formats.convert(checkpoint, tmp_path / "masked", "masked").path
    tokens = tokens_of(1, 16)
    with torch.inference_mode():
        expected = case.pruned(tokens).logits
        assert (AutoModelForCausalLM.from_pretrained(made)(tokens).logits - expected).abs().max() <= 1e-4


@pytest.mark.usefixtures("unproven")
def test_masked_refuses_what_it_cannot_place(tmp_path: Path) -> None:
    source, model = folder(tmp_path / "base", "llama")
    case = prune(model, drop=False, biased=False)
    tokenizer = AutoTokenizer.from_pretrained(source)
    zeros = CardInfo(base_model="example/tiny", rate=0.5, pattern="n_m", criterion="sparsegpt", compensation="none")
    thin = write(case.pruned, tokenizer, None, tmp_path / "thin", zeros).path
    with pytest.raises(FormatError, match="pattern n_m has its zeros in the original shapes"):
        formats.convert(thin, tmp_path / "masked", "masked")
    made = formats.convert(written(tmp_path, case, source), tmp_path / "masked", "masked").path
    with pytest.raises(FormatError, match="is in the format masked; formats are made from a checkpoint"):
        formats.convert(made, tmp_path / "again", "transformers")


# -- proofs ------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("unproven")
def test_16_bit_checkpoints_are_compared_in_float32(tmp_path: Path) -> None:
    """What rounds otherwise in other shapes, or on another processor, would hide what is wrong, or feign it."""
    source, model = folder(tmp_path / "base", "llama", dtype="bfloat16")
    case = prune(model, drop=True, biased=True)
    made = written(tmp_path, case, source)
    kept = TensorFile(made / proof.REFERENCE)
    tokens = kept.read("tokens")
    with torch.inference_mode():
        expected = load(made, dtype=torch.float32)(tokens).logits
        rounded = load(made)(tokens).logits.float()
        with verify_script.exact(same := load(made)):
            assert (same(tokens).logits - expected).abs().max() <= 1e-5
        assert same.dtype == torch.bfloat16
        assert torch.equal(same(tokens).logits.float(), rounded), "it computes as before"
    assert (kept.read("logits") - expected).abs().max() <= 1e-5 < (rounded - expected).abs().max()
    copied = formats.convert(made, tmp_path / "copy", "transformers").path
    assert (copied / proof.REFERENCE).read_bytes() == (made / proof.REFERENCE).read_bytes()
    masked = formats.convert(made, tmp_path / "masked", "masked").path
    assert json.loads((masked / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(TensorFile(masked / proof.REFERENCE).read("logits"), kept.read("logits"))
    with torch.inference_mode():
        assert (load(masked, dtype=torch.float32)(tokens).logits - expected).abs().max() <= 1e-4


@pytest.mark.usefixtures("unproven")
def test_a_reference_in_16_bits_is_no_proof(tmp_path: Path) -> None:
    source, model = folder(tmp_path / "base", "llama", dtype="bfloat16")
    made = written(tmp_path, prune(model, drop=False, biased=True), source)
    body, file = manifest.read(made), TensorFile(made / proof.REFERENCE)
    tensors = {name: file.read(name).clone() for name in file.shapes}
    save_file(tensors, made / proof.REFERENCE, metadata={**file.metadata, "dtype": "bfloat16"})
    (made / manifest.NAME).unlink()
    manifest.write(made, plan=body["plan"], parameters=body["parameters"], verification={})
    with pytest.raises(ExportError, match=r"an older version wrote it\. Export it again"):
        formats.convert(made, tmp_path / "other", "masked")
    with pytest.raises(ExportError, match=r"an older version wrote it\. Export it again"):
        formats.verify(made)
    assert not (tmp_path / "other").exists()


def test_a_reference_is_bounded_and_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.tiny_tokenizer()
    monkeypatch.setattr(proof, "REFERENCE_BYTES", 4 * 2 * 128 * 5)
    tokens = reference_tokens(128, 512)
    logits = torch.randn(2, 48, 128)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_reference(tmp_path / name, tokens, logits, parameters=7, tokenizer=tokenizer)
    one, two = (tmp_path / name / proof.REFERENCE for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()
    file = TensorFile(one)
    assert torch.equal(file.read("logits"), logits[:, -5:])
    assert torch.equal(file.read("tokens"), tokens)
    assert (file.metadata["parameters"], file.metadata["dtype"]) == ("7", "float32")
    assert reference_tokens(128, 10).shape == (2, 10)


@pytest.mark.usefixtures("unproven")
def test_code_of_others_is_not_run(tmp_path: Path) -> None:
    source, model = folder(tmp_path / "base", "llama")
    made = written(tmp_path, prune(model, drop=False, biased=True), source)

    def arguments() -> list[str]:
        return Transformers().verifier(made, made / proof.REFERENCE, "cpu")

    assert "--installed" not in arguments()
    code = made / Path(modeling_selfpruner.__file__).name
    body = code.read_text()
    code.write_text(body + "\nprint('mine')\n")
    assert "--installed" in arguments()
    code.write_text(body)
    (made / "other.py").write_text("")
    assert "--installed" in arguments()
    (made / "other.py").unlink()
    settings = made / "tokenizer_config.json"
    tokenizer = json.loads(settings.read_text())
    settings.write_text(json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["evil--tokenizer.Tokenizer", None]}}))
    assert "--installed" in arguments()


def test_a_changed_modeling_file_is_not_run_when_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose manifest was made anew around foreign code: the proof uses the installed classes."""
    source, model = folder(tmp_path / "base", "llama")
    with monkeypatch.context() as patch:
        patch.setattr(proof, "prove", lambda *_: {"problems": []})
        made = written(tmp_path, prune(model, drop=False, biased=True), source)
    code = made / Path(modeling_selfpruner.__file__).name
    code.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n" + code.read_text())
    body = manifest.read(made)
    (made / manifest.NAME).unlink()
    manifest.write(made, plan=body["plan"], parameters=body["parameters"], verification={})
    found = formats.verify(made)["verification"]
    assert found["code"] == "selfpruner"
    assert found["problems"] == []
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.usefixtures("unproven")
def test_verify_names_what_is_missing(tmp_path: Path) -> None:
    source, model = folder(tmp_path / "base", "llama")
    made = written(tmp_path, prune(model, drop=False, biased=False), source)
    body = manifest.read(made)
    (made / proof.REFERENCE).unlink()
    with pytest.raises(CorruptCheckpointError, match="proof/reference"):
        formats.verify(made)
    (made / manifest.NAME).unlink()
    with pytest.raises(ExportError, match="incomplete"):
        formats.verify(made)
    manifest.write(made, plan=body["plan"], parameters=body["parameters"], verification={})
    with pytest.raises(ExportError, match="an older version wrote it"):
        formats.verify(made)


# -- the command line --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A real plan of a tiny model, made and proven as a job does; and the fields that made it."""
    root = tmp_path_factory.mktemp("pruned")
    tiny.tiny_model(root / "base", "llama", kv_heads=2, ffn=96)
    text = root / "text.txt"
    text.write_text(tiny.sample_text(6000))
    config = root / "config.json"
    calibration = {"sources": [{"source": str(text)}], "sequences": 8, "length": 64}
    fields = {"model": str(root / "base"), "calibration": calibration, "ffn_step": 8, "compensation": "bias", "device": "cpu"}
    config.write_text(json.dumps({**fields, "dtype": "float32"}))
    api.prune(root / "checkpoint", rates=[0.15, 0.3, 0.45], cache=root / "cache", **{**fields, "dtype": "float32"})
    return root / "checkpoint", config


def test_a_jobs_checkpoint_is_masked_and_proven_from_the_command_line(
    pruned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = pruned
    units = json.loads((checkpoint / "units.json").read_text())
    shapes = json.loads((checkpoint / "plan.json").read_text())["layers"]
    for kept, shape in zip(units["layers"], shapes, strict=True):
        assert len(range(96) if kept["ffn_channels"] is None else set(kept["ffn_channels"])) == shape["ffn_channels"]
        assert len(range(4) if kept["query_heads"] is None else set(kept["query_heads"])) == shape["query_heads"]
    assert any(shape["ffn_channels"] < 96 for shape in shapes)
    assert any(shape["query_heads"] < 4 for shape in shapes)

    assert cli.run(["export", str(checkpoint), "--format", "masked", "-o", str(tmp_path / "masked"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["verification"]["problems"] == []
    assert printed["verification"]["max_difference"] <= 1e-3
    assert printed["verification"]["class"] == "LlamaForCausalLM"
    assert printed["verification"]["code"] == "transformers"
    dense = AutoModelForCausalLM.from_pretrained(Path(json.loads((pruned[1]).read_text())["model"]))
    masked = load(tmp_path / "masked")
    # FLAP's biases are there; otherwise it has the base model's shapes.
    shapes_of = {name: tensor.shape for name, tensor in masked.state_dict().items() if not name.endswith(".bias")}
    assert shapes_of == {name: tensor.shape for name, tensor in dense.state_dict().items()}

    assert cli.run(["verify", str(tmp_path / "masked")]) == 0
    out = capsys.readouterr().out
    assert "masked" in out
    assert "files unchanged" in out
    assert "logits differ by at most" in out
    (tmp_path / "masked" / "plan.json").write_text("{}")
    assert cli.run(["verify", str(tmp_path / "masked")]) == 1
    assert "plan.json has 2 bytes instead of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("export {checkpoint} --format onnx -o {out}", 2, "Known: "),
        ("export {checkpoint} --format masked --quantize q8_0 -o {out}", 2, "no quantization 'q8_0'"),
        ("export {checkpoint} --plan 0123 -o {out}", 2, "one checkpoint"),
        ("export {out}/none -o {out}", 2, "is no checkpoint"),
        ("export job_0 -o {out} --url http://127.0.0.1:9", 1, "selfpruner serve"),
        ("verify {out}", 1, "no such folder"),
        ("verify {checkpoint} --memory lots", 2, "bytes"),
    ],
)
def test_bad_exports_are_one_line(
    pruned: tuple[Path, Path], tmp_path: Path, line: str, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.run(line.format(checkpoint=pruned[0], out=out).split()) == code
    text = capsys.readouterr().err
    assert says in text
    assert sum(" · " not in line for line in text.splitlines()) == 1, "beside how far it is"
    assert not out.exists()


@pytest.mark.usefixtures("unproven")
def test_plans_that_do_not_divide_are_refused_and_searches_can_avoid_them(tmp_path: Path, pruned: tuple[Path, Path]) -> None:
    fields = json.loads(pruned[1].read_text())
    with pytest.raises(FormatError, match=r"do not divide among 4 ranks\. A search with tensor_parallel 4 keeps") as error:
        api.export(pruned[0], tmp_path / "out", tensor_parallel=4)
    assert error.value.param == "tensor_parallel"
    with pytest.raises(FormatError, match="leave it out with masked"):
        api.export(pruned[0], tmp_path / "out", format="masked", tensor_parallel=2)
    assert list(tmp_path.iterdir()) == []

    tiny.tiny_model(tmp_path / "base", "llama", heads=8, kv_heads=4, hidden=64, ffn=640)
    made = api.prune(
        tmp_path / "pruned",
        rate=0.4,
        cache=tmp_path / "cache",
        **{**fields, "model": str(tmp_path / "base"), "ffn_step": 32, "tensor_parallel": 2, "attention": "kv_group"},
    )
    layers = json.loads((made.path / "plan.json").read_text())["layers"]
    assert {layer["kv_groups"] for layer in layers} == {2}
    assert all(layer["query_heads"] == 2 * layer["kv_groups"] and layer["ffn_channels"] % 32 == 0 for layer in layers)
    assert api.export(made.path, tmp_path / "out", tensor_parallel=2).parameters == made.parameters
    for changes, param in (
        ({"tensor_parallel": 3, "ffn_step": 24}, "tensor_parallel"),
        ({"pattern": "n_m", "tensor_parallel": 2}, None),
    ):
        with pytest.raises(ConfigError, match="tensor_parallel") as refused:
            api.prune(tmp_path / "other", rate=0.4, cache=tmp_path / "cache", **{**fields, "compensation": "none", **changes})
        assert refused.value.param == param
    assert not (tmp_path / "other").exists()


def test_a_streamed_proof(pruned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(pruned[0]), "--memory", "64MiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["verification"]
    assert found["streamed"]
    assert found["max_difference"] <= found["allowed_difference"]


def test_any_plan_of_a_search_in_any_format(tmp_path: Path, pruned: tuple[Path, Path], unproven: Callable[..., Any]) -> None:  # noqa: ARG001
    fields = {key: value for key, value in json.loads(pruned[1].read_text()).items() if key != "compensation"}
    text = {"sources": fields["calibration"]["sources"], "sequences": 8, "length": 64}
    quick = {"preset": "evolution", "generations": 0, "initial": ["uniform"], "surveys": 0, "generation_probe": False}
    tokens = {"probe_tokens": 64, "stages": [{"tokens": 64, "keep": 1}], "final_tokens": 128, "population": 1}
    run, cache = tmp_path / "run", pruned[0].parent / "cache"
    api.search(0.2, run, cache=cache, fitness_text=text, report_text=text, compensation="none", **{**fields, **quick, **tokens})
    made = api.export(run, tmp_path / "masked", format="masked", cache=cache)
    assert manifest.read(made.path)["export"]["format"] == "masked"
    assert made.plan.levels == tuple(json.loads((run / "checkpoint" / "plan.json").read_text())["levels"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masked", "run"]
    with pytest.raises(NotFoundError):
        api.export(run, tmp_path / "other", format="masked", plan="0" * 16, cache=cache)
    with pytest.raises(ConfigError):
        api.export(tmp_path / "masked", tmp_path / "other", plan="0" * 16)


def test_what_a_format_cannot_take_of_a_search_is_said_before_work_begins(tmp_path: Path, unproven: Callable[..., Any]) -> None:  # noqa: ARG001
    (tmp_path / "text.txt").write_text("\n\n".join(f"Sentence {i} about the number {i * 7}." for i in range(900)))
    text = {"sources": [{"source": str(tmp_path / "text.txt")}], "sequences": 8, "length": 48}
    quick = {"preset": "evolution", "generations": 0, "initial": ["uniform"], "surveys": 0, "generation_probe": False}
    tokens = {"probe_tokens": 48, "stages": [{"tokens": 48, "keep": 1}], "final_tokens": 96, "population": 1}
    texts = {"calibration": text, "fitness_text": text, "report_text": text}
    said: list[str] = []

    def refused(family: str, **how: Any) -> FormatError:
        run = tmp_path / family
        if not run.exists():
            model = str(tiny.tiny_model(tmp_path / f"{family}-model", family))
            api.search(0.2, run, cache=tmp_path / "cache", model=model, device="cpu", **texts, **quick, **tokens)
        with pytest.raises(FormatError) as caught:
            api.export(run, tmp_path / "out", cache=tmp_path / "cache", progress=said.append, **how)
        return caught.value

    assert "of the family opt cannot be written" in refused("opt", format="gguf").message
    assert "no quantization 'q99'" in refused("opt", format="gguf", quantize="q99").message
    assert refused("opt", format="masked", tensor_parallel=2).param == "tensor_parallel"
    biased = refused("qwen3", format="gguf")
    assert (biased.param, "least_squares_weights leaves none" in biased.message) == ("compensation", True)
    assert said == []
    assert not (tmp_path / "out").exists()
