"""The LLM operators' prompts: Jinja2 templates, one per operator, with the system prompt and the repair turn.

Templates run sandboxed, and a missing variable is an error. Text that an LLM wrote enters a prompt only through the filter
``quote``, as a JSON string: it cannot leave its quotation marks, nor form a chat template's control tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Lists that may lose entries, in this order: the history from its worst end, notes, lessons from the oldest, hints.
_SHORTENABLE = ("history", "refused", "lessons", "hints", "children")


def messages(operator: str, variables: Mapping[str, Any], max_chars: int) -> tuple[dict[str, str], ...]:
    """The chat for ``operator``: system and user message, of at most ``max_chars`` characters if dropping history suffices.

    ``variables`` holds what the templates name; in lists that may lose entries the last one counts most. Raises
    jinja2.UndefinedError when one is missing.
    """
    values = dict(variables)
    while True:
        chat = ({"role": "system", "content": render("system", values)}, {"role": "user", "content": render(operator, values)})
        longest = next((name for name in _SHORTENABLE if values.get(name)), None)
        if longest is None or sum(len(message["content"]) for message in chat) <= max_chars:
            return chat
        values[longest] = values[longest][1:]


def repair(chat: Sequence[Mapping[str, str]], reply: str, problem: str) -> tuple[Mapping[str, str], ...]:
    """``chat`` with the repair turn in its last message: some chat templates refuse two user messages in a row."""
    turn = render("repair", {"reply": reply, "problem": problem})
    return (*chat[:-1], {**chat[-1], "content": f"{chat[-1]['content']}\n\n{turn}"})


def render(template: str, variables: Mapping[str, Any]) -> str:
    return _environment().get_template(f"{template}.j2").render(variables).strip()


def quote(text: str, most: int = 1200) -> str:
    """``text`` as an ASCII JSON string of about ``most`` characters, without ``<``, so that no control token survives."""
    clipped = text if len(text) <= most else text[:most] + " [...]"
    return json.dumps(clipped).replace("<", "\\u003c")


@cache
def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        loader=PackageLoader("prompts", "."),
        undefined=StrictUndefined,
        autoescape=False,  # prompts are text, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quote"] = quote
    return environment
