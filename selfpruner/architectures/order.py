"""The order of a model's FFN channels: sorted by importance, so that a level is a prefix, and restored."""

from __future__ import annotations

import torch
from torch import Tensor

from selfpruner.architectures.base import Architecture
from selfpruner.architectures.weights import FfnWeights


def channel_order(arch: Architecture, layer: int) -> Tensor | None:
    """(F,): the checkpoint's channel at each place of the layer's FFN; None while they are in the checkpoint's order.

    It is a buffer of the output matrix's module, so that it stays with the weights, whoever describes the model next.
    """
    return getattr(arch.module(layer, "down"), "channel_order", None)


def reorder_channels(arch: Architecture, layer: int, order: Tensor | None) -> None:
    """Put the layer's FFN channels, in place, into the order of the checkpoint's channels ``order`` (F,); None restores the
    checkpoint's own. The layer goes on computing the same function."""
    current = channel_order(arch, layer)
    if current is order:
        return
    if current is None or order is None or not torch.equal(current, order):
        if arch.stream is not None:
            arch.stream.drop(layer)  # its matrices come in the new order next time; only biases are in memory
        target = torch.arange(arch.channels, device=arch.device) if order is None else order
        places = target if current is None else torch.argsort(current)[target]
        own = arch.present_ffn(layer)
        axes = ((own.gate, 0), (own.up, 0), (own.down, 1), (own.gate_bias, 0), (own.up_bias, 0))
        here = [(tensor, axis) for tensor, axis in axes if tensor is not None and not tensor.is_meta]
        # Make everything first: if memory runs out here, the layer is still as it was.
        new = [tensor.index_select(axis, places) for tensor, axis in here]
        for (tensor, _), moved in zip(here, new, strict=True):
            tensor.copy_(moved)
    arch.module(layer, "down").register_buffer("channel_order", order, persistent=False)


def checkpoint_ffn(arch: Architecture, layer: int) -> FfnWeights:
    """The layer's FFN with its channels in the checkpoint's order: the model's own weights, or a copy where they moved."""
    order = channel_order(arch, layer)
    return arch.ffn(layer) if order is None else arch.ffn(layer).in_order(torch.argsort(order))


def restore_channels(arch: Architecture) -> None:
    """Put the channels of every layer back into the checkpoint's order."""
    for layer in range(arch.layers):
        reorder_channels(arch, layer, None)
