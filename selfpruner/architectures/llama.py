"""Llama 1 to 3 and everything saved in the same layout (SmolLM2, TinyLlama, Yi): no q/k norms, optional biases, full attention."""

from selfpruner.architectures.base import Architecture


class Llama(Architecture):
    family = "llama"

    def window(self, layer: int) -> int | None:  # noqa: ARG002 - Llama has none, whatever its config says
        return None
