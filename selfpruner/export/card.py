"""The model card and plan.json: what was removed, how, and what it cost. Plain text and data; imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from selfpruner.export.older import requirement
from selfpruner.export.shape import LayerShape

# What a base model's card says that holds for what is made from it, too.
_TERMS = ("license", "license_name", "license_link", "language")
# Where models that have a name of ours are on the hub, and under which terms.
_KNOWN: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "language": ["en"]}
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardInfo:
    """What the export cannot see in the model.

    ``rate`` is removed / original parameters of ``of``; ``layer_rates`` the same per layer. ``metrics`` maps a name
    ("dense", "pruned", "uniform") to its numbers ({"perplexity": 37.1}); the card shows them as one table. ``nonzeros`` counts the
    model's parameters without those that the pattern made zero, where shapes stay as they are. ``terms`` are the base card's
    license, license_name, license_link and language, see :func:`with_terms`.
    """

    base_model: str
    rate: float
    of: str = "decoder"
    pattern: str = "structured"
    criterion: str
    compensation: str
    calibration: Sequence[str] = ()
    plan_hash: str = ""
    levels: Sequence[int] = ()
    layer_rates: Sequence[float] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    job_id: str | None = None
    terms: Mapping[str, Any] = field(default_factory=dict)
    nonzeros: int | None = None


def with_terms(info: CardInfo, folder: Path | None) -> CardInfo:
    """``info`` with the terms in the base model's own card, README.md in ``folder``; a card that cannot be read says nothing."""
    try:
        found = (metadata_load(folder / "README.md") if folder else None) or {}
    except Exception:  # whatever a stranger's file makes of a YAML parser
        found = {}
    return replace(info, terms={**{key: found[key] for key in _TERMS if found.get(key)}, **info.terms})


def plan(info: CardInfo, shapes: Sequence[LayerShape], *, family: str, dtype: str, parameters: int) -> dict[str, Any]:
    """The content of plan.json. Two exports with equal plans are the same checkpoint; measured numbers are not part of it."""
    return {
        "base_model": info.base_model,
        "family": family,
        "dtype": dtype,
        "parameters": parameters,
        "rate": info.rate,
        "of": info.of,
        "pattern": info.pattern,
        "criterion": info.criterion,
        "compensation": info.compensation,
        "calibration": list(info.calibration),
        "plan_hash": info.plan_hash,
        "levels": list(info.levels),
        "layer_rates": [round(rate, 6) for rate in info.layer_rates],
        **({} if info.nonzeros is None else {"nonzeros": info.nonzeros}),
        "layers": [{"query_heads": shape.heads, "kv_groups": shape.kv_groups, "ffn_channels": shape.channels} for shape in shapes],
    }


def model_card(info: CardInfo, shapes: Sequence[LayerShape], *, parameters: int, config: Mapping[str, Any]) -> str:
    """README.md with YAML front matter as the hub reads it; ``config`` is the folder's config.json."""
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "selfpruner", f"{info.pattern}-pruning"],
    }
    # The hub links base_model to a repository, whose name has an owner; a path on some disk is no such thing.
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", info.base_model) and not Path(info.base_model).exists():
        front["base_model"] = info.base_model
    front |= {**_KNOWN.get(info.base_model, {}), **info.terms}
    if "base_model" in front:
        front["base_model_relation"] = "finetune"  # the hub has no word for pruned; this one says that the weights changed
    name = info.base_model.rstrip("/").rsplit("/", 1)[-1]
    facts = {
        "Base model": f"`{info.base_model}`",
        "Parameters": f"{parameters:,}",
        **({} if info.nonzeros is None else {"Not zero": f"{info.nonzeros:,}"}),
        "Removed": (
            f"{info.rate:.1%} of the {info.of}'s parameters"
            if info.nonzeros is None
            else f"{info.rate:.1%} of the weights of attention and FFN are zero"
        ),
        "Pattern": info.pattern,
        "Criterion": info.criterion,
        "Compensation": info.compensation,
        "Calibration text": ", ".join(info.calibration) or "not recorded",
        "Plan": f"`{info.plan_hash}`" if info.plan_hash else "not recorded",
        **({"Job": f"`{info.job_id}`"} if info.job_id else {}),
    }
    sections = [
        # JSON is YAML, and quotes whatever needs quoting.
        "---\n" + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items()) + "---",
        f"# {name}, pruned by {info.rate:.0%}",
        f"Pruned from `{info.base_model}` without retraining, by selfpruner.",
        _table(("", ""), list(facts.items())),
        *_metrics(info.metrics),
        "## Layers",
        _layers(shapes, info.layer_rates),
        _USE,
        loading(config),
    ]
    return "\n\n".join(sections) + "\n"


def loading(config: Mapping[str, Any]) -> str:
    """How a folder is loaded that transformers takes; ``config`` is its config.json."""
    code = config.get("auto_map", {}).get("AutoConfig", "").partition(".")[0]
    needs = f"It takes {requirement(config)}."
    shapes = (
        f"The layers differ in width, so the folder brings the modeling file `{code}.py`; with selfpruner installed,\n"
        f"`selfpruner.load(folder)` needs no remote code. {needs}"
        if code
        else f"All layers have the same shape: this is an ordinary model of its family. {needs}"
    )
    trust, tokenizer = (", trust_remote_code=True", "PreTrainedTokenizerFast") if code else ("", "AutoTokenizer")
    serve = (
        "`AutoTokenizer` gives the same, but asks first whether to run the folder's code, which a tokenizer does not need.\n"
        "`AutoModelForSequenceClassification` and `AutoModelForTokenClassification` load the folder too, other heads do not.\n\n"
        "`vllm serve path/to/this/folder` serves it where selfpruner is installed beside vLLM; elsewhere, without dropped\n"
        "attention, `vllm serve path/to/this/folder --model-impl transformers --trust-remote-code` does."
        if code
        else "`vllm serve path/to/this/folder` serves it."
    )
    return (
        f"{shapes}\n\n"
        f"```python\nfrom transformers import AutoModelForCausalLM, {tokenizer}\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})\n'
        f'tokenizer = {tokenizer}.from_pretrained("path/to/this/folder")\n```\n\n{serve}\n\n{_PROOF}'
    )


def converted(card: str, library: str, use: str) -> str:
    """The card of the same model in another format: another library in its front matter, and ``use`` as its last section."""
    before, _, _ = card.rpartition(_USE)
    return f"{_LIBRARY.sub(f'library_name: {json.dumps(library)}', before, count=1)}{_USE}\n\n{use}\n"


_USE = "## Use"
_LIBRARY = re.compile(r"^library_name: .*$", re.MULTILINE)
_PROOF = (
    "`plan.json` holds the plan, `manifest.json` the sha256 of every file and the result of the verification: the folder was\n"
    "loaded in a fresh process and its logits compared with the pruned model in memory. `selfpruner verify FOLDER` repeats that\n"
    "with the logits in `proof/`."
)


def _metrics(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not metrics:
        return []
    columns = list(dict.fromkeys(key for row in metrics.values() for key in row))
    rows = [(name, *(f"{row[key]:,.6g}" if key in row else "" for key in columns)) for name, row in metrics.items()]
    return ["## Numbers", _table(("", *columns), rows)]


def _layers(shapes: Sequence[LayerShape], rates: Sequence[float]) -> str:
    rows = []
    for index, shape in enumerate(shapes):
        rate = f"{rates[index]:.1%}" if index < len(rates) else ""
        rows.append((str(index), str(shape.heads), str(shape.kv_groups), str(shape.channels), rate))
    return _table(("layer", "query heads", "KV groups", "FFN channels", "removed"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A bar or a line break inside a cell would end it.
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *cells))
