"""Levels, costs, plans and the budget. Knows no tensors, no database and no LLM, and imports only the standard library.

A *block* (the attention or the FFN of one layer) has a list of *options*, from level 0 = dense to the smallest. A *plan* is one
level per block. The *budget* is met when ``target <= removed < target + step``: never less than asked, and at most one smallest FFN
step more.

A rate vector moves *dials*. With granularity ``block`` every block is a dial; with ``layer`` the attention and FFN of a layer turn
together along one chain of pairs, so one rate per layer names one setting (Self-Pruner's genome).
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from selfpruner.errors import BudgetError, ConfigError

Kind = Literal["attention", "ffn"]
Granularity = Literal["layer", "block"]

# Dials that are equally far from their wanted rates are taken in the order of the fractional parts of index * GOLDEN, which
# spreads the last steps evenly over the depth instead of giving them to the first layers.
GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Option:
    """What a block keeps at one level. ``error`` is the squared error of the block's output over its dense energy, in [0, 1+]."""

    parameters: int
    error: float = 0.0
    channels: int = 0
    kv_groups: int = 0
    heads_per_group: int = 0

    @property
    def heads(self) -> int:
        return self.kv_groups * self.heads_per_group


@dataclass(frozen=True, slots=True)
class Block:
    """One block's options, dense first, parameters strictly falling."""

    layer: int
    kind: Kind
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        sizes = [option.parameters for option in self.options]
        if not sizes or any(after >= before for before, after in pairwise(sizes)):
            raise ConfigError(f"layer {self.layer} {self.kind}: options must get strictly smaller, got {sizes}")

    def removed(self, level: int) -> int:
        return self.options[0].parameters - self.options[level].parameters

    def rate(self, level: int) -> float:
        """Removed / original parameters of this block."""
        return self.removed(level) / self.options[0].parameters


@dataclass(frozen=True, slots=True)
class Plan:
    """One level per block, attention before FFN, layer by layer. Its hash is its identity."""

    levels: tuple[int, ...]

    @property
    def hash(self) -> str:
        return hashlib.sha256(",".join(map(str, self.levels)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Dial:
    """A chain of settings ordered by what they remove; ``settings[i]`` gives the levels of ``blocks`` at position i."""

    blocks: tuple[int, ...]
    parameters: int
    removed: tuple[int, ...]
    settings: tuple[tuple[int, ...], ...]
    fine: bool

    def rate(self, position: int) -> float:
        return self.removed[position] / self.parameters


@dataclass(frozen=True)
class SearchSpace:
    """The legal plans of one model and target.

    ``total`` is the denominator of the target rate in parameters (decoder or whole model); ``step`` the parameters of one FFN step.
    """

    blocks: tuple[Block, ...]
    total: int
    rate: float
    step: int
    granularity: Granularity = "block"
    dials: tuple[Dial, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dials", tuple(_dials(self)))
        most = sum(block.removed(len(block.options) - 1) for block in self.blocks)
        if most < self.target:
            raise BudgetError(
                f"A rate of {self.rate:g} asks to remove {self.target:,} parameters; this search space can remove at most {most:,} "
                f"(rate {most / self.total:.3f}). Lower the rate, widen attention, or set drop_blocks.",
                param="rate",
            )

    # -- sizes ---------------------------------------------------------------------------------------------------------
    @property
    def target(self) -> int:
        """Parameters to remove: the smallest whole number that reaches the rate."""
        return math.ceil(self.rate * self.total - 1e-9)

    @property
    def layers(self) -> int:
        return max(block.layer for block in self.blocks) + 1

    def removed(self, plan: Plan) -> int:
        return sum(block.removed(level) for block, level in zip(self.blocks, plan.levels, strict=True))

    def meets_budget(self, plan: Plan) -> bool:
        return self._fits(self.removed(plan))

    def _fits(self, removed: int) -> bool:
        return self.target <= removed < self.target + self.step

    def check(self, plan: Plan) -> None:
        """Raise ConfigError unless every level of ``plan`` exists in its block."""
        if len(plan.levels) != len(self.blocks):
            raise ConfigError(f"a plan of this model has {len(self.blocks)} levels, got {len(plan.levels)}", param="plan")
        for block, level in zip(self.blocks, plan.levels, strict=True):
            if not 0 <= level < len(block.options):
                raise ConfigError(
                    f"layer {block.layer} {block.kind}: level {level} is not in 0..{len(block.options) - 1}", param="plan"
                )

    @property
    def dense(self) -> Plan:
        return Plan((0,) * len(self.blocks))

    # -- rates ---------------------------------------------------------------------------------------------------------
    def block_rates(self, plan: Plan) -> list[float]:
        return [block.rate(level) for block, level in zip(self.blocks, plan.levels, strict=True)]

    def layer_rates(self, plan: Plan) -> list[float]:
        """Removed / original parameters of attention and FFN together, per layer."""
        gone, whole = [0] * self.layers, [0] * self.layers
        for block, level in zip(self.blocks, plan.levels, strict=True):
            gone[block.layer] += block.removed(level)
            whole[block.layer] += block.options[0].parameters
        return [g / w for g, w in zip(gone, whole, strict=True)]

    def rates(self, plan: Plan) -> list[float]:
        """The plan as the search sees it: one rate per dial (layer or block)."""
        return self.layer_rates(plan) if self.granularity == "layer" else self.block_rates(plan)

    # -- projection ----------------------------------------------------------------------------------------------------
    def project(self, rates: Sequence[float]) -> Plan:
        """The plan nearest to ``rates`` that meets the budget.

        ``rates`` has one number per dial, or one per layer (then every dial of the layer gets it). The rates are shifted
        by one common amount until the budget fits (the Euclidean projection, apart from bounds), coarse dials
        (attention) are rounded to the nearest setting, and the fine ones settle the rest by largest remainder, which
        keeps the order of the rates. A plan that meets the budget projects to itself.

        Raises ConfigError on a wrong length or a number that is not finite, BudgetError when no plan meets the budget.
        """
        asked = self._per_dial(rates)
        exact = [_nearest(dial, rate) for dial, rate in zip(self.dials, asked, strict=True)]
        hit = all(abs(dial.rate(p) - rate) < 1e-9 for dial, rate, p in zip(self.dials, asked, exact, strict=True))
        if hit and self._fits(sum(dial.removed[p] for dial, p in zip(self.dials, exact, strict=True))):
            return self._plan(exact)
        shift = self._shift(asked)
        wanted = [min(max(rate + shift, 0.0), dial.rate(-1)) for rate, dial in zip(asked, self.dials, strict=True)]
        positions = [_nearest(d, w) if not d.fine else _floor(d, w) for d, w in zip(self.dials, wanted, strict=True)]
        if not self._repair(positions, wanted, asked):
            positions = self._solve(wanted, asked)
        return self._plan(positions)

    def _per_dial(self, rates: Sequence[float]) -> list[float]:
        if len(rates) == len(self.dials):
            wanted = [float(rate) for rate in rates]
        elif len(rates) == self.layers:
            wanted = [float(rates[self.blocks[dial.blocks[0]].layer]) for dial in self.dials]
        else:
            raise ConfigError(
                f"expected {len(self.dials)} rates (or {self.layers}, one per layer), got {len(rates)}", param="rates"
            )
        if not all(map(math.isfinite, wanted)):
            raise ConfigError("rates must be finite numbers", param="rates")
        return [min(max(w, 0.0), 1.0) for w in wanted]

    def _shift(self, wanted: Sequence[float]) -> float:
        """The common amount that makes the clipped rates remove exactly the target."""

        def removed(shift: float) -> float:
            return sum(d.parameters * min(max(w + shift, 0.0), d.rate(-1)) for w, d in zip(wanted, self.dials, strict=True))

        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if removed(middle) < self.target else (low, middle)
        return high

    def _repair(self, positions: list[int], wanted: Sequence[float], asked: Sequence[float]) -> bool:
        """Turn dials, one position at a time, until the budget is met; the dial furthest from its wanted rate goes first, of
        equal ones (say, both shifted to 0) the one that was asked for more. False when that leads nowhere."""
        removed = sum(d.removed[p] for d, p in zip(self.dials, positions, strict=True))
        visited: set[tuple[int, ...]] = set()
        while not self._fits(removed):
            if tuple(positions) in visited:
                return False
            visited.add(tuple(positions))
            way = 1 if removed < self.target else -1
            moves = []
            for index, (dial, position, rate) in enumerate(zip(self.dials, positions, wanted, strict=True)):
                after = position + way
                if 0 <= after < len(dial.removed):
                    change = dial.removed[after] - dial.removed[position]
                    overshoots = removed + change >= self.target + self.step if way > 0 else removed + change < self.target
                    residual = round(-way * (rate - dial.rate(position)), 9)
                    order = (residual, -way * asked[index], index * GOLDEN % 1.0, index)
                    moves.append((not dial.fine, overshoots, *order, change))
            if not moves:
                return False
            *_, index, change = min(moves)
            positions[index] += way
            removed += change
        return True

    def _solve(self, wanted: Sequence[float], asked: Sequence[float]) -> list[int]:
        """Some positions that meet the budget, by exact search: where steps are coarse, single turns can miss every plan.

        Bit u of ``reach[i]`` says that the first i dials can remove u units. Going back, each dial takes the reachable position
        nearest to its wanted rate; fine dials come last and settle what is left.
        """
        unit = math.gcd(*(gone for dial in self.dials for gone in dial.removed)) or 1
        top = -(-(self.target + self.step) // unit)
        order = sorted(range(len(self.dials)), key=lambda index: not self.dials[index].fine)
        reach = [1]
        for index in order:
            sums = 0
            for gone in self.dials[index].removed:
                sums |= reach[-1] << gone // unit
            reach.append(sums & ((1 << top) - 1))
        need = -(-self.target // unit)
        goals = reach[-1] >> need
        if not goals:
            raise BudgetError(
                f"No plan removes {self.target:,} parameters within one step of {self.step:,}. "
                "Choose another ffn_step, granularity 'block', or another rate.",
                param="ffn_step",
            )
        left = need + (goals & -goals).bit_length() - 1
        positions = [0] * len(order)
        for index, before in zip(reversed(order), reversed(reach[:-1]), strict=True):
            dial = self.dials[index]
            fitting = [p for p, gone in enumerate(dial.removed) if gone // unit <= left and before >> (left - gone // unit) & 1]
            positions[index] = min(fitting, key=lambda p: (abs(dial.rate(p) - wanted[index]), p))
            left -= dial.removed[positions[index]] // unit
        # Dials of one kind may swap positions at no cost: the higher rate gets the higher one.
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, dial in enumerate(self.dials):
            alike.setdefault(dial.removed, []).append(index)
        for members in alike.values():
            ranked = sorted(members, key=lambda index: (wanted[index], asked[index], index))
            values = sorted(positions[index] for index in members)
            for index, value in zip(ranked, values, strict=True):
                positions[index] = value
        return positions

    def _plan(self, positions: Sequence[int]) -> Plan:
        levels = [0] * len(self.blocks)
        for dial, position in zip(self.dials, positions, strict=True):
            for block, level in zip(dial.blocks, dial.settings[position], strict=True):
                levels[block] = level
        return Plan(tuple(levels))


def ffn_widths(width: int, step: int | None = None, *, drop: bool = False, ranks: int = 1) -> list[int]:
    """Channels kept at each FFN level: the full width, then the multiples of ``step`` below it; 0 only with ``drop``.

    Without a step, :func:`default_ffn_step`. All of them divide among ``ranks``: raises ConfigError where the width or the step
    does not.
    """
    step = default_ffn_step(width, ranks) if step is None else step
    if width % ranks:
        raise _indivisible(f"{width} FFN channels", ranks)
    if step % ranks:
        raise ConfigError(f"ffn_step {step} does not divide by tensor_parallel {ranks}; use a multiple of it", param="ffn_step")
    if step >= width and not drop:
        raise ConfigError(f"ffn_step {step} leaves nothing of an FFN of {width} channels; use less than {width}", param="ffn_step")
    return [width, *range((width - 1) // step * step, 0, -step), *([0] if drop else [])]


def default_ffn_step(width: int, ranks: int = 1) -> int:
    """About 1/24 of the width, rounded to a multiple of 8 and of ``ranks``."""
    unit = math.lcm(8, ranks)
    return max(unit, round(width / 24 / unit) * unit)


def attention_shapes(
    kv_groups: int,
    heads_per_group: int,
    mode: Literal["all", "q_head", "kv_group", "none"],
    *,
    drop: bool = False,
    ranks: int = 1,
) -> list[tuple[int, int]]:
    """(KV groups, query heads per group) of every option of ``mode``, dense first. (0, 0) only with ``drop`` and a mode.

    KV heads and query heads of all of them divide among ``ranks``. A model with fewer KV heads than ranks keeps them all, because
    runtimes then give every rank a copy. Raises ConfigError where the model's own heads do not divide.
    """
    groups = range(kv_groups, 0, -1) if mode in ("all", "kv_group") else [kv_groups]
    heads = range(heads_per_group, 0, -1) if mode in ("all", "q_head") else [heads_per_group]
    share = min(ranks, kv_groups)
    shapes = [(g, h) for g in groups for h in heads if g % share == 0 and g * h % ranks == 0]
    if ranks % share or shapes[:1] != [(kv_groups, heads_per_group)]:
        raise _indivisible(f"{kv_groups * heads_per_group} query heads and {kv_groups} KV heads", ranks)
    return shapes + ([(0, 0)] if drop and mode != "none" else [])


def _indivisible(what: str, ranks: int) -> ConfigError:
    return ConfigError(
        f"The model's own {what} do not divide among tensor_parallel {ranks}; use a divisor of them", param="tensor_parallel"
    )


def without_dominated(options: Sequence[Option]) -> tuple[Option, ...]:
    """Options ordered by size, largest first, without those that another option of at most their size beats on error.

    The dense option always stays.
    """
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.parameters, o.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    dense = max(options, key=lambda o: o.parameters)
    if kept[-1].parameters != dense.parameters:
        kept.append(dense)
    return tuple(reversed(kept))


def _dials(space: SearchSpace) -> list[Dial]:
    groups: list[tuple[int, ...]] = [(index,) for index in range(len(space.blocks))]
    if space.granularity == "layer":
        groups = [tuple(i for i, b in enumerate(space.blocks) if b.layer == layer) for layer in range(space.layers)]
    dials = []
    for group in groups:
        chain = _chain([space.blocks[index] for index in group])
        removed = tuple(gone for gone, _ in chain)
        gaps = [after - before for before, after in pairwise(removed)]
        parameters = sum(space.blocks[index].options[0].parameters for index in group)
        dials.append(Dial(group, parameters, removed, tuple(s for _, s in chain), bool(gaps) and max(gaps) <= 2 * space.step))
    return dials


def _chain(blocks: Sequence[Block]) -> list[tuple[int, tuple[int, ...]]]:
    """(removed, levels) in ascending order. For several blocks: the settings in which every coarse block is at the level
    nearest to the joint rate, so that a joint rate determines the setting."""
    if len(blocks) == 1:
        return [(blocks[0].removed(level), (level,)) for level in range(len(blocks[0].options))]
    fine = max(range(len(blocks)), key=lambda i: len(blocks[i].options))
    settings: list[tuple[int, ...]] = [()]
    for block in blocks:
        settings = [(*s, level) for s in settings for level in range(len(block.options))]
    whole = sum(block.options[0].parameters for block in blocks)
    chain: dict[int, tuple[int, ...]] = {}
    for setting in settings:
        gone = sum(block.removed(level) for block, level in zip(blocks, setting, strict=True))
        canonical = all(
            i == fine or _nearest_level(block, gone / whole) == level
            for i, (block, level) in enumerate(zip(blocks, setting, strict=True))
        )
        if canonical:
            chain.setdefault(gone, setting)
    # Everything at its smallest is always reachable, even where one block saturates before the other.
    last = tuple(len(block.options) - 1 for block in blocks)
    chain.setdefault(sum(block.removed(level) for block, level in zip(blocks, last, strict=True)), last)
    return sorted(chain.items())


def _nearest_level(block: Block, rate: float) -> int:
    return min(range(len(block.options)), key=lambda level: (abs(block.rate(level) - rate), level))


def _nearest(dial: Dial, rate: float) -> int:
    return min(range(len(dial.removed)), key=lambda p: (abs(dial.rate(p) - rate), p))


def _floor(dial: Dial, rate: float) -> int:
    """The last position that removes no more than ``rate``, up to rounding (far below one parameter)."""
    return bisect_right(dial.removed, rate * dial.parameters + 1e-4) - 1
