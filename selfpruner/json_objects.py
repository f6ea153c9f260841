"""JSON from outside: a model's config.json, a tokenizer, an HTTP reply, a stored report of any version.

Its values are whatever the other side wrote, and who reads one knows which fields it has. What this version makes itself has a type
of its own: tasks and results (``workers.tasks``), manifest and plan.json (``files.manifest``), signals (``planning.signals``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]
JsonMapping = Mapping[str, Any]
