"""How a plan looks to an LLM: whole percentages, one list per kind of block (or one for the layers), and the way back.

Percentages are short, which small models need, and mean the same at every size. With granularity ``block`` a plan is
``{"attention": [...], "ffn": [...]}``, a kind that cannot be pruned being left out; with ``layer`` it is ``{"rates": [...]}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from selfpruner.proposers.channel import explain
from selfpruner.space import SearchSpace


class Answer(BaseModel):
    """A reply: what else it holds is ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Plans(Answer):
    plans: list[dict[str, Any]] = Field(min_length=1)


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
        rate = Annotated[float, Field(ge=0, le=self.most)]
        fields: dict[str, Any] = {
            key: (Annotated[list[rate], Field(min_length=len(ix), max_length=len(ix))], ...) for key, ix in self._dials.items()
        }
        self._model: type[Answer] = create_model("PlanAnswer", __base__=Answer, **fields)

    def schema(self, count: int) -> dict[str, Any]:
        """JSON schema of ``{"plans": [...]}`` with ``count`` plans."""
        lists = {
            key: {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": self.most},
                "minItems": len(indices),
                "maxItems": len(indices),
            }
            for key, indices in self._dials.items()
        }
        return closed({"plans": {"type": "array", "items": closed(lists), "minItems": count, "maxItems": count}})

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


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema object with exactly ``properties``, as strict structured output demands."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
