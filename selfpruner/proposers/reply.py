"""From an LLM's text to one JSON object. The text is data: it is parsed strictly, and that is all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NoReturn

_MAX_TRIES = 64


class NotJsonError(ValueError):
    """No JSON object in the text."""


class NonFiniteError(ValueError):
    """NaN or Infinity, which JSON does not have."""


def extract(text: str) -> dict[str, object]:
    """The JSON object in ``text``: the whole of it, in a code fence, or the last one inside prose or after a chain of thought.

    Raises NotJsonError, or NonFiniteError where a number is NaN or infinite.
    """
    body = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL).strip()
    fenced = re.findall(r"```[a-zA-Z]*\s*(.*?)```", body, flags=re.DOTALL)
    for part in (body, *reversed(fenced)):
        try:
            value = json.loads(part, parse_constant=_refuse)
        except NonFiniteError:
            raise
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
        if isinstance(value, list):
            break
    return _last_object(body)


def follows(text: str, schema: Mapping[str, object]) -> bool:
    """Whether ``text`` is what decoding constrained to ``schema`` writes: one JSON value of the right shape, and nothing else.

    Bounds of numbers and lengths of strings are left out: some servers constrain the shape only, and a reply is validated anyway.
    """
    try:
        return _has_shape(json.loads(text, parse_constant=_refuse), schema)
    except (ValueError, RecursionError):
        return False


def _has_shape(value: object, schema: object) -> bool:
    match schema:
        case {"type": "object", "properties": dict(parts)}:
            if not isinstance(value, dict) or value.keys() != parts.keys():
                return False
            return all(_has_shape(value[key], parts[key]) for key in parts)
        case {"type": "array", "minItems": int(fewest)} if isinstance(value, list) and len(value) < fewest:
            return False
        case {"type": "array", "maxItems": int(most)} if isinstance(value, list) and len(value) > most:
            return False
        case {"type": "array", "items": items}:
            return isinstance(value, list) and all(_has_shape(each, items) for each in value)
        case {"type": "string", "enum": list(known)}:
            return isinstance(value, str) and value in known
        case {"type": "string"}:
            return isinstance(value, str)
    return isinstance(value, int) and not isinstance(value, bool)


def _last_object(text: str) -> dict[str, object]:
    decoder = json.JSONDecoder(parse_constant=_refuse)
    last: dict[str, object] | None = None
    start = text.find("{")
    for _ in range(_MAX_TRIES):
        if start < 0:
            break
        try:
            value, end = decoder.raw_decode(text, start)
        except NonFiniteError:
            raise
        except (ValueError, RecursionError):
            end = start + 1
        else:
            last = value
        start = text.find("{", end)
    if last is None:
        raise NotJsonError("the answer holds no JSON object that parses")
    return last


def _refuse(constant: str) -> NoReturn:
    raise NonFiniteError(f"{constant} is not a number that JSON has")
