"""A Ray cluster on this machine: a head and, as asked, further nodes, each with a raylet of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers import ROOT


@contextmanager
def cluster(nodes: int = 1, head_cores: int = 1) -> Iterator[Any]:
    """A cluster of ``nodes`` nodes with one core each (the head with ``head_cores``); ``address`` is that of its head."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # what nodes inherit: workers import the tests' handler
    try:
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cores, "include_dashboard": False})
        for _ in range(nodes - 1):
            made.add_node(num_cpus=1)
        try:
            yield made
        finally:
            made.shutdown()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
