"""The format ``masked``: removed units are zeros in their old places, so the model has its original shapes again.

It computes what the pruned model computes, loads wherever the base model loads, and saves nothing. Weights are put back one by
one: neither the base model nor the pruned one is ever whole in memory.

A repair's biases on o_proj and down_proj stay where the family has such biases: a Llama's ``attention_bias`` and ``mlp_bias`` cover
all matrices of a block, and the others are zero. A Mistral or a Qwen2 has none there, but without a sliding window it is a Llama
in all but name, and is written as one. What even a Llama cannot say is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import AutoConfig

from selfpruner.errors import FormatError
from selfpruner.export.base import Checkpoint
from selfpruner.export.build import count_parameters, ordinary
from selfpruner.export.card import loading
from selfpruner.export.checkpoint import SHARD_BYTES, stored, write_json, write_shards
from selfpruner.export.shape import KeptUnits
from selfpruner.export.transformers_format import Transformers


class Masked(Transformers):
    name: ClassVar[str] = "masked"

    def check(self, checkpoint: Checkpoint, quantize: str | None) -> None:  # noqa: ARG002
        if checkpoint.plan["pattern"] != "structured":
            raise FormatError(
                f"{checkpoint.folder} has the pattern {checkpoint.plan['pattern']}: its zeros are in the original shapes already, "
                "and it loads everywhere as it is. Use the format transformers.",
                param="format",
            )
        if not (checkpoint.folder / "units.json").is_file():
            raise FormatError(
                f"{checkpoint.folder} has no units.json, which says where the kept units were. Export it again from its search.",
                param="format",
            )
        self._twin(checkpoint)

    def write(self, checkpoint: Checkpoint, folder: Path, quantize: str | None, go_on: Callable[[], None]) -> int:  # noqa: ARG002
        twin = self._twin(checkpoint)
        units, width = _units(checkpoint), int(twin.config.head_dim)
        wanted = stored(twin)
        for name in ("generation_config.json", *_TOKENIZER):
            for path in checkpoint.folder.glob(name):
                (folder / path.name).write_bytes(path.read_bytes())
        body = twin.config.to_diff_dict()
        body["dtype"] = checkpoint.plan["dtype"]
        write_json(folder / "config.json", body)
        dtype = getattr(torch, checkpoint.plan["dtype"])
        outline = {name: tensor.to(dtype) for name, tensor in wanted.items()}

        def tensor(name: str) -> Tensor:
            go_on()
            if name not in checkpoint.tensors:
                # A bias of nothing, or what belongs to a block that is gone; what its norm says is multiplied by zeros.
                return torch.full(outline[name].shape, float("norm" in name), dtype=dtype)
            return _put_back(name, checkpoint.tensor(name), outline[name].shape, units, width)

        parameters = count_parameters(twin)
        write_shards(outline, folder, parameters, SHARD_BYTES, tensor, go_on)
        return parameters

    def use(self, checkpoint: Checkpoint, quantize: str | None) -> str:  # noqa: ARG002
        return (
            "This is the pruned model in the base model's shapes, with zeros where units were removed. It computes the same and\n"
            "loads everywhere, but saves neither memory nor time; the parameters above are without the zeros.\n\n"
            f"{loading(None)}"
        )

    def _twin(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """The ordinary model, on the meta device, that has a place for every tensor of the checkpoint. Raises FormatError."""
        config: Any = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
        base = _units(checkpoint).base
        biased = {name.split(".")[3] for name in checkpoint.tensors if name.startswith("model.layers.") and name.endswith(".bias")}
        family = checkpoint.plan["family"]
        full = not getattr(config, "sliding_window", None) and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        missing: set[str] = set()
        for name in dict.fromkeys((family, "llama") if full else (family,)):
            twin = ordinary(config, name, base, biases=("self_attn" in biased, "mlp" in biased))
            left = set(checkpoint.tensors) - set(stored(twin) if twin is not None else ())
            if twin is not None and not left:
                return twin
            missing = missing or left
        raise FormatError(
            f"An ordinary {family} model has no place for {min(missing)} and {len(missing) - 1} more tensors. Biases come from the "
            "repair: a search with compensation none has none of its own.",
            param="compensation",
        )


_TOKENIZER = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def _units(checkpoint: Checkpoint) -> KeptUnits:
    return KeptUnits.from_dict(json.loads((checkpoint.folder / "units.json").read_text("utf-8")))


def _put_back(name: str, value: Tensor, shape: torch.Size, units: KeptUnits, width: int) -> Tensor:
    """``value`` in zeros of ``shape``, its rows or columns where the base model has them; ``width`` is that of a head."""
    parts = name.split(".")
    if parts[1] != "layers" or not parts[-2].endswith("_proj"):
        return value
    layer = int(parts[2])
    if parts[3] == "mlp":
        places = torch.tensor(units.channels(layer))
    else:
        of = units.groups if parts[-2] in ("k_proj", "v_proj") else units.heads
        places = (torch.tensor(of(layer))[:, None] * width + torch.arange(width)).flatten()
    if parts[-2] in ("o_proj", "down_proj"):
        if value.ndim == 1:
            return value  # a bias of the block's output
        return value.new_zeros(shape).index_copy(1, places, value)
    return value.new_zeros(shape).index_copy(0, places, value)
