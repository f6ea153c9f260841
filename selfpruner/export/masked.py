"""The format ``masked``: removed units are zeros in their old places, so the model has its original shapes again.

It computes what the pruned model computes, loads wherever the base model loads, and saves nothing. Weights are put back one by
one: neither the base model nor the pruned one is ever in memory as a whole.

A repair's biases on o_proj and down_proj stay where the family has such biases: a Llama's ``attention_bias`` and ``mlp_bias`` cover
all matrices of a block, and the others are zero. A Mistral or a Qwen2 has none there, but without a sliding window it is a Llama
in all but name and is written as one. What even a Llama cannot express is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import AutoConfig

from selfpruner.catalogue import PATTERNS
from selfpruner.errors import FormatError
from selfpruner.export.base import FinishedCheckpoint, Origin
from selfpruner.export.build import count_parameters, ordinary
from selfpruner.export.card import loading
from selfpruner.export.checkpoint import SHARD_BYTES, stored, write_json, write_shards
from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.export.older import with_older_fields
from selfpruner.export.transformers_format import Transformers
from selfpruner.models import quiet
from selfpruner.models.family_layouts import LAYOUTS, Layout, whole_number
from selfpruner.pruning.layer_shapes import KeptUnits, LayerShape


class Masked(Transformers):
    name: ClassVar[str] = "masked"

    def precheck(self, origin: Origin, quantize: str | None) -> None:  # noqa: ARG002
        _check_pattern(origin.pattern)

    def check(self, checkpoint: FinishedCheckpoint, quantize: str | None) -> None:  # noqa: ARG002
        _check_pattern(checkpoint.plan["pattern"])
        self._twin(checkpoint)

    def write(self, checkpoint: FinishedCheckpoint, folder: Path, quantize: str | None, go_on: Callable[[], None]) -> int:  # noqa: ARG002
        twin = self._twin(checkpoint)
        units, layout = _units(checkpoint), LAYOUTS[checkpoint.plan["family"]]
        width = int(getattr(twin.config, "head_dim", None) or twin.config.hidden_size // twin.config.num_attention_heads)
        wanted = stored(twin)
        for name in ("generation_config.json", *_TOKENIZER):
            for path in checkpoint.folder.glob(name):
                (folder / path.name).write_bytes(path.read_bytes())
        body = with_older_fields(twin.config.to_diff_dict())
        body["dtype"] = checkpoint.plan["dtype"]
        write_json(folder / "config.json", body)
        dtype = getattr(torch, checkpoint.plan["dtype"])
        outline = {name: tensor.to(dtype) for name, tensor in wanted.items()}

        def tensor(name: str) -> Tensor:
            go_on()
            if name not in checkpoint.tensors:
                # A bias that is zero, or a tensor of a block that is gone: the output of its norm is multiplied by zeros.
                return torch.full(outline[name].shape, float("norm" in name), dtype=dtype)
            return _put_back(name, checkpoint.tensor(name), outline[name].shape, units, layout, width)

        parameters = count_parameters(twin)
        write_shards(outline, folder, parameters, SHARD_BYTES, tensor, go_on)
        return parameters

    def use(self, checkpoint: FinishedCheckpoint, quantize: str | None) -> str:  # noqa: ARG002
        where = (
            "in the base model's shapes, with zeros where units were removed"
            if _file(checkpoint).is_file()
            else "in one shape for all layers, with zeros behind what each layer has (where its units once were is not recorded)"
        )
        return (
            f"This is the pruned model {where}. It computes the same and\n"
            "loads everywhere, but saves neither memory nor time; the parameters above are without the zeros.\n\n"
            f"{loading(self._twin(checkpoint).config.to_diff_dict())}"
        )

    def _twin(self, checkpoint: FinishedCheckpoint) -> PreTrainedModel:
        """The ordinary model, on the meta device, that has a place for every tensor of the checkpoint. Raises FormatError."""
        with quiet():
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
        base = _units(checkpoint).base
        family = checkpoint.plan["family"]
        layout = LAYOUTS[family]
        blocks = {found[1] for name in checkpoint.tensors if name.endswith(".bias") and (found := layout.block_of(name))}
        full = not getattr(config, "sliding_window", None) and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        like_llama = full and MODELING_FILES[family] is MODELING_FILES["llama"]
        missing: set[str] = set()
        for name in dict.fromkeys((family, "llama") if like_llama else (family,)):
            twin = ordinary(config, name, base, attention_bias=0 in blocks, mlp_bias=1 in blocks)
            left = set(checkpoint.tensors) - set(stored(twin) if twin is not None else ())
            if twin is not None and not left:
                return twin
            missing = missing or left
        raise FormatError(
            f"An ordinary {family} model has no place for {min(missing)} and {len(missing) - 1} more tensors. Biases come from the "
            "repair: a search with compensation least_squares_weights has none of its own.",
            param="compensation",
        )


_TOKENIZER = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def _check_pattern(pattern: str) -> None:
    if PATTERNS[pattern].zeros:
        raise FormatError(
            f"A plan of the pattern {pattern} has its zeros in the original shapes already, and its checkpoint loads everywhere as "
            "it is. Use the format transformers.",
            param="format",
        )


def _file(checkpoint: FinishedCheckpoint) -> Path:
    return checkpoint.folder / "units.json"


def _units(checkpoint: FinishedCheckpoint) -> KeptUnits:
    """Where the kept units were. Where that is not recorded (a model that was trained further and saved has no units.json), the
    first places of the widest layer's, which compute the same."""
    if _file(checkpoint).is_file():
        return KeptUnits.from_dict(json.loads(_file(checkpoint).read_text("utf-8")))
    shapes = checkpoint.shapes
    groups, per_group = (max(getattr(shape, name) for shape in shapes) for name in ("kv_groups", "heads_per_group"))
    if not MODELING_FILES[checkpoint.plan["family"]].has_kv_heads:  # heads that share the hidden size out among them
        groups = whole_number(checkpoint.config, "hidden_size") // whole_number(checkpoint.config, "head_dim")
    base = LayerShape(max(groups, 1), max(per_group, 1), max(*(shape.channels for shape in shapes), 1))
    kept = []
    for shape in shapes:
        heads = [g * base.heads_per_group + h for g in range(shape.kv_groups) for h in range(shape.heads_per_group)]
        kept.append((heads, list(range(shape.channels))))
    return KeptUnits(base, kept)


def _put_back(name: str, value: Tensor, shape: torch.Size, units: KeptUnits, layout: Layout, width: int) -> Tensor:
    """``value`` in zeros of ``shape``, its rows or columns where the base model has them; ``width`` is that of a head."""
    found = layout.block_of(name)
    if found is None:
        return value
    layer, block = found
    place = name.removeprefix(f"{layout.layer(layer)}.").rpartition(".")[0]
    parts = layout.places(block)[place]
    if parts[-1] in ("o", "down"):
        if value.ndim == 1:
            return value  # a bias of the block's output
        return value.new_zeros(shape).index_copy(1, _places(parts[-1], layer, units, width), value)
    rows, start = [], 0
    for part in parts:  # one after another where they are one matrix
        rows.append(start + _places(part, layer, units, width))
        start += _size(part, units.base, width)
    return value.new_zeros(shape).index_copy(0, torch.cat(rows), value)


def _places(part: str, layer: int, units: KeptUnits, width: int) -> Tensor:
    """Where the kept rows of a part are in the base model (columns, of an output matrix)."""
    if part in ("gate", "up", "down"):
        return torch.tensor(units.channels(layer))
    of = units.groups if part in ("k", "v") else units.heads
    return (torch.tensor(of(layer))[:, None] * width + torch.arange(width)).flatten()


def _size(part: str, base: LayerShape, width: int) -> int:
    """Rows of a part in the base model."""
    if part in ("gate", "up"):
        return base.channels
    return width * (base.kv_groups if part in ("k", "v") else base.heads)
