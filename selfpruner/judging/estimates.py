"""Means with standard errors, and differences between two models on the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """``stderr`` is None where one observation says nothing about it."""

    value: float
    stderr: float | None


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent observations; its standard error is their sample deviation over the root of their number."""
    count = len(values)
    middle = math.fsum(values) / count
    if count < 2:
        return Estimate(middle, None)
    return Estimate(middle, math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (count - 1) / count))


def paired(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """The mean of ``values`` minus ``reference``, observation by observation: what both find hard does not blur it."""
    return mean([value - other for value, other in zip(values, reference, strict=True)])


def average(parts: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates."""
    errors = [part.stderr for part in parts]
    value = math.fsum(part.value for part in parts) / len(parts)
    if any(error is None for error in errors):
        return Estimate(value, None)
    return Estimate(value, math.sqrt(math.fsum(error**2 for error in errors if error is not None)) / len(parts))
