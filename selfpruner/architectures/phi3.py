"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another; rotary tables that stretch, or cover part of a head."""

from selfpruner.architectures.base import Architecture


class Phi3(Architecture):
    family = "phi3"
