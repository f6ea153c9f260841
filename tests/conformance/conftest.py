"""Tests outside the suites run on the same device as these."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from selfpruner.testing.device import tensors_of_tests


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """A suite's own is for its whole class."""
    if request.cls is not None:
        yield
    else:
        with tensors_of_tests():
            yield
