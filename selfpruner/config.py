"""What a user may ask for: one set of pydantic models for the command line, the HTTP API, Python and the database.

Nothing here imports torch or reads a file. Names of criteria, operators and so on are checked against the registries, so a request
with an unknown name is refused before a job exists. A preset fills in the fields that the request leaves out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from selfpruner import catalogue

Metric = Literal["kl", "nll"]
# What a text is for.
Role = Literal["calibration", "fitness", "report"]
Objective = Literal["quality", "latency", "parameters"]
Tokens = Annotated[int, Field(ge=16, le=100_000_000)]


def _bytes(value: object) -> object:
    """``2GiB``, ``800 MiB``, ``1.5GB`` or plain bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]i?)?B?\s*", value, re.ASCII | re.IGNORECASE)
    if match is None:
        raise ValueError("give bytes, or a size such as 800MiB or 2GiB")
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return round(float(match[1]) * base ** " kmgt".index(unit[:1] or " "))


Bytes = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(ge=1, le=1 << 50)]


def _listed(value: object) -> object:
    """``a,b`` as a list, as a command line has it."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Kind = TypeVar("Kind")


class Part(Enum):
    """What a field of a search belongs to: the state that a worker prepares and holds, the way plans are looked for, or the report
    at the end."""

    PREPARATION = "preparation"
    SEARCH = "search"
    REPORT = "report"


# Every field is declared as one of these, so that nothing else has to list fields. Jobs that differ only in search fields share a
# worker's prepared state.
Preparation = Annotated[Kind, Part.PREPARATION]
Search = Annotated[Kind, Part.SEARCH]
Report = Annotated[Kind, Part.REPORT]

Objectives = Annotated[tuple[Objective, ...], BeforeValidator(_listed, json_schema_input_type=str | tuple[Objective, ...])]


def _share(value: object) -> object:
    """``20%`` as 0.2. A number that was meant as percent is refused with the share it would be."""
    number = value
    if isinstance(value, str):
        text = value.strip()
        try:
            number = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            raise ValueError("write a share between 0 and 1, such as 0.2 or 20%") from None
    if isinstance(number, int | float) and not isinstance(number, bool):
        if 1 < number < 100 and not (isinstance(value, str) and "%" in value):
            raise ValueError(f"must lie between 0 and 1; did you mean {number / 100:g} ({number:g} %)?")
        if not 0 < number < 1:
            raise ValueError("must lie between 0 and 1, both excluded: 0.2 or 20%, say")
    return number


Share = Annotated[float, BeforeValidator(_share, json_schema_input_type=float | str), Field(gt=0, lt=1)]
Rates = Annotated[tuple[Share, ...], BeforeValidator(_listed, json_schema_input_type=str | tuple[Share, ...])]


class Strict(BaseModel):
    """No unknown field, no NaN or infinity, nothing changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Strict):
    """One source of text.

    ``source`` is ``auto``, ``self`` (the dense model writes), ``c4`` (hub), ``pydoc`` (the documentation that ships with
    Python), ``hub:DATASET[:CONFIG[:SPLIT[:FIELD]]]``, or a path: plain text or JSON lines, see ``calibration.files``.
    """

    source: str = Field(default="auto", min_length=1, max_length=1024)
    weight: float = Field(default=1.0, gt=0, le=1e6)

    @field_validator("source")
    @classmethod
    def _printable(cls, value: str) -> str:
        if "\x00" in value:
            raise ValueError("contains a null byte")
        return value


class TextConfig(Strict):
    """Token batches made from a weighted mixture of sources: ``sequences`` of ``length`` tokens each."""

    sources: tuple[Source, ...] = Field(default=(Source(),), min_length=1, max_length=16)
    sequences: int = Field(default=64, ge=1, le=65_536)
    length: int = Field(default=512, ge=16, le=32_768)


class ScoringStage(Strict):
    """One fidelity: ``tokens`` per plan, and how many of the best (``keep``) go on to the next stage."""

    tokens: Tokens
    keep: int = Field(ge=1, le=10_000)


class LlmLimits(Strict):
    """Caps on what the proposer may use over the whole job. Reaching one turns the LLM operators off, with an event."""

    calls: int = Field(default=200, ge=0, le=1_000_000)
    tokens: int = Field(default=2_000_000, ge=0, le=10_000_000_000)
    cost: float = Field(default=5.0, ge=0, le=1e6, description="in the currency of the server's prices, usually USD")


class SearchConfig(Strict):
    """A whole job: which model, how much to remove, with what, judged how."""

    model: Preparation[str] = Field(default="smollm2-135m", min_length=1, max_length=1024)
    rate: Preparation[Share] = Field(description="removed / original parameters: 0.2 or 20%")
    of: Preparation[Literal["decoder", "model"]] = "decoder"
    preset: Search[Literal["default", "evolution", "self-pruner"]] = "default"

    pattern: Preparation[str] = "structured"
    criterion: Preparation[str] = "obs"
    compensation: Preparation[str] = "least_squares"
    granularity: Preparation[Literal["layer", "block"]] = "block"
    attention: Preparation[Literal["all", "q_head", "kv_group", "none"]] = "all"
    ffn_step: Preparation[int | None] = Field(
        default=None,
        ge=8,
        le=65_536,
        multiple_of=8,
        description="channels an FFN gives up at once; 32 or 256 for what quantizes rows",
    )
    tensor_parallel: Preparation[int] = Field(
        default=1, ge=1, le=64, description="ranks that heads and channels of every layer are to divide among"
    )
    drop_blocks: Preparation[bool] = False
    group: Preparation[int] = Field(default=4, ge=2, le=64, description="M of the pattern n_m; how many of M stay is searched")
    sparsity_step: Preparation[float] = Field(
        default=0.05, ge=0.01, le=0.5, description="between two levels of the pattern unstructured"
    )
    level_bytes: Preparation[Bytes | None] = Field(
        default=None, description="most that the level database of n_m or unstructured may take on disk, in bytes or as 20GiB"
    )

    calibration: Preparation[TextConfig] = TextConfig(sequences=64, length=512)
    fitness_text: Preparation[TextConfig] = TextConfig(sequences=84, length=256)
    report_text: Report[TextConfig] = TextConfig(sequences=32, length=512)

    objective: Search[Objectives] = Field(
        default=("quality",),
        min_length=1,
        max_length=3,
        description="quality first; with latency or parameters the job also keeps a Pareto front of plans",
    )
    rates: Search[Rates] = Field(
        default=(),
        max_length=32,
        description="rates of a front over parameters, beside `rate`; when empty, four more from half of `rate` up to it",
    )

    fitness: Search[Metric] = "kl"
    probe_tokens: Search[Tokens] = 1024
    population: Search[int] = Field(default=4, ge=1, le=1000)
    crossover_offspring: Search[int] = Field(default=2, ge=0, le=1000)
    mutation_offspring: Search[int] = Field(default=4, ge=0, le=1000)
    generations: Search[int] = Field(default=8, ge=0, le=10_000)
    stages: Search[tuple[ScoringStage, ...]] = Field(default=(ScoringStage(tokens=1024, keep=4),), min_length=1, max_length=6)
    surveys: Search[int] = Field(default=2, ge=0, le=100, description="most surveys of what every block's next levels would do")
    survey_tokens: Search[Tokens] = 8192
    survey_step: Search[float] = Field(
        default=0.08, gt=0, lt=1, description="how far a survey turns a block: a share of its parameters"
    )
    final_tokens: Search[Tokens] = 4096
    generation_probe: Search[bool] = Field(
        default=True, description="whether the final also looks at how much the best plans repeat themselves when they write"
    )
    early_rejection: Search[bool] = True
    bandit: Search[bool] = True
    oversample: Search[int] = Field(default=4, ge=1, le=64, description="proposals per child that the landscape's model picks from")
    budget_tokens: Search[int | None] = Field(
        default=None, ge=0, description="plan-tokens for probes, generations, the final and the front"
    )
    patience: Search[int] = Field(
        default=4, ge=0, description="generations without progress after which the search stops; 0: never"
    )
    least_gain: Search[float] = Field(default=0.001, ge=0, lt=1, description="mean relative gain per generation that is progress")
    initial: Search[tuple[str, ...]] = ("uniform", "ramp", "sensitivity", "initialize")
    operators: Search[tuple[str, ...]] = ("select", "crossover", "mutate", "reallocate", "level_switch", "recombine")

    proposer: Search[str] = Field(default="local", min_length=1, max_length=64)
    limits: Search[LlmLimits] = LlmLimits()
    seed: Preparation[int] = Field(default=0, ge=0, le=2**31 - 1)
    device: Preparation[str] = Field(default="auto", description="auto, cpu, mps, cuda or cuda:N")
    dtype: Preparation[Literal["auto", "float32", "bfloat16", "float16"]] = Field(
        default="auto",
        description="what is computed in, and the type of the checkpoint; auto: computed in what is fast on the device, and the "
        "checkpoint has the type of the model's files",
    )
    memory: Preparation[Bytes | None] = Field(
        default=None,
        description="most that the model and the work with it may take on the device, in bytes or as 2GiB; a model that does not "
        "fit is streamed from its files. What libraries take comes on top",
    )

    base_model: Report[str | None] = Field(
        default=None,
        max_length=200,
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        description="what a local model is on the hub, owner/name, for the model card",
    )
    license: Report[str | None] = Field(
        default=None,
        max_length=100,
        pattern=r"^[A-Za-z0-9][\w.+-]*$",
        description="the base model's licence as the hub calls it (apache-2.0), for the model card; default: what its folder says",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: object) -> object:
        """Fields the request leaves out come from the preset; fields it names win."""
        if isinstance(data, dict):
            preset = PRESETS.get(str(data.get("preset", "default")))
            if preset is not None:
                data = {**preset, **data}
            pattern = catalogue.PATTERNS.get(str(data.get("pattern")))
            if "criterion" not in data and pattern is not None:
                data = {**data, "criterion": pattern.criterion}
        return data

    @model_validator(mode="after")
    def _names_exist(self) -> SearchConfig:
        catalogue.check_device(self.device)
        catalogue.check("pattern", self.pattern, catalogue.PATTERNS)
        catalogue.check_criterion(self.criterion, self.pattern)
        catalogue.check("compensation", self.compensation, catalogue.COMPENSATIONS)
        if catalogue.PATTERNS[self.pattern].zeros:
            self._fits_zeros()
        for name in self.initial:
            catalogue.check("initial operator", name, catalogue.INITIAL_OPERATORS, param="initial")
        for name in self.operators:
            catalogue.check("operator", name, catalogue.OFFSPRING_OPERATORS, param="operators")
        if "uniform" not in self.initial and self.preset != "self-pruner":
            raise ValueError("initial must contain 'uniform': every result is compared with it")
        if self.ffn_step is not None and self.ffn_step % self.tensor_parallel:
            raise ValueError(
                f"ffn_step {self.ffn_step} does not divide by tensor_parallel {self.tensor_parallel}; use a multiple of it"
            )
        if self.objective[0] != "quality" or len(set(self.objective)) < len(self.objective):
            raise ValueError("objective must start with quality, then latency, parameters or both, each once")
        if self.rates and "parameters" not in self.objective:
            raise ValueError("rates are the points of a front over parameters: add it to the objective (quality,parameters)")
        if "\x00" in self.model:
            raise ValueError("model contains a null byte")
        return self

    def _fits_zeros(self) -> None:
        """Refuse what makes no sense where shapes stay as they are."""
        if self.compensation not in (able := catalogue.compensations_of(self.pattern)):
            raise ValueError(
                f"the compensation {self.compensation} is for whole units; with {self.pattern} use {' or '.join(able)}, which "
                "adds no bias there"
            )
        if "latency" in self.objective:
            raise ValueError(f"latency does not change with {self.pattern}: shapes stay; leave it out of the objective")
        if self.tensor_parallel > 1:
            raise ValueError(f"with {self.pattern} shapes stay, and divide as the model's own: leave out tensor_parallel")
        if self.of != "decoder":
            raise ValueError(f"with {self.pattern} the rate is of the matrices that are pruned: leave out of")

    @property
    def needs(self) -> frozenset[catalogue.OperatorNeed]:
        """What its operators need."""
        return frozenset[catalogue.OperatorNeed]().union(
            *(catalogue.OPERATORS[name].needs for name in (*self.initial, *self.operators))
        )

    @property
    def front_rates(self) -> tuple[float, ...]:
        """The rates of the front's plans, ascending, the job's own among them; that one alone without a front over parameters."""
        if "parameters" not in self.objective:
            return (self.rate,)
        asked = self.rates or tuple(round(self.rate * share, 6) for share in (0.5, 0.625, 0.75, 0.875))
        return tuple(sorted({*asked, self.rate}))

    @classmethod
    def fields_of(cls, *parts: Part) -> frozenset[str]:
        """The fields declared as belonging to ``parts``."""
        return frozenset(name for name, field in cls.model_fields.items() if _part(name, field) in parts)

    @property
    def prepared_key(self) -> str:
        """Sixteen hex digits of everything that what a worker holds depends on: every field but those of the search, and what those
        ask of the preparation."""
        held = self.model_dump(mode="json", include=set(self.fields_of(Part.PREPARATION, Part.REPORT)))
        body = {**held, "spectra": "spectra" in self.needs}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _part(name: str, field: FieldInfo) -> Part:
    marks = [mark for mark in field.metadata if isinstance(mark, Part)]
    if len(marks) != 1:
        raise TypeError(f"{name} must be declared as one of Preparation[...], Search[...] and Report[...]")
    return marks[0]


SearchConfig.fields_of()  # a field without a part is found at once


def field_names(model: type[BaseModel] = SearchConfig) -> list[str]:
    """Every field of a search, in order, with dots for nested ones and without those of lists: ``limits.calls``."""
    known = []
    for name, field in model.model_fields.items():
        known.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            known += [f"{name}.{inner}" for inner in field_names(field.annotation)]
    return known


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Which fields two configs in plain JSON data differ in, in words: ``rate 0.2 then, 0.3 now``. Empty for equal ones."""

    def flat(body: Mapping[str, object], prefix: str = "") -> dict[str, object]:
        fields: dict[str, object] = {}
        for key, value in body.items():
            fields |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        return fields

    def shown(value: object) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text if len(text) <= 60 else text[:57] + "..."

    one, other = flat(before), flat(now)
    return [
        f"{key} {shown(one[key]) if key in one else 'not given'} then, {shown(other[key]) if key in other else 'not given'} now"
        for key in dict.fromkeys((*one, *other))
        if one.get(key) != other.get(key) or (key in one) != (key in other)
    ]


PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "evolution": {
        "initial": ("uniform", "ramp", "sensitivity"),
        "operators": ("reallocate", "level_switch", "recombine"),
    },
    # Self-Pruner, arXiv 2502.14413: one rate per layer, Wanda-sp without compensation, an LLM for all four operators,
    # population 30, 10 offspring by crossover and 10 by mutation, 20 generations, likelihood as the fitness.
    "self-pruner": {
        "granularity": "layer",
        "criterion": "wanda_sp",
        "compensation": "none",
        "fitness": "nll",
        "initial": ("initialize",),
        "operators": ("select", "crossover", "mutate"),
        "population": 30,
        "crossover_offspring": 10,
        "mutation_offspring": 10,
        "generations": 20,
        "stages": ({"tokens": 2048, "keep": 30},),
        "early_rejection": False,
        "generation_probe": False,
        "patience": 0,
    },
}
