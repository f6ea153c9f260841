"""2:4 weights as PyTorch's semi-structured tensors: half the bytes, and matrix products that skip the zeros, on GPUs that can.

    model = selfpruner.load("runs/nm/checkpoint", device="cuda", dtype=torch.bfloat16)
    convert(model)

A checkpoint of the pattern n_m is dense with zeros and loads everywhere as it is; this makes use of the zeros, in memory only. A
search chooses N of every M per block, and blocks that keep more than two of four stay as they are. Products over many tokens at
once can gain from it; a single token's can lose. Source: PyTorch, ``torch.sparse.to_sparse_semi_structured``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selfpruner.errors import FormatError

CAPABILITY = (8, 0)  # Ampere's sparse tensor cores, and later ones
DTYPES = (torch.float16, torch.bfloat16)
# Rows and columns must be multiples of these, for both of PyTorch's backends.
ROWS, COLUMNS = 32, 64


def is_two_of_four(W: Tensor) -> bool:
    """Whether of every four consecutive inputs of an output, (out, in), at most two are not zero."""
    out, width = W.shape
    return width % 4 == 0 and bool(((W.reshape(out, width // 4, 4) != 0).sum(-1) <= 2).all())


def convert(model: nn.Module) -> list[str]:
    """Replace the weights of the linear layers that are 2:4 by semi-structured ones, in place, and return their names.

    Raises FormatError, and changes nothing, where the model is not on a GPU of compute capability 8.0 or later, is not in float16
    or bfloat16, or has no such weights.
    """
    weights = {name: module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
    for device in sorted({str(weight.device) for weight in weights.values()}):
        _check(torch.device(device))
    dtypes = {weight.dtype for weight in weights.values()}
    if not dtypes <= set(DTYPES):
        types = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise FormatError(
            f"Semi-structured weights are float16 or bfloat16, and the model's are {types}. Load it with dtype=torch.bfloat16."
        )
    chosen = {
        name
        for name, weight in weights.items()
        if weight.shape[0] % ROWS == 0 and weight.shape[1] % COLUMNS == 0 and is_two_of_four(weight.detach())
    }
    if not chosen:
        raise FormatError(
            "No linear layer has weights of which at most two of every four are left. A search with pattern n_m, group 4 and rate "
            "0.5 keeps two of four in its uniform plan."
        )
    for name in sorted(chosen):
        sparse = torch.sparse.to_sparse_semi_structured(weights[name].detach().contiguous())
        model.get_submodule(name).weight = nn.Parameter(sparse, requires_grad=False)
    return sorted(chosen)


def _check(device: torch.device) -> None:
    if device.type != "cuda":
        raise FormatError(
            f"Semi-structured weights need an NVIDIA GPU, and the model is on {device}. The checkpoint works as it is."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise FormatError(
            f"Semi-structured weights need a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or later, and {device} has "
            f"{capability[0]}.{capability[1]}. The checkpoint works as it is."
        )
