"""What a model card says beyond what the model shows. Imports no torch; it goes to a worker as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class CardInfo:
    """What the export cannot see in the model. A job says most of it, its worker the rest: ``terms``, ``nonzeros``, ``made_from``.

    ``base_model`` is the name by which it was loaded; only the last part of a path is ever written. ``rate`` is removed /
    original parameters of ``of``, None where what was done to the model is not known; ``layer_rates`` the same per layer.
    ``metrics`` maps a name ("dense", "pruned", "uniform") to its numbers ({"perplexity": 37.1}); the card shows them as one table.
    ``nonzeros`` counts the model's parameters without those that the pattern made zero, where shapes stay as they are. ``terms``
    are what the front matter says of the base model (base_model on the hub, license, license_name, license_link, language), see
    :func:`selfpruner.export.card.with_terms`. ``made_from`` identifies the content of what it was made from.
    """

    base_model: str
    rate: float | None
    of: str = "decoder"
    pattern: str = "structured"
    criterion: str = ""
    compensation: str = ""
    calibration: tuple[str, ...] = ()
    plan_hash: str = ""
    levels: tuple[int, ...] = ()
    layer_rates: tuple[float, ...] = ()
    metrics: Mapping[str, Mapping[str, int | float]] = field(default_factory=dict)
    job_id: str | None = None
    terms: Mapping[str, object] = field(default_factory=dict)
    nonzeros: int | None = None
    made_from: Mapping[str, str] = field(default_factory=dict)
