"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another; the rotary table may cover a part of a head, and stretch."""

from selfpruner.architectures.base import Architecture


class Phi3(Architecture):
    family = "phi3"
