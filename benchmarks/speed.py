"""What removing parameters is worth in time, for shapes of models with random weights, widths varied as a found plan does.

    python -m benchmarks.speed --random-shape llama-2-7b --rates 0.3 0.5 --multiples 8 64 128 256 --device cuda:0 --compile

Rates by layer are those of a plan that a search found (``--plan``, a result of the demo), stretched over the depth of the shape and
scaled to the rate. Whole KV groups and FFN channels go at the layer's rate; widths are multiples of the given number, chosen so
that all plans of a rate remove as much as such steps allow. Every pruned shape is timed in turn with the dense one, see
``selfpruner benchmark``. On a CPU a large shape wants ``--layers 2``. ``paper``: the speed-up that Self-Pruner
(arXiv 2502.14413) reports for Llama-2-70B at this rate on an A100.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from math import floor, fsum
from pathlib import Path
from typing import Any

from selfpruner.api import default_cache
from selfpruner.timing.report import BenchmarkReport, Settings
from selfpruner.timing.run import run

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "llama-2-13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 512,
        "vocab_size": 256,
    },
}
_COMMON = {"num_key_value_heads": None, "head_dim": 128, "vocab_size": 32000, "tie_word_embeddings": False}
PAPER = {0.3: 1.39, 0.5: 1.70}
# No layer loses more than this: found plans leave something of every one.
_MOST = 0.9


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.5], help="of the decoder's parameters")
    parser.add_argument("--multiples", type=int, nargs="+", default=[8, 64, 128, 256], help="of FFN widths")
    parser.add_argument("--plan", type=Path, default=Path("benchmarks/results/demo.json"), help="JSON with plan.layer_rates")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, to fit the memory there is")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="decode by torch.compile with a cache of fixed size")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed.json"))
    options = parser.parse_args(arguments)
    if not all(0 < rate < _MOST for rate in options.rates):
        parser.error(f"rates lie between 0 and {_MOST}")
    dense = dense_config(options.random_shape, options.layers)
    if not all(0 < multiple <= dense["intermediate_size"] for multiple in options.multiples):
        parser.error(f"multiples lie between 1 and the shape's {dense['intermediate_size']} channels")
    shape = json.loads(options.plan.read_text("utf-8"))["plan"]["layer_rates"]
    rows = []
    print("| rate | multiple | removed | measure | ratio | interval | bound | achieved | paper |\n|" + "---:|" * 9)
    for rate in options.rates:
        for multiple in options.multiples:
            print(f"{rate:g}, multiples of {multiple}", file=sys.stderr, flush=True)
            pruned = pruned_config(dense, layer_rates(shape, dense["num_hidden_layers"], rate), multiple)
            settings = Settings(
                "transformers", options.prompt_tokens, options.new_tokens, options.repetitions, compiled=options.compile
            )
            named = {"dense": dense, f"{rate:g}, multiples of {multiple}": pruned}
            how = {"devices": (options.device,), "dtype": options.dtype, "cache": default_cache()}
            report = asyncio.run(run(named, settings, **how))
            rows.append({"rate": rate, "multiple": multiple, "removed": removed(dense, pruned), **report.to_dict()})
            body = {"shape": options.random_shape, "layers": dense["num_hidden_layers"], "compiled": options.compile, "rows": rows}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
            print("\n".join(_lines(report, rate, multiple, removed(dense, pruned))), flush=True)


def dense_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """Fields of an ordinary Llama's config."""
    fields = {"model_type": "llama", "max_position_embeddings": 4096, **_COMMON, **SHAPES[shape]}
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or fields["num_attention_heads"]
    if layers is not None:
        fields["num_hidden_layers"] = layers
    return fields


def layer_rates(shape: Sequence[float], layers: int, rate: float) -> list[float]:
    """``shape`` stretched linearly over ``layers`` and scaled so that its mean is ``rate``; none above what a layer may lose."""
    last = len(shape) - 1
    places = [index * last / max(layers - 1, 1) for index in range(layers)]
    drawn = [shape[floor(p)] + (p - floor(p)) * (shape[min(floor(p) + 1, last)] - shape[floor(p)]) for p in places]
    low, high = 0.0, 1e6
    for _ in range(100):
        scale = (low + high) / 2
        if fsum(min(_MOST, scale * value) for value in drawn) < rate * layers:
            low = scale
        else:
            high = scale
    return [min(_MOST, high * value) for value in drawn]


def pruned_config(dense: dict[str, Any], rates: Sequence[float], multiple: int) -> dict[str, Any]:
    """Fields of the pruned model's config: KV groups nearest to each rate, and channels in whole multiples that remove the rest,
    together as near to the mean rate as a multiple is."""
    hidden, channels, groups = dense["hidden_size"], dense["intermediate_size"], dense["num_key_value_heads"]
    per_group = dense["num_attention_heads"] // groups
    full = _weights(dense, groups, channels)
    kept_groups = [max(1, round(groups * (1 - rate))) for rate in rates]
    exact = [
        ((1 - rate) * full - _weights(dense, kept, 0)) / (3 * hidden * multiple)
        for rate, kept in zip(rates, kept_groups, strict=True)
    ]
    most = channels // multiple
    steps = [min(max(floor(value), 1), most) for value in exact]
    missing = round(fsum(exact)) - sum(steps)
    change = 1 if missing > 0 else -1
    while missing:
        free = [index for index, count in enumerate(steps) if 1 <= count + change <= most]
        if not free:
            break  # what is left is more than such steps can remove
        chosen = max(free, key=lambda index: change * (exact[index] - steps[index]))
        steps[chosen] += change
        missing -= change
    layers = {
        str(index): {"num_attention_heads": kept * per_group, "num_key_value_heads": kept, "intermediate_size": count * multiple}
        for index, (kept, count) in enumerate(zip(kept_groups, steps, strict=True))
        if (kept, count * multiple) != (groups, channels)
    }
    return {**dense, "model_type": "selfpruner", "per_layer_config": layers}


def removed(dense: dict[str, Any], pruned: dict[str, Any]) -> float:
    """The share of the decoder's matrices that is gone."""
    full = _weights(dense, dense["num_key_value_heads"], dense["intermediate_size"])
    gone = [
        full - _weights(dense, layer["num_key_value_heads"], layer["intermediate_size"])
        for layer in pruned["per_layer_config"].values()
    ]
    return float(sum(gone) / (full * dense["num_hidden_layers"]))


def _weights(dense: dict[str, Any], groups: int, channels: int) -> int:
    """Of one layer's matrices."""
    per_group = dense["num_attention_heads"] // dense["num_key_value_heads"]
    return int(dense["hidden_size"] * (2 * groups * (per_group + 1) * dense["head_dim"] + 3 * channels))


def _lines(report: BenchmarkReport, rate: float, multiple: int, share: float) -> list[str]:
    pruned = report.subjects[1]
    lines = []
    for measure in report.measures:
        if measure != "first_token":
            found = report.ratio(pruned, measure)
            cells = [f"{rate:g}", str(multiple), f"{share:.3f}", measure.replace("_", " at batch "), f"{found.ratio:.3f}"]
            cells += [f"{found.low:.3f} to {found.high:.3f}", f"{found.bound:.3f}", f"{found.achieved:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{PAPER[rate]:.2f}" if rate in PAPER else ""]) + " |")
    return lines


if __name__ == "__main__":
    main()
