"""Gradient statistics of the dense model, streamed layer by layer, from the last to the first.

On the way forward the residual stream of all sequences is kept only before every few layers: about the square root of their number,
so about twice that many streams exist at a time, in memory or in a file under ``scratch``. On the way back the layers between two
kept streams run again, and the gradients of one layer's matrices are taken sequence by sequence and summed. Beyond the model,
memory holds one layer's sums, however deep the model is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selfpruner.architectures import Architecture, AttentionWeights, FfnWeights, in_float32, with_tensors
from selfpruner.architectures.cost import model_parameters
from selfpruner.architectures.kernels import soft_cap
from selfpruner.architectures.order import checkpoint_ffn
from selfpruner.calibration.statistics import Stream, stream_file
from selfpruner.errors import CancelledTaskError, ConfigError, disk_errors

# Bytes that logits and the tensors made from them may take at a time.
LOGIT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Gradients:
    """Sums over ``sequences`` of the gradients g of a matrix (out, in), g that of one sequence's mean next-token loss in nats:
    ``total`` of g, ``absolute`` of |g|, ``squared`` of g^2. float32, or what they were stored in."""

    total: Tensor
    absolute: Tensor
    squared: Tensor
    sequences: int

    @property
    def mean(self) -> Tensor:
        """The gradient of the mean loss over the sequences."""
        return self.total / self.sequences

    @property
    def fisher(self) -> Tensor:
        """The mean of g^2: the diagonal of the empirical Fisher matrix."""
        return self.squared / self.sequences

    @property
    def finite(self) -> Tensor:
        """Whether all sums are numbers, (): a g that is not makes |g| so."""
        return self.absolute.isfinite().all() & self.squared.isfinite().all()


def layer_gradients(
    arch: Architecture,
    tokens: Tensor,
    *,
    memory: int | None = None,
    scratch: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, dict[str, Gradients]]]:
    """Yield (layer, gradients by matrix name) from the last layer to the first for token ids (sequences, length).

    Channels are in the checkpoint's order. Where the streams take more than an eighth of ``memory`` (bytes; of the model, where
    that is less) they go to files in ``scratch``. Raises ConfigError for weights that have no gradient (integers, a model streamed
    from its files whose head is never whole) and for sequences without a next token; CancelledTaskError between layers.
    """
    if not arch.dtype.is_floating_point or arch.dtype.itemsize < 2:
        raise ConfigError(f"Weights of type {arch.dtype} have no gradients. Load the model in bfloat16 or float32.", param="dtype")
    if arch.head_pieces() is not None:
        raise ConfigError("Gradients need the model's head in memory; this model is streamed from its files.", param="memory")
    if tokens.shape[1] < 2:
        raise ConfigError("Gradients need sequences of two tokens at least.", param="calibration")
    stride = math.isqrt(arch.layers - 1) + 1
    size = tokens.numel() * arch.hidden * 4 * 2 * stride
    most = min(memory or 1 << 60, model_parameters(arch) * arch.dtype.itemsize)
    rope = arch.rope(tokens.shape[1])

    def blocks(layer: int) -> tuple[AttentionWeights, FfnWeights]:
        pair = arch.attention(layer), checkpoint_ffn(arch, layer)
        # Gradients of a small loss fall below what float16 can say.
        return (in_float32(pair[0]), in_float32(pair[1])) if arch.dtype == torch.float16 else pair

    def advance(layer: int, source: Stream, target: Stream) -> None:
        if cancelled():
            raise CancelledTaskError("Cancelled while collecting gradients.")
        a, f = blocks(layer)
        for index in range(source.parts):
            x = source.take(index, arch.device)
            x = arch.feed_forward(layer, arch.attend(layer, x, a, rope), f)
            _keep(target, index, x)

    with ExitStack() as stack, disk_errors(scratch or ""):

        def stream() -> Stream:
            return Stream(stack.enter_context(stream_file(size, most, scratch)))

        with torch.no_grad():
            kept = [stream() for _ in range(0, arch.layers, stride)]
            for index, part in enumerate(tokens.split(1)):
                _keep(kept[0], index, arch.embed(part.to(arch.device)))
            between = [stream() for _ in range(stride)]
            for layer in range(arch.layers):
                last = layer + 1 == arch.layers
                source = kept[layer // stride] if layer % stride == 0 else between[0]
                ends = (layer + 1) % stride == 0 and not last
                advance(layer, source, kept[(layer + 1) // stride] if ends else between[0])
                progress(f"forward pass for gradients, layer {layer + 1}/{arch.layers}")
        gradient = stream()
        for index, part in enumerate(tokens.split(1)):
            _keep(gradient, index, _loss_gradient(arch, between[0].take(index, arch.device), part[0].to(arch.device)))
        for start in reversed(range(0, arch.layers, stride)):
            stop = min(start + stride, arch.layers)
            inputs = [kept[start // stride], *between[1 : stop - start]]
            with torch.no_grad():
                for layer in range(start, stop - 1):
                    advance(layer, inputs[layer - start], inputs[layer - start + 1])
            for layer in reversed(range(start, stop)):
                if cancelled():
                    raise CancelledTaskError("Cancelled while collecting gradients.")
                yield layer, _layer(arch, layer, blocks(layer), inputs[layer - start], gradient, rope)
                progress(f"gradients of layer {layer + 1}/{arch.layers}")


def _keep(stream: Stream, index: int, part: Tensor) -> None:
    if index < stream.parts:
        stream.put(index, part)
    else:
        stream.add(part)


def _layer(
    arch: Architecture,
    layer: int,
    weights: tuple[AttentionWeights, FfnWeights],
    inputs: Stream,
    gradient: Stream,
    rope: tuple[Tensor, Tensor],
) -> dict[str, Gradients]:
    """The sums of one layer; ``gradient``, of its outputs, becomes that of its inputs."""
    leaves: dict[str, Tensor] = {
        name: getattr(block, name).detach().requires_grad_() for block in weights for name in block.matrices
    }
    attention = with_tensors(weights[0], {name: leaves[name] for name in weights[0].matrices})
    ffn = with_tensors(weights[1], {name: leaves[name] for name in weights[1].matrices})
    sums = {name: [torch.zeros(leaf.shape, device=leaf.device) for _ in range(3)] for name, leaf in leaves.items()}
    for index in range(inputs.parts):
        with torch.enable_grad():
            x = inputs.take(index, arch.device).clone().requires_grad_()
            y = arch.feed_forward(layer, arch.attend(layer, x, attention, rope), ffn)
        above = gradient.take(index, arch.device)
        below, *own = torch.autograd.grad(y, [x, *leaves.values()], above)
        gradient.put(index, below)
        for (total, absolute, squared), g in zip(sums.values(), own, strict=True):
            g = g.float()
            total += g
            absolute += g.abs()
            squared.addcmul_(g, g)
        del own, y
    return {name: Gradients(total, absolute, squared, inputs.parts) for name, (total, absolute, squared) in sums.items()}


def _loss_gradient(arch: Architecture, final: Tensor, tokens: Tensor) -> Tensor:
    """The gradient (1, S, d) of the mean next-token loss of ``tokens`` (S,) with respect to the final residual stream (1, S, d)."""
    with torch.enable_grad():
        final = final.detach().requires_grad_()
        state = arch.final_norm(final)
    flat, head = state.detach()[0, :-1], arch.head_weight
    target = tokens[1:]
    gradient = torch.zeros_like(state[0])
    chunk = max(16, LOGIT_BYTES // (8 * head.shape[0]))
    for start in range(0, len(flat), chunk):
        rows = slice(start, start + chunk)
        z = soft_cap(torch.nn.functional.linear(flat[rows].to(head.dtype), head).float(), arch.cap)
        p = z.softmax(-1)
        p[torch.arange(len(p), device=p.device), target[rows]] -= 1
        if arch.cap is not None:
            p *= 1 - (z / arch.cap).square_()
        gradient[:-1][rows] = (p / len(flat)).to(head.dtype) @ head
    return torch.autograd.grad(state, final, gradient[None].to(state.dtype))[0].float()
