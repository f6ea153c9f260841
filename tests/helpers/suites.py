"""Which conformance suites there are of a kind."""

from __future__ import annotations

from typing import Any


def suites_of(suite: type[Any]) -> list[type[Any]]:
    """All below ``suite`` that name a criterion."""
    below = [found for child in suite.__subclasses__() for found in (child, *suites_of(child))]
    return [found for found in below if hasattr(found, "criterion")]
