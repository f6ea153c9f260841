"""What a model has to compute and to move, so that a speed-up can be compared with its bound. Imports no torch.

Reading a prompt is bound by operations, writing token by token by the bytes that a step reads. What counts:
- operations: two for every weight of a matrix and token that goes through it; for attention's own products (queries by keys,
  probabilities by values) four for every element of a query and position it sees, itself included. The output head counts once per
  prompt, since no runtime here computes logits of more than the last position.
- bytes: every weight once per step, the output head included; and the keys and values of all positions a token sees, once for every
  sequence. An input embedding that is not tied to the head does not count, since one row of it is read.
Left out: norms, activations, rotary embedding, sampling, rows of the embedding, intermediate results. They are the reason why less
than the whole bound is reached.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """One layer's attention: ``width`` of all query heads together, bytes of keys and values per token, positions it sees."""

    width: int
    cache_bytes: int
    window: int | None = None

    def seen(self, position: int) -> int:
        """Positions that the token at ``position`` (from 1) sees, itself included."""
        return position if self.window is None else min(position, self.window)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """One model. ``matrices``: weights of all matrices that every token goes through, ``head``: those of the output head;
    ``weight_bytes`` of the whole model, ``step_bytes`` of those that a decode step reads."""

    parameters: int
    matrices: int
    head: int
    weight_bytes: int
    step_bytes: int
    attention: tuple[AttentionCost, ...]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache per token."""
        return sum(layer.cache_bytes for layer in self.attention)

    def prefill_operations(self, tokens: int) -> int:
        """Operations of reading one prompt."""
        own = sum(4 * layer.width * layer.seen(position) for layer in self.attention for position in range(1, tokens + 1))
        return 2 * tokens * self.matrices + 2 * self.head + own

    def decode_bytes(self, batch: int, prompt: int, new_tokens: int) -> int:
        """Bytes of writing ``new_tokens`` tokens after a prompt, ``batch`` sequences at once."""
        cache = sum(layer.cache_bytes * layer.seen(prompt + step) for layer in self.attention for step in range(1, new_tokens + 1))
        return new_tokens * self.step_bytes + batch * cache


def prefill_bound(dense: ModelCost, other: ModelCost, tokens: int) -> float:
    """How many times faster ``other`` can read a prompt where operations are all that counts."""
    return dense.prefill_operations(tokens) / other.prefill_operations(tokens)


def decode_bound(dense: ModelCost, other: ModelCost, batch: int, prompt: int, new_tokens: int) -> float:
    """How many times faster ``other`` can write where bytes are all that counts."""
    return dense.decode_bytes(batch, prompt, new_tokens) / other.decode_bytes(batch, prompt, new_tokens)
