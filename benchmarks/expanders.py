"""What EGGS-PTP's forced diagonals buy: dead inputs, degrees and spectral gaps of pruned matrices, against RIA at the same N:M.

    python -m benchmarks.expanders --kept 2 --group 4

A mask is a bipartite graph of inputs and outputs. Its normalised adjacency D_out^-1/2 A D_in^-1/2 has the largest singular value 1;
the gap is 1 minus the second one: the larger, the better connected (Cheeger). Dead inputs have no connection left. Means over the
model's matrices; ``kept score`` is the share of RIA's score that stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.data import text
from selfpruner import models
from selfpruner.api import default_cache
from selfpruner.architectures import describe
from selfpruner.calibration.cache import cached_statistics
from selfpruner.calibration.statistics import SITES
from selfpruner.calibration.texts import token_batches
from selfpruner.config import TextConfig
from selfpruner.criteria.eggs import expander_mask
from selfpruner.criteria.masks import Sparsity, keep_n
from selfpruner.criteria.ria import Ria, RiaPermuted
from selfpruner.pruning.patterns.masked import LayerMatrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kept", type=int, default=2, help="N: weights that stay of every M")
    parser.add_argument("--group", type=int, default=4, help="M")
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--every", type=int, default=3, help="look at every so many layers")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/expanders.json"))
    options = parser.parse_args()

    cache = default_cache()
    loaded = models.load(models.resolve(options.model, cache), "auto")
    arch = describe(loaded.model)
    wanted = TextConfig.model_validate({"sources": [{"source": text(options.calibration, cache)}], "sequences": 64, "length": 512})
    batches = token_batches(wanted, "calibration", loaded, cache, 0)
    fingerprint = f"{loaded.source.fingerprint}:{batches.fingerprint}"
    level = Sparsity.n_m(options.kept, options.group)
    found: dict[str, list[dict[str, float]]] = {}
    for layer, statistics in enumerate(cached_statistics(arch, batches.tokens, cache / "statistics", fingerprint, SITES)):
        if layer % options.every:
            continue
        for matrix in LayerMatrices(arch, layer, statistics).values():
            scores = Ria().score(matrix)
            masks = {"ria": keep_n(scores, options.kept, options.group)}
            masks["ria_permuted"] = next(RiaPermuted().masks(matrix, [level]))
            for diagonals in range(1, options.kept + 1):
                masks[f"eggs, B = {diagonals}"] = expander_mask(scores, options.kept, options.group, diagonals)
            for name, mask in masks.items():
                found.setdefault(name, []).append({**graph(mask), "kept_score": float((scores * mask).sum() / scores.sum())})
        print(f"layer {layer}", flush=True)
    rows = {name: {key: total(key, [row[key] for row in rows]) for key in rows[0]} for name, rows in found.items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"level": f"{options.kept}:{options.group}", "rows": rows}, indent=1) + "\n")
    print(f"{'':14}" + "".join(f"{key:>18}" for key in next(iter(rows.values()))))
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"{value:18.4f}" if value % 1 else f"{value:18.0f}" for value in row.values()))


def graph(mask: Any) -> dict[str, float]:
    """Dead inputs, the smallest degree of an input, and the spectral gap of one mask (out, in)."""
    A = mask.float()
    out, into = A.sum(1), A.sum(0)
    adjacency = A / out.clamp_min(1).sqrt()[:, None] / into.clamp_min(1).sqrt()
    gram = adjacency @ adjacency.T if len(A) <= A.shape[1] else adjacency.T @ adjacency
    values = torch.linalg.eigvalsh(gram.double())
    return {
        "dead_inputs": float((into == 0).sum()),
        "smallest_degree": float(into.min()),
        "spectral_gap": 1 - float(values[-2].clamp_min(0).sqrt()),
    }


def total(key: str, values: list[float]) -> float:
    if key == "dead_inputs":
        return sum(values)
    return min(values) if key == "smallest_degree" else fmean(values)


if __name__ == "__main__":
    main()
