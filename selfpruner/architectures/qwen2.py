"""Qwen2 and Qwen2.5: biases on q, k and v; the sliding window applies to the layers its config lists."""

from selfpruner.architectures.base import Architecture


class Qwen2(Architecture):
    family = "qwen2"
