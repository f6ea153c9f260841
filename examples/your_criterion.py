"""Prune with a criterion of your own: here Wanda's score with the input norm to a power.

    python examples/your_criterion.py MODEL OUTPUT [FIELDS.json]

In a package it is an entry point, and every command knows it; see CONTRIBUTING.md, "A criterion of your own".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import Tensor

import selfpruner
from selfpruner import catalogue
from selfpruner.criteria.base import Matrix, ScoreWeights


class RootWanda(ScoreWeights):
    """S_ij = |W_ij| * (||X_j||_2 / sqrt(sequences))^0.75; higher = keep."""

    name, source, patterns = "root_wanda", "an example", ("n_m", "unstructured")
    needs, by_row = frozenset({"activations"}), True  # the weights of an output compete with each other

    def score(self, matrix: Matrix) -> Tensor:
        return matrix.W.abs() * matrix.norm**0.75


def main(model: str, output: str, fields: str | None = None) -> None:
    more = json.loads(Path(fields).read_text("utf-8")) if fields else {}
    catalogue.add_plugin(catalogue.CRITERION_PLUGINS, RootWanda.name, f"{__name__}:RootWanda")
    made = selfpruner.prune(output, rate=0.5, **{"model": model, "pattern": "n_m", "criterion": "root_wanda", **more})
    print(f"{made.path}: {made.parameters:,} parameters, verified: {made.verification['greedy']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
