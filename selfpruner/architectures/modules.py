"""What is asked of the modules of a model of transformers, which has no types for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Submodule(Protocol):
    """A matrix or a norm of a layer; ``eps`` is a norm's, ``in_features`` a matrix's."""

    weight: Tensor
    bias: Tensor | None
    in_features: int
    eps: float

    def parameters(self) -> Iterator[Tensor]: ...

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None: ...


class Embedding(Protocol):
    """``offset`` is that of learned positions."""

    weight: Tensor
    offset: int

    def __call__(self, tokens: Tensor) -> Tensor: ...


class Attention(Protocol):
    head_dim: int


class Layer(Protocol):
    self_attn: Attention

    def get_submodule(self, target: str) -> Submodule: ...


class Layers(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, layer: int) -> Layer: ...

    def parameters(self) -> Iterator[Tensor]: ...


class Decoder(Protocol):
    """``embed_positions`` where they are learned, else ``rotary_emb``, with the ``kind`` of layer where there are several."""

    layers: Layers
    embed_tokens: Embedding
    embed_positions: Embedding

    def rotary_emb(self, x: Tensor, positions: Tensor, kind: str = ...) -> tuple[Tensor, Tensor]: ...

    def get_submodule(self, target: str) -> Submodule: ...
