"""Where slopes are best taken, and how far a plan may go by them: plans found from surveys alone, without a search.

    python -m benchmarks.surveys --harder 1.4 1.8 --windows 2

Per multiple of the target rate one survey after the other, each on fresh C4 tokens at the plan that the landscape holds best for
the higher rate. After each the plan it holds best for the target is scored on texts no survey saw, against the closed form: among
levels ``near`` the last plan (0.1), ``free`` among all, or near and all that are ``known`` from surveys.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--harder", type=float, nargs="*", default=[1.4])
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32, help="of 256 tokens per survey")
    parser.add_argument("--probed", type=int, default=4, help="sequences of the dense model's probes")
    parser.add_argument("--judged", type=int, default=16, help="sequences of 512 tokens per text")
    _run(parser.parse_args())


def _run(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.data import text
    from selfpruner import models
    from selfpruner.api import config_of, default_cache
    from selfpruner.architectures import describe
    from selfpruner.calibration.texts import token_batches
    from selfpruner.config import TextConfig
    from selfpruner.evaluation.engine import Engine
    from selfpruner.evaluation.slopes import slopes
    from selfpruner.evolution.evaluator import FIRST, OWN
    from selfpruner.evolution.survey import FORESIGHT, probe_level, steps, weighed
    from selfpruner.evolution.windows import PIECE
    from selfpruner.planning.allocation import cheapest
    from selfpruner.planning.landscape import Landscape, Reference
    from selfpruner.planning.space import Plan
    from selfpruner.pruning.blocks import prepare_blocks
    from selfpruner.pruning.search_space import space_of

    cache = default_cache()
    loaded = models.load(models.resolve(options.model, cache), "cpu", "auto")
    arch = describe(loaded.model)
    config = config_of({"model": options.model, "rate": options.rate, "preset": "evolution"})

    def tokens(name: str, sequences: int, length: int, role: Any) -> Any:
        wanted = TextConfig.model_validate({"sources": [{"source": text(name, cache)}], "sequences": sequences, "length": length})
        return token_batches(wanted, role, loaded, cache, 0)

    seen = tokens("c4", options.probed + options.windows * options.sequences, 256, "fitness").tokens
    judged = {"c4": tokens("c4", options.judged, 512, "report").tokens}
    judged["wikitext2"] = tokens("wikitext2-test", options.judged, 512, "report").tokens
    with torch.no_grad():
        blocks, _ = prepare_blocks(config, arch, loaded, tokens("c4", 32, 512, "calibration"), cache, lambda _: None, lambda: False)
    space = space_of(config, arch, blocks)
    engine = Engine(arch, blocks)

    levels = [probe_level(space, block) for block in range(len(blocks))]
    probes = [Plan(tuple(level if at == block else 0 for at in range(len(blocks)))) for block, level in enumerate(levels)]
    whole = seen[: options.probed]
    starts = whole[: -(-len(whole) // 2)].reshape(-1, PIECE)
    sensitivities = weighed(
        *([max(score.kl, 0.0) for score in engine.evaluate(probes, part, exact=False)] for part in (whole, starts))
    )
    start = cheapest(space, Landscape(space, sensitivities, levels).losses())

    plans = {"closed form": start}
    for factor in options.harder:
        landscape, leader = Landscape(space, sensitivities, levels), start
        for window in range(options.windows):
            first = options.probed + window * options.sequences
            part = seen[first : first + options.sequences]
            here = cheapest(replace(space, rate=factor * space.rate), landscape.losses())
            moves = steps(space, here)
            found = slopes(engine, here, moves, part)
            reference = Reference(here, found.kl, str(window), part.numel(), 1, FORESIGHT)
            for (block, level), term, size in zip(moves, found.first, found.size, strict=True):
                expected = max(found.kl + FIRST * term + OWN * landscape.weights[block] * size, 0.0)
                moved = Plan((*here.levels[:block], level, *here.levels[block + 1 :]))
                landscape.observe(moved, expected - found.kl, reference)
            landscape.fit(1)
            ways = {
                "near": landscape.losses(around=leader, radius=0.1),
                "free": landscape.losses(),
                "known": landscape.losses(around=leader, radius=0.1, known=True),
            }
            for way, losses in ways.items():
                leader = plans[f"{factor:g} x, {window + 1}, {way}"] = cheapest(space, losses)
            print(f"surveyed at {factor:g} x, where the KL is {found.kl:.4f}", flush=True)
    scores = {name: engine.evaluate(list(plans.values()), part, exact=False) for name, part in judged.items()}
    for index, name in enumerate(plans):
        cells = [f"{text} {found[index].kl:.4f} ({found[index].kl / found[0].kl - 1:+.1%})" for text, found in scores.items()]
        print(f"{name:24s}", "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
