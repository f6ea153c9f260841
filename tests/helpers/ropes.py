"""Tiny models with every kind of rotary table that transformers offers."""

from __future__ import annotations

from typing import Any

import selfpruner.testing.tiny_models as tiny

SHORT = 24  # the length that a table which stretches starts from
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SHORT},
    "longrope": {**FACTORS, "original_max_position_embeddings": SHORT},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": SHORT},
    "proportional": {"partial_rotary_factor": 0.5},
}
FAMILIES = tuple(family for family in tiny.FAMILIES if family != "opt")


def options_of(family: str, rope: str) -> dict[str, Any]:
    """Config fields that give a tiny model of ``family`` this rope."""
    parameters = {"rope_type": rope, "rope_theta": 10_000.0, **ROPES[rope]}
    if family == "gemma3_text":
        local = {"rope_type": "default" if rope == "default" else "linear", "rope_theta": 5_000.0, **ROPES["linear"]}
        kinds = ["sliding_attention", "full_attention"] * 2  # two layers of a kind, which differ
        return {"rope_parameters": {"full_attention": parameters, "sliding_attention": local}, "layers": 4, "layer_types": kinds}
    options: dict[str, Any] = {"rope_parameters": parameters}
    if family == "phi3" and rope == "longrope":
        options["original_max_position_embeddings"] = SHORT
    if rope == "dynamic":
        options["max_position_embeddings"] = SHORT
    return options


CASES = [(family, rope) for family in FAMILIES for rope in ROPES if family != "phi3" or rope in ("default", "longrope")]
