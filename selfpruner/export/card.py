"""The model card and plan.json: what was removed, how, and what it cost. Plain text and data; imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import metadata_load

from selfpruner.export.older import requirement
from selfpruner.files.card_info import CardInfo
from selfpruner.files.manifest import PlanFile
from selfpruner.pruning.layer_shapes import LayerShape

# What a base model's card says that also holds for models made from it.
_TERMS = ("license", "license_name", "license_link", "language")
# Where the models that we gave a name are on the hub, and under which terms.
_KNOWN: Mapping[str, Mapping[str, object]] = {
    "smollm2-135m": {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "language": ["en"]}
}
# A repository's name has an owner, a path on some disk has not.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# How a licence's text begins, by the hub's name for it.
_LICENSES = {"apache-2.0": ("Apache License", "Version 2.0"), "mit": ("Permission is hereby granted, free of charge",)}


def with_origin(
    info: CardInfo, folder: Path, made_from: Mapping[str, str], *, base_model: str | None, license: str | None
) -> CardInfo:
    """``info`` of a model whose files are in ``folder``. ``base_model``, a repository of the hub, and ``license`` are what was
    asked for. A local model's name says nothing about the hub, whatever it looks like."""
    cached = f"models--{info.base_model.replace('/', '--')}" in folder.parts
    name = info.base_model if cached or info.base_model in _KNOWN else last_part(info.base_model)
    asked = {"base_model": base_model, "license": license}
    terms = {**info.terms, **{key: value for key, value in asked.items() if value}}
    return replace(info, base_model=name, made_from=made_from, terms=terms)


def with_terms(info: CardInfo, folder: Path | None) -> CardInfo:
    """``info`` with what the base model's ``folder`` says: its own card, README.md, or the text of its licence. What cannot be read
    says nothing."""
    try:
        metadata = (metadata_load(folder / "README.md") if folder else None) or {}
    except Exception:  # a stranger's file may do anything to a YAML parser
        metadata = {}
    terms = {key: metadata[key] for key in _TERMS if metadata.get(key)}
    if not _on_hub(info.base_model) and (above := _repositories(metadata.get("base_model"))):
        terms["base_model"] = above  # the nearest of its ancestors that the hub has
    if "license" in info.terms:  # what was asked for; the name and link of another licence do not belong to it
        terms = {key: value for key, value in terms.items() if not key.startswith("license")}
    elif folder is not None and "license" not in terms:
        terms |= _license(folder)
    return replace(info, terms={**terms, **info.terms})


def _license(folder: Path) -> dict[str, str]:
    """The hub's name for the licence whose text lies in ``folder``."""
    for path in sorted(folder.glob("LICENSE*")):
        text = path.read_bytes()[:2000].decode("utf-8", "replace")
        for name, marks in _LICENSES.items():
            if all(mark in text for mark in marks):
                return {"license": name}
        return {"license": "other", "license_name": "see-the-file", "license_link": path.name}
    return {}


def _on_hub(name: str) -> bool:
    return name in _KNOWN or (_REPOSITORY.fullmatch(name) is not None and not Path(name).exists())


def _repositories(value: object) -> str | list[str] | None:
    """Those of ``value``, the base model or models of a stranger's card, that can be repositories of the hub."""
    if isinstance(value, list):
        return [name for name in value if isinstance(name, str) and _on_hub(name)] or None
    return value if isinstance(value, str) and _on_hub(value) else None


def last_part(name: str) -> str:
    """The last part of a path: the others mean nothing elsewhere."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or "model"


def _source(name: str) -> str:
    """A source of text, without the folder of its file."""
    return name if name.startswith("hub:") else last_part(name)


def named(model: str) -> str:
    """What a checkpoint calls the model that was loaded as ``model``."""
    return model if _on_hub(model) else last_part(model)


def plan(info: CardInfo, shapes: Sequence[LayerShape], *, family: str, dtype: str, parameters: int) -> PlanFile:
    """The content of plan.json. Two exports with equal plans are the same checkpoint; measured numbers are not part of it."""
    made: PlanFile = {
        "base_model": named(info.base_model),
        "made_from": dict(info.made_from),
        "family": family,
        "dtype": dtype,
        "parameters": parameters,
        "rate": info.rate,
        "of": info.of,
        "pattern": info.pattern,
        "criterion": info.criterion,
        "compensation": info.compensation,
        "calibration": [_source(name) for name in info.calibration],
        "plan_hash": info.plan_hash,
        "levels": list(info.levels),
        "layer_rates": [round(rate, 6) for rate in info.layer_rates],
        "layers": [{"query_heads": shape.heads, "kv_groups": shape.kv_groups, "ffn_channels": shape.channels} for shape in shapes],
    }
    if info.nonzeros is not None:
        made["nonzeros"] = info.nonzeros
    return made


def model_card(info: CardInfo, shapes: Sequence[LayerShape], *, parameters: int, config: Mapping[str, object]) -> str:
    """README.md with YAML front matter as the hub reads it; ``config`` is the folder's config.json."""
    front: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["selfpruner"] if info.rate is None else ["pruned", "selfpruner", f"{info.pattern}-pruning"],
    }
    if _on_hub(info.base_model):
        front["base_model"] = info.base_model
    front |= {**_KNOWN.get(info.base_model, {}), **info.terms}
    front.setdefault("license", "unknown")  # a word of the hub's
    if "base_model" in front:
        front["base_model_relation"] = "finetune"  # the hub has no word for pruned; this one says that the weights changed
    base = named(info.base_model)
    name = last_part(base)
    facts = {
        "Base model": f"`{base}`" + ("" if "base_model" in front else ", a local one; what it is on the hub is unknown"),
        "License": str(front["license"]) if front["license"] != "unknown" else "unknown: the base model's folder names none",
        "Parameters": f"{parameters:,}",
        **({} if info.nonzeros is None else {"Not zero": f"{info.nonzeros:,}"}),
        **_what_was_done(info),
    }
    done = (
        f"Exported by selfpruner from `{base}`, a model that was saved outside of it, for instance after further training. What "
        "was pruned before that, and how, its folder does not record."
        if info.rate is None
        else f"Pruned from `{base}` without retraining, by selfpruner."
    )
    sections = [
        # JSON is YAML, and quotes whatever needs quoting.
        "---\n" + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items()) + "---",
        f"# {name}" if info.rate is None else f"# {name}, pruned by {info.rate:.0%}",
        done,
        _table(("", ""), list(facts.items())),
        *_metrics(info.metrics),
        "## Layers",
        _layers(shapes, info.layer_rates),
        _USE,
        loading(config),
    ]
    return "\n\n".join(sections) + "\n"


def _what_was_done(info: CardInfo) -> dict[str, str]:
    if info.rate is None:
        return {}
    return {
        "Removed": (
            f"{info.rate:.1%} of the {info.of}'s parameters"
            if info.nonzeros is None
            else f"{info.rate:.1%} of the weights of attention and FFN are zero"
        ),
        "Pattern": info.pattern,
        "Criterion": info.criterion,
        "Compensation": info.compensation,
        "Calibration text": ", ".join(map(_source, info.calibration)) or "not recorded",
        "Plan": f"`{info.plan_hash}`" if info.plan_hash else "not recorded",
        **({"Job": f"`{info.job_id}`"} if info.job_id else {}),
    }


def loading(config: Mapping[str, object]) -> str:
    """How to load a folder that transformers takes; ``config`` is its config.json."""
    auto_map = config.get("auto_map")
    code = str(auto_map.get("AutoConfig", "")).partition(".")[0] if isinstance(auto_map, dict) else ""
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


def converted(card: str, library: str, relation: str, use: str) -> str:
    """The card of the same model in another format: another library and relation to its base model in its front matter, and ``use``
    as its last section."""
    before, _, _ = card.rpartition(_USE)
    before = _LIBRARY.sub(f"library_name: {json.dumps(library)}", before, count=1)
    before = _RELATION.sub(f"base_model_relation: {json.dumps(relation)}", before, count=1)
    return f"{before}{_USE}\n\n{use}\n"


_USE = "## Use"
_LIBRARY = re.compile(r"^library_name: .*$", re.MULTILINE)
_RELATION = re.compile(r"^base_model_relation: .*$", re.MULTILINE)
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
