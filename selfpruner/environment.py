"""Settings from ``SELFPRUNER_...`` variables; a wrong one raises an error of ours.

Each reader names only the variables it needs, so a server's settings cannot stop a command that does not use them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError

from selfpruner.errors import ConfigError

Settings = TypeVar("Settings")

JSON_EXAMPLES = {
    "tokens": """It is written as '{"ann": "a token", "bob": "another"}'.""",
    "proposers": """It is written as '{"gpt": {"kind": "openai", "model": "gpt-4o", "api_key": "sk-..."}}'.""",
}


def read(make: Callable[[], Settings]) -> Settings:
    """What ``make`` reads. Raises ConfigError naming the variable."""
    try:
        return make()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = "_".join(str(part) for part in first["loc"][:1]).upper()
        inner = ".".join(str(part) for part in first["loc"][1:])
        where = f"SELFPRUNER_{name}: {inner}{': ' if inner else ''}" if name else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}{message}", param=name.lower() or None) from None
    except ValueError as error:  # pydantic-settings on JSON that does not parse; the cause's text may hold a secret
        field = re.search(r'field "(\w+)"', str(error))
        name = field[1] if field else ""
        where = f"SELFPRUNER_{name.upper()}" if name else "A variable SELFPRUNER_..."
        raise ConfigError(f"{where} is not JSON. {JSON_EXAMPLES.get(name, '')}".rstrip(), param=name or None) from None
