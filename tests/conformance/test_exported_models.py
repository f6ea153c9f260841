"""Every form that an exported model comes in, in transformers."""

from __future__ import annotations

from typing import ClassVar

import selfpruner.export  # noqa: F401 - registers the classes
from selfpruner.testing import ExportedModelSuite


class TestLlama(ExportedModelSuite):
    family = "llama"
    biased = True


class TestUntiedLlamaWithBiases(ExportedModelSuite):
    family = "llama"
    options: ClassVar = {"attention_bias": True, "mlp_bias": True}
    drop = True
    tied = False


class TestMistral(ExportedModelSuite):
    family = "mistral"
    drop = True
    biased = True


class TestMistralWithWindow(ExportedModelSuite):
    family = "mistral"
    options: ClassVar = {"sliding_window": 6}
    biased = True
    tied = False


class TestQwen2(ExportedModelSuite):
    family = "qwen2"
    drop = True
    biased = True


class TestQwen2WithWindowInSomeLayers(ExportedModelSuite):
    family = "qwen2"
    options: ClassVar = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    biased = True
    tied = False


class TestQwen3(ExportedModelSuite):
    family = "qwen3"
    drop = True
    biased = True


class TestQwen3WithBiasesAndWindow(ExportedModelSuite):
    family = "qwen3"
    options: ClassVar = {"attention_bias": True, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    tied = False
