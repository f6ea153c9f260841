"""What else repairs a pruned model: ridges of least squares, and refits of a whole plan on what its blocks see behind pruned ones.

    python -m benchmarks.repairs --rate 0.3 --calibration wikitext2-train --seeds 0 1 2

One uniform plan with units in the order of ``obs``. All repairs are fitted to the same calibration tokens in one walk over the
blocks, the dense model's residual stream x beside each repair's own, x~. Judged on text that was not looked at while the product's
ridge was made: WikiText-2 valid, and the part of the C4 documents that fitness has, without its first sequences. A repair is

    chosen             what the product does: the ridge of every block by the error on a fourth of the sequences
    mean:R  diag:R     least squares on dense inputs, its ridge R of the inputs' mean scatter, or of every input's own
    A+B+...            chosen, then of a plan, block after block, each drawn to what it had by a ridge that a fourth of the
                       sequences chooses:
      gains            the gain of the norm before a block, for what q, k and v (gate and up) give in the dense model, and that of
                       the last norm, for the logits
      inputs           q, k, v, gate and up, for what they give in the dense model
      outputs:A        o and down, for what the dense block adds and the share A of x - x~
      calm             not fitted to tokens whose stream is more than 100 times the median's in mean square

Results are kept one by one, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.data import text
from selfpruner import models
from selfpruner.api import config_of, default_cache
from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights
from selfpruner.compensation.least_squares import FLOOR
from selfpruner.evaluation.session import Prepared, prepare
from selfpruner.planning.space import Plan
from selfpruner.pruning.patterns import PrunableAttention

REPAIRS = (
    *(
        "mean:0.001",
        "diag:0.01",
        "diag:0.1",
        "diag:0.3",
        "chosen",
        "gains",
        "inputs",
        "outputs:0",
        "outputs:0.5",
        "outputs:0.5+calm",
    ),
    *("gains+outputs:0.5+calm", "inputs+outputs:0.5+calm"),
)
LENGTH = 512
SKIPPED = 16  # sequences of C4's fitness part that the ridge was made with
JUDGES = 4  # every how manieth calibration sequence chooses a ridge
RIDGES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
AT_ONCE = 4
Weights = AttentionWeights | FfnWeights


@dataclass
class Moments:
    """Sums over tokens for inputs z (n,) and targets t (d,), a constant input included."""

    zz: Tensor
    zt: Tensor
    tt: float = 0.0

    @classmethod
    def of(cls, n: int, d: int) -> Moments:
        return cls(torch.zeros(n + 1, n + 1, dtype=torch.float64), torch.zeros(n + 1, d, dtype=torch.float64))

    def add(self, z: Tensor, t: Tensor) -> None:
        """Inputs (tokens, n) and targets (tokens, d)."""
        z = torch.cat([z.float(), z.new_ones(len(z), 1, dtype=torch.float32)], 1)
        self.zz += z.T @ z
        self.zt += z.T @ t.float()
        self.tt += float(t.float().square().sum(dtype=torch.float64))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.zz + other.zz, self.zt + other.zt, self.tt + other.tt)

    def single(self) -> Moments:
        """In float32, which is enough to choose a ridge."""
        return Moments(self.zz.float(), self.zt.float(), self.tt)

    def error(self, V: Tensor) -> float:
        """Sum of |V z - t|^2 over the tokens, V (d, n + 1)."""
        return float(((V @ self.zz) * V).sum() - 2 * (V * self.zt.T).sum()) + self.tt


def drawn(moments: Moments, V: Tensor, ridge: float, *, biased: bool) -> Tensor:
    """V (d, n + 1) plus the change that fits the targets best, drawn to none by ``ridge`` of every input's scatter."""
    n = len(moments.zz) - 1
    count, mean = moments.zz[n, n], moments.zz[:n, n] / moments.zz[n, n]
    C = moments.zz[:n, :n] - count * torch.outer(mean, mean) * biased
    rest = (moments.zt - moments.zz @ V.T)[:n]
    if biased:
        rest = rest - torch.outer(mean, (moments.zt - moments.zz @ V.T)[n])
    diagonal = C.diagonal().clone()
    C.diagonal().add_(ridge * diagonal + FLOOR * diagonal.mean())
    found = V.clone()
    found[:, :n] += torch.cholesky_solve(rest, torch.linalg.cholesky(C)).T
    if biased:
        found[:, n] = (moments.zt[n] - found[:, :n] @ moments.zz[:n, n]) / count
    return found


def gain(moments: Moments, W: Tensor, ridge: float) -> Tensor:
    """The factors g (n,) of inputs z for which W diag(g) z is nearest to t, drawn to one."""
    n = W.shape[1]
    H = (W.T @ W) * moments.zz[:n, :n]
    rest = (W * moments.zt[:n].T).sum(0) - H.sum(1)
    diagonal = H.diagonal().clone()
    H.diagonal().add_(ridge * diagonal + FLOOR * diagonal.mean())
    return 1 + torch.cholesky_solve(rest[:, None], torch.linalg.cholesky(H))[:, 0]


def best(halves: Sequence[Moments], given: Tensor, fit: Callable[[Moments, Tensor, float], Tensor]) -> Tensor:
    """``given`` (d, n + 1), or what ``fit`` makes of it and all tokens with the ridge that is best on the judging half."""
    fitted, judge = (half.single() for half in halves)
    errors = {ridge: judge.error(fit(fitted, given.float(), ridge)) for ridge in RIDGES}
    ridge = min(errors, key=errors.__getitem__)
    return fit(halves[0] + halves[1], given, ridge) if errors[ridge] < judge.error(given.float()) else given


class Walk:
    """One repair on its way through the blocks; ``streams`` are its own residual streams, ``dense`` those of the dense model."""

    def __init__(self, name: str, arch: Architecture, dense: list[Tensor]) -> None:
        self.name, self.arch, self.dense = name, arch, dense
        self.streams = [x.clone() for x in dense]
        self.weights: list[Weights | None] = []
        self.last_gain: Tensor | None = None
        self.steps = dict(part.partition(":")[::2] for part in name.split("+"))

    def block(self, index: int, whole: Weights, cut: Weights | None, kept: Tensor, gram: Sequence[Moments]) -> None:
        """Add block ``index``. ``gram`` are the moments of the dense block's output inputs, of those that fit and that judge."""
        if cut is not None:
            if self.name.startswith(("mean:", "diag:")):
                cut = self._ridge(whole, cut, kept, gram[0] + gram[1])
            if "gains" in self.steps or "inputs" in self.steps:
                cut = self._inputs(index, cut)
            if "outputs" in self.steps:
                cut = self._outputs(index, whole, cut)
            for y in self.streams:
                y += update(self.arch, index, y, cut)
        self.weights.append(cut)

    def _ridge(self, whole: Weights, cut: Weights, kept: Tensor, gram: Moments) -> Weights:
        """On dense inputs, the kept columns fitted to the dense block's output (:mod:`selfpruner.compensation.least_squares`)."""
        kind, _, ridge = self.name.partition(":")
        W, b = output(whole)
        if len(kept) == W.shape[1]:
            return cut
        n, count = W.shape[1], gram.zz[-1, -1]
        mean = gram.zz[:n, n] / count
        C = gram.zz[:n, :n] - count * torch.outer(mean, mean)
        removed = torch.ones(n, dtype=torch.bool)
        removed[kept] = False
        M = C[kept][:, kept]
        own = M.diagonal().clone()
        level = C.diagonal().mean()
        M.diagonal().add_(float(ridge) * level if kind == "mean" else float(ridge) * own + FLOOR * level)
        V = W.double()
        pulled = V[:, removed] @ C[removed][:, kept]
        found = V[:, kept] + torch.cholesky_solve(pulled.T, torch.linalg.cholesky(M)).T
        bias = V @ mean - found @ mean[kept] + (0 if b is None else b.double())
        return with_output(cut, found, bias)

    def _inputs(self, index: int, cut: Weights) -> Weights:
        names = cut.matrices[:-1]
        W = torch.cat([getattr(cut, name) for name in names])
        norm = self.arch.attention_norm if isinstance(cut, AttentionWeights) else self.arch.ffn_norm

        def pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return norm(index // 2, y, W.dtype), linear(norm(index // 2, x, W.dtype), W)

        halves = self._moments(W.shape[1], len(W), pair)
        V = torch.cat([W.double(), torch.zeros(len(W), 1, dtype=torch.float64)], 1)
        if "gains" in self.steps:
            V = best(halves, V, lambda moments, V, ridge: V * extended(gain(moments, V[:, :-1], ridge)))
        if "inputs" in self.steps:
            V = best(halves, V, lambda moments, V, ridge: drawn(moments, V, ridge, biased=False))
        parts = V[:, :-1].to(W.dtype).split([len(getattr(cut, name)) for name in names])
        changed: dict[str, Any] = dict(zip(names, parts, strict=True))
        return replace(cut, **changed)

    def _outputs(self, index: int, whole: Weights, cut: Weights) -> Weights:
        W, b = output(cut)
        share = float(self.steps["outputs"])

        def pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return seen(self.arch, index, y, cut), update(self.arch, index, x, whole).float() + share * (x - y).float()

        halves = self._moments(W.shape[1], len(W), pair)
        V = torch.cat([W, W.new_zeros(len(W), 1) if b is None else b[:, None]], 1).double()
        V = best(halves, V, lambda moments, V, ridge: drawn(moments, V, ridge, biased=True))
        return with_output(cut, V[:, :-1], V[:, -1])

    def _moments(self, n: int, d: int, pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[Moments]:
        halves = [Moments.of(n, d), Moments.of(n, d)]
        number = 0
        for x, y in zip(self.dense, self.streams, strict=True):
            z, t = pair(x, y)
            size = x.float().square().mean(-1)
            wanted = size < 100 * size.median() if "calm" in self.steps else torch.ones_like(size, dtype=torch.bool)
            for row in range(len(x)):
                halves[number % JUDGES == 0].add(z[row][wanted[row]], t[row][wanted[row]])
                number += 1
        return halves

    def finish(self) -> None:
        """The last norm's gain, where gains are fitted: for the logits."""
        if "gains" not in self.steps:
            return
        W = self.arch.head_weight.double()
        n = W.shape[1]
        halves = self._moments(n, n, lambda x, y: (self.arch.final_norm(y), self.arch.final_norm(x)))
        # In logits, |W (V z - t)|^2 = |S (V z - t)|^2 with S the root of W^T W.
        values, vectors = torch.linalg.eigh(W.T @ W)
        S = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        for half in halves:
            half.tt = float("nan")  # not of these targets: errors are compared without it
            half.zt = half.zt @ S
        errors = {}
        for ridge in RIDGES:
            V = S * gain(halves[0], S, ridge)
            errors[ridge] = less_tt(halves[1], V)
        ridge = min(errors, key=errors.__getitem__)
        if errors[ridge] < less_tt(halves[1], S):
            self.last_gain = gain(halves[0] + halves[1], S, ridge)


def less_tt(moments: Moments, V: Tensor) -> float:
    """:meth:`Moments.error` up to a constant, for V (d, n)."""
    n = V.shape[1]
    return float(((V @ moments.zz[:n, :n]) * V).sum() - 2 * (V * moments.zt[:n].T).sum())


def extended(g: Tensor) -> Tensor:
    return torch.cat([g, g.new_ones(1)])


def output(weights: Weights) -> tuple[Tensor, Tensor | None]:
    return (weights.o, weights.o_bias) if isinstance(weights, AttentionWeights) else (weights.down, weights.down_bias)


def with_output(weights: Weights, W: Tensor, bias: Tensor) -> Weights:
    if isinstance(weights, AttentionWeights):
        return replace(weights, o=W.to(weights.q.dtype), o_bias=bias.to(weights.q.dtype))
    return replace(weights, down=W.to(weights.up.dtype), down_bias=bias.to(weights.up.dtype))


def seen(arch: Architecture, index: int, x: Tensor, weights: Weights) -> Tensor:
    if isinstance(weights, FfnWeights):
        return arch.ffn_inputs(index // 2, x, weights)
    return arch.attention_inputs(index // 2, x, weights, arch.rope(x.shape[1]))


def update(arch: Architecture, index: int, x: Tensor, weights: Weights) -> Tensor:
    if isinstance(weights, FfnWeights):
        return arch.ffn_update(index // 2, x, weights)
    return arch.attention_update(index // 2, x, weights, arch.rope(x.shape[1]))


def repaired(prepared: Prepared, plan: Plan, tokens: Tensor, names: Sequence[str]) -> dict[str, tuple[Walk, float]]:
    """Every repair by name, and the seconds it took."""
    arch, engine = prepared.arch, prepared.engine
    dense = [arch.embed(part) for part in tokens.split(AT_ONCE)]
    walks = {name: Walk(name, arch, dense) for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for index in range(2 * arch.layers):
        whole, cut = engine.weights(index, 0), engine.weights(index, plan.levels[index])
        assert whole is not None
        W, b = output(whole)
        option = prepared.space.blocks[index].options[plan.levels[index]]
        if isinstance(whole, FfnWeights):
            kept = torch.arange(option.channels)
        else:
            block = engine.blocks[index]
            assert isinstance(block, PrunableAttention)
            heads = torch.tensor(block.heads[plan.levels[index]])
            kept = (heads[:, None] * whole.head_dim + torch.arange(whole.head_dim)).flatten()
        gram = [Moments.of(W.shape[1], 0), Moments.of(W.shape[1], 0)]
        updates = []
        for part, x in enumerate(dense):
            z = seen(arch, index, x, whole)
            for row in range(len(x)):
                gram[(part * AT_ONCE + row) % JUDGES == 0].add(z[row], z[row][:, :0])
            updates.append(linear(z, W, b))
        for name, walk in walks.items():
            started = time.perf_counter()
            walk.block(index, whole, cut, kept, gram)
            seconds[name] += time.perf_counter() - started
        for x, change in zip(dense, updates, strict=True):
            x += change
    for walk in walks.values():
        walk.finish()
    return {name: (walk, seconds[name]) for name, walk in walks.items()}


def behind(arch: Architecture, tokens: Tensor, weights: Sequence[Weights | None]) -> Tensor:
    """What the head sees of tokens (B, S) with these blocks, (B, S, d)."""
    x = arch.embed(tokens)
    for index, block in enumerate(weights):
        if block is not None:
            x += update(arch, index, x, block)
    return arch.final_norm(x)


def judged(arch: Architecture, walk: Walk, tokens: Tensor, dense: Sequence[Tensor]) -> dict[str, float]:
    """KL(dense || repaired) per token in nats, and perplexity, on tokens (B, S); ``dense``: :func:`behind` of each pair of them."""
    kl = nll = 0.0
    for part, whole in zip(tokens.split(2), dense, strict=True):
        n = behind(arch, part, walk.weights)
        p = arch.logits(whole).float().log_softmax(-1)
        q = arch.logits(n if walk.last_gain is None else n * walk.last_gain.to(n.dtype)).float().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        nll -= float(q[:, :-1].gather(2, part[:, 1:, None]).sum())
    return {
        "kl": round(kl / tokens.numel(), 4),
        "perplexity": round(math.exp(nll / (tokens.numel() - len(tokens))), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--calibration", default="wikitext2-train")
    parser.add_argument("--sequences", type=int, default=32, help="of calibration")
    parser.add_argument("--held-out", type=int, default=16, help="sequences of each held-out text")
    parser.add_argument("--repairs", nargs="+", default=list(REPAIRS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/repairs.json"))
    options = parser.parse_args()
    cache = default_cache()
    key = f"{options.model} {options.calibration} {options.sequences}x{LENGTH} rate {options.rate} held out {options.held_out}"
    known: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows = known.setdefault(key, {})
    loaded = models.load(models.resolve(options.model, cache), "auto")
    for seed in options.seeds:
        of = rows.setdefault(str(seed), {})
        missing = [name for name in options.repairs if name not in of]
        if missing:
            for name, row in measured(loaded, options, seed, missing, cache):
                of[name] = row
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                print(seed, name, row, flush=True)
    print(table([rows[str(seed)] for seed in options.seeds], options.repairs))


@torch.inference_mode()
def measured(loaded: models.LoadedModel, options: argparse.Namespace, seed: int, names: Sequence[str], cache: Path) -> Any:
    """(name, row) one after the other."""

    def source(name: str, sequences: int) -> dict[str, Any]:
        return {"sources": [{"source": text(name, cache)}], "sequences": sequences, "length": LENGTH}

    config = config_of(
        {
            "model": options.model,
            "rate": options.rate,
            "preset": "evolution",
            "seed": seed,
            "calibration": source(options.calibration, options.sequences),
            "report_text": source("wikitext2-valid", options.held_out),
            "fitness_text": source("c4", SKIPPED + options.held_out),
        }
    )
    prepared = prepare(config, loaded, cache, ["calibration", "report", "fitness"], lambda _: None, lambda: False)
    plan = prepared.space.project([options.rate] * prepared.space.layers)
    texts = {"wikitext2-valid": prepared.texts["report"].tokens, "c4": prepared.texts["fitness"].tokens[SKIPPED:]}
    arch = prepared.arch
    whole = [prepared.engine.weights(index, 0) for index in range(2 * arch.layers)]
    dense = {held_out: [behind(arch, part, whole) for part in tokens.split(2)] for held_out, tokens in texts.items()}
    for name, (walk, seconds) in repaired(prepared, plan, prepared.texts["calibration"].tokens, names).items():
        row: dict[str, Any] = {held_out: judged(arch, walk, tokens, dense[held_out]) for held_out, tokens in texts.items()}
        yield name, row | {"seconds": round(seconds, 1)}


def table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Geometric means over the seeds, and the change against ``chosen`` with its standard error over them, in percent."""
    texts = ("wikitext2-valid", "c4")
    lines = ["| repair | " + " | ".join(f"{held_out}: KL | perplexity | against chosen" for held_out in texts) + " | seconds |"]
    lines.append("|" + "---|" * (3 * len(texts) + 2))
    for name in names:
        cells = [name]
        for held_out in texts:
            kl, perplexity = ([math.log(row[name][held_out][unit]) for row in rows] for unit in ("kl", "perplexity"))
            cells += [f"{math.exp(sum(values) / len(rows)):.4g}" for values in (kl, perplexity)]
            if "chosen" not in rows[0]:
                cells.append("")
                continue
            changes = [value - math.log(row["chosen"][held_out]["perplexity"]) for value, row in zip(perplexity, rows, strict=True)]
            mean = sum(changes) / len(rows)
            spread = math.sqrt(sum((change - mean) ** 2 for change in changes) / max(1, len(rows) - 1) / len(rows))
            cells.append(f"{math.expm1(mean):+.1%}" + (f" +- {spread:.1%}" if len(rows) > 1 else ""))
        lines.append("| " + " | ".join([*cells, f"{sum(row[name]['seconds'] for row in rows) / len(rows):.0f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
