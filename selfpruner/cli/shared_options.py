"""What commands have in common: a server's address, and the fields of a search.

The fields come from a JSON file, then from options, then from ``--set key=value``, which reaches every field; later ones win. The
result is what a JSON request holds; SearchConfig judges it.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from selfpruner import catalogue
from selfpruner.config import PRESETS
from selfpruner.errors import ConfigError

if TYPE_CHECKING:
    from selfpruner.client import Client


def _known(table: Mapping[str, object]) -> str:
    return ", ".join(table)


Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")]
Cache = Annotated[
    Path | None, typer.Option(envvar="SELFPRUNER_CACHE", help="Models, texts, statistics.", show_default="~/.cache/selfpruner")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Embedded name, hub id, folder or GGUF file.", show_default="smollm2-135m")
]
Rate = Annotated[
    str | None, typer.Option("--rate", "-r", metavar="SHARE", help="Parameters to remove, over those of the decoder: 0.2 or 20%.")
]
Objective = Annotated[
    str | None,
    typer.Option(
        help="quality; quality,parameters or quality,latency (or all three) keeps a Pareto front.", show_default="quality"
    ),
]
Rates = Annotated[
    str | None, typer.Option(help="Rates of a front over parameters: 0.1,0.15,0.2.", show_default="half of the rate up to it")
]
Preset = Annotated[str | None, typer.Option(help=f"Fills in what is not given: {_known(PRESETS)}.", show_default="default")]
Pattern = Annotated[str | None, typer.Option(help=f"What is removed: {_known(catalogue.PATTERNS)}.", show_default="structured")]
Criterion = Annotated[
    str | None,
    typer.Option(help=f"What to keep: {_known(catalogue.CRITERIA)}; see `selfpruner criteria`.", show_default="obs, or sparsegpt"),
]
Compensation = Annotated[
    str | None, typer.Option(help=f"Repair of the kept weights: {_known(catalogue.COMPENSATIONS)}.", show_default="least_squares")
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(help="Calibration text: auto, self, c4, pydoc, hub:DATASET, or a file; repeat to mix.", show_default="auto"),
]
Generations = Annotated[int | None, typer.Option(help="Generations of the search.", show_default="by preset")]
Population = Annotated[int | None, typer.Option(help="Survivors of a generation.", show_default="by preset")]
Proposer = Annotated[str | None, typer.Option(help="Who answers the LLM operators.", show_default="local")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same search.", show_default="0")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, mps, cuda or cuda:N.", show_default="auto")]
Devices = Annotated[
    str | None,
    typer.Option(
        help="Several workers that share the work: cuda:0,cuda:1, or cpu*2. Each holds the model.", show_default="one, of --device"
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="A Ray cluster that does the work; --devices are then each node's.", show_default="none"
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(help="Ceiling for the model and the work with it, 2GiB say; a larger model is streamed.", show_default="none"),
]
Url = Annotated[str, typer.Option("--url", envvar="SELFPRUNER_URL", help="The server. Its token comes from SELFPRUNER_TOKEN.")]
DEFAULT_URL = "http://127.0.0.1:8000"
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="JSON file with any fields of a search.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Any other field, JSON or text, dots for nested ones: -s limits.calls=50; see `selfpruner fields`.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """The options of whatever looks at a model by a search's config."""

    model: Model = None
    calibration: Calibration = None
    device: Device = None
    config: ConfigFile = None
    settings: Settings = None

    def body(self) -> dict[str, object]:
        """The request as plain JSON data. Raises ConfigError as :func:`read_config` does."""
        given = asdict(self)
        return read_config(given.pop("config"), given.pop("settings"), **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions(ModelOptions):
    """The options of whatever prunes a model."""

    rate: Rate = None
    pattern: Pattern = None
    criterion: Criterion = None
    compensation: Compensation = None
    seed: Seed = None
    memory: Memory = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions(PruneOptions):
    """The options of a search, here or on a server."""

    objective: Objective = None
    rates: Rates = None
    preset: Preset = None
    generations: Generations = None
    population: Population = None
    proposer: Proposer = None


def spread(command: Callable[..., int]) -> Callable[..., int]:
    """``command`` with the fields of its options class as parameters of its own, which is where typer looks for options."""
    hints = get_type_hints(command, include_extras=True)
    (name,) = [name for name, hint in hints.items() if is_dataclass(hint)]
    kind = hints[name]
    own = get_type_hints(kind, include_extras=True)
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name != name:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        for field in fields(kind):
            parameters.append(inspect.Parameter(field.name, parameter.kind, default=field.default, annotation=own[field.name]))

    @functools.wraps(command)
    def spread_out(**given: object) -> int:
        options = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        return command(**{name: options}, **given)

    spread_out.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread_out.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread_out


def client(url: str) -> Client:
    """A client of the server at ``url``, with the token of the environment."""
    from selfpruner.client import Client

    return Client(url, os.environ.get("SELFPRUNER_TOKEN") or None)


def read_config(
    file: Path | None,
    settings: Sequence[str] | None,
    *,
    calibration: Sequence[str] | None = None,
    **options: object,
) -> dict[str, object]:
    """The request as plain JSON data. Raises ConfigError on a file that is not a JSON object or a setting without ``=``."""
    body = read_object(file, "config") if file is not None else {}
    body.update({name: value for name, value in options.items() if value is not None})
    if calibration:
        _set(body, "calibration.sources", [{"source": source} for source in calibration])
    for setting in settings or ():
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {setting!r} is not KEY=VALUE; write for example --set generations=3", param="set")
        _set(body, key.strip(), _value(text))
    return body


def read_object(file: Path, param: str, example: str = '{"rate": 0.2}') -> dict[str, object]:
    """The JSON object in a file. Raises ConfigError naming ``param`` when there is none."""
    try:
        body = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {file}: {error.strerror or error}.", param=param) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}.", param=param) from None
    if not isinstance(body, dict):
        raise ConfigError(f"{file} must hold a JSON object such as {example}.", param=param)
    return body


def _set(body: dict[str, object], key: str, value: object) -> None:
    *path, last = key.split(".")
    for part in path:
        inner = body.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {part} holds no fields", param=key)
        body = inner
    body[last] = value


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
