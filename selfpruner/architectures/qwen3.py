"""Qwen3: RMS norms on q and k, one weight for all heads; head_dim is independent of the hidden size."""

from selfpruner.architectures.base import Architecture


class Qwen3(Architecture):
    family = "qwen3"
