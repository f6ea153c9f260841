"""Mistral: Llama's layout with one sliding window over all layers (v0.1; null since v0.2)."""

from selfpruner.architectures.base import Architecture


class Mistral(Architecture):
    family = "mistral"
