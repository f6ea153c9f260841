"""The output head is what the files hold, whatever the config says of tying: as transformers reads them, by every reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto import AutoConfig, AutoModelForCausalLM

import selfpruner
from selfpruner import api, models
from selfpruner.architectures import describe
from selfpruner.architectures.cost import model_parameters
from selfpruner.export import formats
from selfpruner.models import checks, streaming
from selfpruner.models.family_layouts import LAYOUTS
from selfpruner.testing.tiny_models import FAMILIES, sample_text, tiny_model, tokens_of
from selfpruner.timing import transformers_model

HEAD = "lm_head.weight"
LARGE = {"layers": 16, "hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 512}  # streamed in 34 MiB


def saved(folder: Path, family: str, change: Callable[[dict[str, Tensor], str], None], **options: Any) -> Path:
    """A model whose config says that its head is tied, with a file that ``change`` made of an untied one's."""
    tiny_model(folder, family, tied=False, **options)
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(body | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    change(tensors, f"{LAYOUTS[family].decoder}.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def own_head(tensors: dict[str, Tensor], embeddings: str) -> None:
    assert not torch.equal(tensors[HEAD], tensors[embeddings])


def only_head(tensors: dict[str, Tensor], embeddings: str) -> None:
    del tensors[embeddings]


def equal_head(tensors: dict[str, Tensor], embeddings: str) -> None:
    tensors[HEAD] = tensors[embeddings].clone()


@pytest.mark.parametrize("change", [own_head, only_head, equal_head])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_transformers_reads_it(family: str, change: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", family, change)
    with models.quiet():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, tied = tokens_of(2, 12), change is not own_head
    whole = models.load(models.resolve(str(folder), tmp_path), "cpu", "float32").model
    files = checks.weight_files(folder)
    streamed = streaming.stream(AutoConfig.from_pretrained(folder), files, torch.device("cpu"), torch.float32, 1 << 14)
    with torch.inference_mode():
        expected = theirs(tokens).logits
        assert torch.equal(whole(tokens).logits, expected)
        torch.testing.assert_close(streamed(tokens).logits, expected, rtol=0, atol=1e-4)
    parameters = sum(parameter.numel() for parameter in theirs.parameters())
    assert model_parameters(describe(whole)) == model_parameters(describe(streamed)) == parameters
    assert transformers_model.outline(str(folder), "auto", tmp_path)[0].work.parameters == parameters
    assert whole.config.tie_word_embeddings is streamed.config.tie_word_embeddings is tied
    assert (whole.lm_head.weight is whole.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("memory", [None, 34 << 20])
@pytest.mark.parametrize("change", [own_head, only_head])
def test_a_checkpoint_keeps_the_head(change: Any, memory: int | None, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", change, **(LARGE if memory else {}))
    (tmp_path / "text.txt").write_text(sample_text(3000))
    text = {"sources": [{"source": str(tmp_path / "text.txt")}], "sequences": 4, "length": 64}
    options: dict[str, Any] = {"model": str(folder), "calibration": text, "criterion": "magnitude", "compensation": "none"}
    options |= {"dtype": "float32", "device": "cpu", "memory": memory, "cache": tmp_path / "cache"}
    made = api.prune(tmp_path / "out", rate=0.2, **options)
    assert made.verification.get("streamed", False) is (memory is not None)
    dense, pruned = load_file(folder / "model.safetensors"), load_file(made.path / "model.safetensors")
    embeddings = "model.embed_tokens.weight"
    body = json.loads((made.path / "config.json").read_text())
    if change is own_head:
        assert body["tie_word_embeddings"] is False
        assert torch.equal(pruned[embeddings], dense[embeddings])
        assert torch.equal(pruned[HEAD], dense[HEAD])
    else:
        assert body["tie_word_embeddings"] is True
        assert torch.equal(pruned[embeddings], dense[HEAD])
        assert HEAD not in pruned
    loaded = selfpruner.load(made.path)
    assert sum(p.numel() for p in loaded.parameters()) == made.parameters == sum(map(Tensor.numel, pruned.values()))
    if memory is not None:
        return
    again = load_file(formats.convert(made.path, tmp_path / "masked", "masked").path / "model.safetensors")
    assert (HEAD in again) is (change is own_head)
    (file,) = formats.convert(made.path, tmp_path / "gguf", "gguf").path.glob("*.gguf")
    written = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(file).tensors}
    assert torch.equal(written["token_embd.weight"], pruned[embeddings])
    assert ("output.weight" in written) is (change is own_head)
    if change is own_head:
        assert torch.equal(written["output.weight"], dense[HEAD])
