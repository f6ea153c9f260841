"""How a plan looks to an LLM: whole percentages, one list per kind of block (or one for the layers), and the way back.

Percentages are short, which small models need, and mean the same at every size. With granularity ``block`` a plan is
``{"attention": [...], "ffn": [...]}`` without a kind that cannot be pruned; with ``layer`` it is ``{"rates": [...]}``.

Remarks on single blocks, and the answer to a mutation, name them: a block and a layer, counted from 1. A model copies a list of
sixty numbers reliably but is bad at finding the 37th; and a few named changes take a tenth of the tokens of a list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, create_model

from selfpruner.planning.space import SearchSpace
from selfpruner.proposers.llm_calls import explain


class Answer(BaseModel):
    """A reply: what else it holds is ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Change(Answer):
    """One block's new rate in percent. ``block`` is left out where a plan has one list."""

    layer: int
    rate: float
    block: str = ""


class Plans(Answer):
    plans: list[dict[str, object]] = Field(min_length=1)


class Changes(Answer):
    changes: list[Change] = Field(min_length=1)


MOST_CHANGES = 6


class PlanFormat:
    """The format for one search space."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        by_key: dict[str, list[int]] = {}
        for index, dial in enumerate(space.dials):
            by_key.setdefault("rates" if space.granularity == "layer" else space.blocks[dial.blocks[0]].kind, []).append(index)
        self._dials = {
            key: indices for key, indices in by_key.items() if any(len(space.dials[index].removed) > 1 for index in indices)
        }
        self.keys = list(self._dials)
        listed = [space.dials[index] for indices in self._dials.values() for index in indices]
        self.most = math.ceil(100 * max(dial.rate(-1) for dial in listed) - 1e-9)
        self._whole = sum(dial.parameters for dial in listed)
        self.target = 100 * space.target / self._whole
        ffn = sum(space.dials[index].parameters for index in self._dials.get("ffn", ()))
        self.ffn_weight = round(100 * ffn / self._whole)
        # The dial that a block and a layer name, and back. Layers count from 1.
        self._named = {
            (key, space.blocks[space.dials[index].blocks[0]].layer + 1): index for key, ix in self._dials.items() for index in ix
        }
        self._names = {index: (key, layer) for (key, layer), index in self._named.items()}
        self._dial_of = {block: index for index in self._names for block in space.dials[index].blocks}
        rate = Annotated[float, Field(ge=0, le=self.most)]
        fields: dict[str, Any] = {
            key: (Annotated[list[rate], Field(min_length=len(ix), max_length=len(ix))], ...) for key, ix in self._dials.items()
        }
        self._model: type[Answer] = create_model("PlanAnswer", __base__=Answer, **fields)

    def schema(self, count: int) -> dict[str, JsonValue]:
        """JSON schema of ``{"plans": [...]}`` with ``count`` plans."""
        lists: dict[str, JsonValue] = {
            key: {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": self.most},
                "minItems": len(indices),
                "maxItems": len(indices),
            }
            for key, indices in self._dials.items()
        }
        return closed({"plans": {"type": "array", "items": closed(lists), "minItems": count, "maxItems": count}})

    def schema_of_changes(self, count: int) -> dict[str, JsonValue]:
        """JSON schema of ``{"plans": [...]}`` with ``count`` plans, each a few changes of its parent."""
        change: dict[str, JsonValue] = {"layer": {"type": "integer", "minimum": 1, "maximum": self.space.layers}}
        if len(self.keys) > 1:
            change["block"] = {"type": "string", "enum": [*self.keys]}
        change["rate"] = {"type": "integer", "minimum": 0, "maximum": self.most}
        most = min(MOST_CHANGES, len(self._named))
        changes: JsonValue = {"type": "array", "items": closed(change), "minItems": min(2, most), "maxItems": most}
        plan = closed({"changes": changes})
        return closed({"plans": {"type": "array", "items": plan, "minItems": count, "maxItems": count}})

    def changes(self, plan: object) -> dict[int, float]:
        """New rate by dial from the changes of one answered plan. Raises ValueError saying what does not fit."""
        try:
            changes = Changes.model_validate(plan).changes
        except ValidationError as error:
            raise ValueError(explain(error)) from None
        rates = {}
        for number, change in enumerate(changes):
            key = change.block if len(self.keys) > 1 else self.keys[0]
            index = self._named.get((key, change.layer))
            if index is None:
                blocks = f" and block one of {', '.join(self.keys)}" if len(self.keys) > 1 else ""
                raise ValueError(f"changes.{number}: layer must be from 1 to {self.space.layers}{blocks}")
            if not 0 <= change.rate <= self.most:
                raise ValueError(f"changes.{number}.rate: must be from 0 to {self.most}")
            rates[index] = change.rate / 100
        return rates

    def read(self, plan: object) -> list[float]:
        """One rate per dial from one answered plan. Raises ValueError saying what does not fit."""
        try:
            answer = self._model.model_validate(plan)
        except ValidationError as error:
            raise ValueError(explain(error)) from None
        rates = [0.0] * len(self.space.dials)
        for key, indices in self._dials.items():
            for index, percent in zip(indices, getattr(answer, key), strict=True):
                rates[index] = percent / 100
        return rates

    def average(self, rates: Sequence[float]) -> float:
        """The average of ``rates`` in percent, dials weighted by their parameters."""
        return 100 * sum(r * d.parameters for r, d in zip(rates, self.space.dials, strict=True)) / self._whole

    def balanced(self, parent: Sequence[float], changes: Mapping[int, float]) -> list[float]:
        """``parent`` (one rate per dial) with ``changes`` at their nearest settings, and the other dials shifted by one common
        amount so that the target is met. The projection alone would undo the very changes that do not balance each other."""
        dials = self.space.dials
        rates = list(parent)
        for index, rate in changes.items():
            dial = dials[index]
            rates[index] = min((dial.rate(p) for p in range(len(dial.removed))), key=lambda setting: (abs(setting - rate), setting))

        def shifted(by: float) -> list[float]:
            return [
                rate if index in changes else min(max(rate + by, 0.0), dial.rate(-1))
                for index, (rate, dial) in enumerate(zip(rates, dials, strict=True))
            ]

        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            removed = sum(rate * dial.parameters for rate, dial in zip(shifted(middle), dials, strict=True))
            low, high = (middle, high) if removed <= self.space.target else (low, middle)
        # From below: the projection then has something to add, and takes nothing from a rate that is exactly a setting.
        return shifted(low)

    def near_target(self, rates: Sequence[float]) -> list[float]:
        """``rates`` scaled down to the target where they ask for more: a layer at 0 stays at 0, and proportions stay.

        The projection alone would shift them by a common amount; it still does what is left, and all that raises rates.
        """
        factor = min(1.0, self.target / max(self.average(rates), 1e-9))
        return [rate * factor for rate in rates]

    def write(self, rates: Sequence[float]) -> str:
        """One rate per dial as the JSON text of a plan."""
        return json.dumps(
            {key: [round(100 * rates[index]) for index in indices] for key, indices in self._dials.items()}, separators=(",", ":")
        )

    def name(self, dial: int) -> str:
        """A dial in words: ``ffn 4``, or ``layer 4`` where a plan has one list of rates."""
        key, layer = self._names[dial]
        return f"{'layer' if key == 'rates' else key} {layer}"

    def dial_of(self, block: int) -> int | None:
        """The dial that turns ``block``; None where it cannot be pruned."""
        return self._dial_of.get(block)

    def differences(self, before: Sequence[float], after: Sequence[float]) -> list[int]:
        """The dials whose whole percentages differ, most parameters moved first."""
        changed = [i for i in self._names if round(100 * before[i]) != round(100 * after[i])]
        return sorted(changed, key=lambda i: -abs(after[i] - before[i]) * self.space.dials[i].parameters)

    def tell(self, before: Sequence[float], after: Sequence[float], dials: Sequence[int]) -> str:
        """What changes in ``dials``, such as ``attention 7: 33->0; ffn 3: 12->20, 9: 25->21``."""
        by_key: dict[str, list[str]] = {}
        for i in sorted(dials, key=lambda i: self._names[i][1]):
            key, layer = self._names[i]
            by_key.setdefault(key, []).append(f"{layer}: {100 * before[i]:.0f}->{100 * after[i]:.0f}")
        titles = {key: "layer" if key == "rates" else key for key in self.keys}
        return "; ".join(f"{titles[key]} {', '.join(by_key[key])}" for key in self.keys if key in by_key)

    def steps(self) -> str:
        """About how many percentage points one setting of each kind is apart, such as ``11 (attention), 4 (ffn)``."""
        sizes = {}
        for key, indices in self._dials.items():
            positions = [map(self.space.dials[index].rate, range(len(self.space.dials[index].removed))) for index in indices]
            sizes[key] = max(1, round(100 * median(after - before for rates in positions for before, after in pairwise(rates))))
        return ", ".join(f"{size}" if key == "rates" else f"{size} ({key})" for key, size in sizes.items())

    def example_of_changes(self, count: int) -> str:
        """A correct answer for a model of four layers: ``count`` plans that each take from one layer and give to another."""
        target, two = round(self.target), len(self.keys) > 1
        key = {"block": self.keys[-1]} if two else {}
        plans = [
            {"changes": [{"layer": 2 + n, **key, "rate": max(target - 5, 0)}, {"layer": 4 - 3 * n, **key, "rate": target + 5}]}
            for n in range(count)
        ]
        return json.dumps({"plans": plans}, separators=(",", ":"))

    def example(self, count: int) -> str:
        """A correct answer for a model of four layers: ``count`` plans, unlike each other, of the right average."""
        target = round(self.target)
        swings = [min(5, target) * (-1) ** number for number in range(count)]
        lists = [[target - swing, target + swing, target, target] for swing in swings]
        return json.dumps({"plans": [dict.fromkeys(self.keys, rates) for rates in lists]}, separators=(",", ":"))

    def sensitivities(self, per_block: Sequence[float], probe_levels: Sequence[int]) -> str:
        """Loss per removed parameter of each dial's probe, 100 = average, as a plan's JSON text; empty before probing."""
        if not per_block:
            return ""
        blocks = self.space.blocks
        gone = (
            [block.removed(level) for block, level in zip(blocks, probe_levels, strict=True)] if probe_levels else [1] * len(blocks)
        )
        values = []
        for dial in self.space.dials:
            removed = sum(gone[index] for index in dial.blocks)
            values.append(sum(max(per_block[index], 0.0) for index in dial.blocks) / removed if removed else 0.0)
        measured = [value for value in values if value > 0]
        average = sum(measured) / len(measured) if measured else 1.0
        return self.write([value / average for value in values])


def closed(properties: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """A JSON schema object with exactly ``properties``, as strict structured output demands."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
