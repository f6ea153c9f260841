"""Operators. To add one: its own file, a line in ``catalogue.OPERATORS``, a subclass of the conformance test."""

from __future__ import annotations

from selfpruner import catalogue
from selfpruner.operators.base import Context, Hint, Offspring, Operator, ParentSelection, Reflections, Refused
from selfpruner.operators.llm import LlmOperator

OPERATORS: dict[str, type[Operator | ParentSelection]] = {name: entry.load() for name, entry in catalogue.OPERATORS.items()}
# Made without arguments; those of the LLM take its channel.
CLASSICAL: dict[str, type[Operator]] = {
    name: cls for name, cls in OPERATORS.items() if issubclass(cls, Operator) and not issubclass(cls, LlmOperator)
}

__all__ = [
    "CLASSICAL",
    "OPERATORS",
    "Context",
    "Hint",
    "LlmOperator",
    "Offspring",
    "Operator",
    "ParentSelection",
    "Reflections",
    "Refused",
]
