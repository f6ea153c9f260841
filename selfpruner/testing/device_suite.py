"""What all suites with tensors have in common: they run on any device, see :mod:`selfpruner.testing.device`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from selfpruner.testing.device import tensors_of_tests


class DeviceSuite:
    """Subclass it where tests make tensors."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def on_device(cls) -> Iterator[None]:
        with tensors_of_tests():
            yield
