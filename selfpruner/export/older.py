"""Ordinary checkpoints in older transformers: what config.json and tokenizer_config.json say for them, and how old is too old.

Version 5 keeps the whole rotary table in ``rope_parameters``. Version 4 ignores that silently and takes its default, a base of
10,000; it reads ``rope_theta``, ``rope_scaling`` and others, which are added here. Version 5 reads them too, with the same meaning.
``make test-oldest`` compares logits in the versions that :func:`oldest_version` names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from selfpruner.models.family_layouts import whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The first that reads our tokenizer.json and has the family. What version 4 cannot say waits for the one that selfpruner needs.
_FIRST: Mapping[str, tuple[int, int]] = {"qwen3": (4, 51), "gemma3_text": (4, 50), "phi3": (4, 46)}
_FIRST_OF_ALL, _CURRENT = (4, 45), (5, 15)


def with_older_fields(body: Mapping[str, object]) -> dict[str, object]:
    """The JSON ``body`` of an ordinary config with what transformers 4 calls the same things."""
    fields: dict[str, object] = {}
    main, *others = _tables(body)
    if "rope_theta" in main:
        fields["rope_theta"] = main["rope_theta"]
    if others:
        fields["rope_local_base_freq"] = others[0]["rope_theta"]
    elif main.get("partial_rotary_factor", 1.0) != 1.0:
        fields["partial_rotary_factor"] = main["partial_rotary_factor"]
    if (kind := main.get("rope_type", "default")) != "default":
        fields["rope_scaling"] = {key: main[key] for key in main.keys() - {"rope_theta", "partial_rotary_factor", "type"}}
        if body["model_type"] == "phi3":
            # Its own check knows only these three, under this name.
            fields["rope_scaling"] = {"type": kind, **{key: main[key] for key in ("short_factor", "long_factor")}}
        elif kind == "longrope":
            fields["original_max_position_embeddings"] = main["original_max_position_embeddings"]
    if body["model_type"] == "gemma3_text" and (period := _period(_layer_types(body))):
        fields["sliding_window_pattern"] = period
    return {**body, **fields}


def requirement(body: Mapping[str, object]) -> str:
    """Which transformers loads a checkpoint of this config.json, in words."""
    if "auto_map" in body:
        return f"transformers {'.'.join(map(str, _CURRENT))} or later"
    # The attention that knows its soft caps is the default before 4.48 and since 5.15, or sooner.
    eager = ', before 5.15 with `attn_implementation="eager"`' if body["model_type"] == "gemma2" else ""
    return f"transformers {oldest_version(body)} or later{eager}"


def oldest_version(body: Mapping[str, object]) -> str:
    """The oldest transformers that computes the same from an ordinary config with the fields above, as ``4.46``."""
    family, (main, *others) = str(body["model_type"]), _tables(body)
    kind, layers = main.get("rope_type", "default"), _layer_types(body)
    needs = [_FIRST.get(family, _FIRST_OF_ALL)]
    if kind == "proportional" or any(table.get("rope_type", "default") != "default" for table in others):
        needs.append(_CURRENT)
    if kind == "yarn" or (kind == "longrope" and family != "phi3"):
        needs.append((4, 57))
    if kind != "default" and family in ("mistral", "gemma2"):
        needs.append((4, 48))
    share = whole_number(body, "hidden_size") // whole_number(body, "num_attention_heads")
    if family in ("qwen2", "phi3") and body.get("head_dim") not in (None, share):
        needs.append((4, 48))
    if main.get("partial_rotary_factor", 1.0) != 1.0:
        needs.append((4, 50))
    if layers and (
        (family in ("qwen2", "qwen3") and "sliding_attention" in layers)
        or (family == "gemma2" and _period(layers) != 2)
        or (family == "gemma3_text" and not _period(layers))
    ):
        needs.append((4, 53))
    return ".".join(map(str, max(needs)))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save ``tokenizer`` so that older versions, and PreTrainedTokenizerFast in any version, read it as the same.

    ``tokenizer_config.json`` gets their names for the class and for special tokens, the chat template, which some versions do not
    read from a file of its own, and whatever else would follow from the class.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    body = json.loads(path.read_text("utf-8"))
    if body.get("tokenizer_class") == "TokenizersBackend":
        body["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(body.get("extra_special_tokens"), list):
        body["additional_special_tokens"] = body.pop("extra_special_tokens")
    if (template := folder / "chat_template.jinja").is_file():
        body["chat_template"] = template.read_text("utf-8")
    body |= {"padding_side": tokenizer.padding_side, "model_input_names": list(tokenizer.model_input_names)}
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _tables(body: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The rotary table of the layers, or of those with full attention and then of the others."""
    rope = body.get("rope_parameters")
    if not isinstance(rope, dict):
        return [{}]
    return [rope["full_attention"], rope["sliding_attention"]] if "full_attention" in rope else [rope]


def _layer_types(body: Mapping[str, object]) -> list[str]:
    kinds = body.get("layer_types")
    return [str(kind) for kind in kinds] if isinstance(kinds, list) else []


def _period(layer_types: list[str]) -> int:
    """The number p for which every p-th layer has full attention and the others a sliding window; 0 if there is none."""
    for period in range(2, len(layer_types) + 2):
        if all((kind == "full_attention") == ((index + 1) % period == 0) for index, kind in enumerate(layer_types)):
            return period
    return 0
