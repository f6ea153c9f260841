"""Blank keys in texts that others wrote, before such a text is shown or stored."""

from __future__ import annotations

import json

# A shorter key is a placeholder that a local server wants ("none", "token", "x"): blanked, it would take ordinary words with it.
SHORTEST_SECRET = 8


def without_key(text: str, key: str | None) -> str:
    """``text`` without ``key``, also as JSON writes it."""
    if key is None or len(key) < SHORTEST_SECRET:
        return text
    for form in (key, json.dumps(key)[1:-1], json.dumps(key, ensure_ascii=False)[1:-1]):
        text = text.replace(form, "***")
    return text
