"""Tiny models prepared for pruning, and the same pruning done a second time by hooks on the transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner.compensation.least_squares import FLOOR, RIDGE
from selfpruner.planning.space import Plan, SearchSpace
from selfpruner.pruning.patterns import PrunableFfn
from selfpruner.testing.prepared_models import Ready
from selfpruner.testing.tiny_models import layers_of, outputs_of

torch.set_num_threads(1)


def random_plans(space: SearchSpace, count: int, seed: int = 0) -> list[Plan]:
    """Any legal plans, whatever they remove."""
    g = torch.Generator().manual_seed(seed)
    sizes = [len(block.options) for block in space.blocks]
    return [Plan(tuple(int(torch.randint(size, (1,), generator=g)) for size in sizes)) for _ in range(count)]


def inputs_of(model: PreTrainedModel, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per layer the inputs (sequences, length, n) of the output matrices, seen by hooks on the model's own modules."""
    seen: dict[tuple[int, int], Tensor] = {}
    handles = []
    for index in range(len(layers_of(model))):
        for which, module in enumerate(outputs_of(model, index)):

            def keep(_: Any, args: Any, place: tuple[int, int] = (index, which)) -> None:
                seen[place] = args[0].detach().double().view(*tokens.shape, -1)  # OPT's FFN sees all tokens in a row

            handles.append(module.register_forward_pre_hook(keep))
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [(seen[index, 0], seen[index, 1]) for index in range(len(layers_of(model)))]


def kept_columns(case: Ready, plan: Plan, block: int) -> list[int]:
    """The columns of an output matrix that ``plan`` keeps, in the model's order."""
    prunable, level = case.blocks[block], plan.levels[block]
    if isinstance(prunable, PrunableFfn):
        return list(range(prunable.options[level].channels))  # the model's channels are in keep-first order
    heads = prunable.heads[level]
    return [head * case.arch.head_dim + i for head in heads for i in range(case.arch.head_dim)]


def repaired(W: Tensor, X: Tensor, kept: Sequence[int], method: str) -> tuple[Tensor, Tensor]:
    """A full-width output matrix with zeros where columns are gone, and its bias, solved from inputs X (tokens, n)."""
    gone = [j for j in range(W.shape[1]) if j not in set(kept)]
    mean = X.mean(0)
    new = torch.zeros_like(W)
    new[:, kept] = W[:, kept]
    if not gone or method == "none":
        return new, W.new_zeros(W.shape[0])
    if method == "least_squares_weights":
        mean = torch.zeros_like(mean)  # nothing takes it
    if method.startswith("least_squares"):
        centred = X - mean
        scatter = centred.pow(2).sum(0)
        ridge = (RIDGE * scatter + FLOOR * scatter.mean())[kept]
        A = centred[:, kept].T @ centred[:, kept] + torch.diag(ridge)
        target = centred[:, kept].T @ (centred @ W.T) + ridge[:, None] * W[:, kept].T
        new[:, kept] = torch.linalg.solve(A, target).T
    return new, (W - new) @ mean


def _replacing(W: Tensor, bias: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    def hook(_module: Any, args: Any, _out: Tensor) -> Tensor:
        return args[0] @ W.T + bias

    return hook


@contextmanager
def masked(case: Ready, plan: Plan) -> Iterator[PreTrainedModel]:
    """The dense model with pruned units silenced and repaired: full-width matrices, nothing of the engine or the patterns."""
    X = inputs_of(case.model, case.calibration)
    handles = []
    for index in range(case.arch.layers):
        for which, module in enumerate(outputs_of(case.model, index)):
            block = 2 * index + which
            if plan.levels[block] == 0:
                continue
            kept = kept_columns(case, plan, block)
            if kept:
                W, bias = repaired(module.weight.double(), X[index][which].flatten(0, 1), kept, case.compensation)
                bias = bias if module.bias is None else bias + module.bias
            else:
                W, bias = torch.zeros_like(module.weight), torch.zeros(module.out_features)
            handles.append(module.register_forward_hook(_replacing(W.float(), bias.float())))
    try:
        yield case.model
    finally:
        for handle in handles:
            handle.remove()


def naive(case: Ready, plan: Plan, tokens: Tensor) -> tuple[float, float]:
    """(KL, negative log-likelihood) per token from the full logits of the dense and the masked model."""
    dense = case.model(tokens, use_cache=False).logits.double().log_softmax(-1)
    with masked(case, plan) as model:
        out = model(tokens, use_cache=False, labels=tokens)
    pruned = out.logits.double().log_softmax(-1)
    return float((dense.exp() * (dense - pruned)).sum(-1).mean()), float(out.loss)
