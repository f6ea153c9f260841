"""From scores to masks, True = keep. Ties are broken by position, so equal scores give equal masks on every device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfpruner.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sparsity:
    """How thin a matrix becomes: of every ``group`` consecutive inputs of a row exactly ``kept`` stay; with group 0 a share
    ``share`` of all weights goes, wherever they are."""

    share: float
    kept: int = 0
    group: int = 0

    @classmethod
    def n_m(cls, kept: int, group: int) -> Sparsity:
        """``kept`` of every ``group``: 2:4 is ``n_m(2, 4)``. Raises ConfigError unless 0 <= kept <= group."""
        if group < 1 or not 0 <= kept <= group:
            raise ConfigError(f"{kept}:{group} is no N:M pattern: N must be between 0 and M.", param="group")
        return cls(1 - kept / group, kept, group)

    def pruned(self, numel: int) -> int:
        """Weights that go, of ``numel``."""
        return numel // self.group * (self.group - self.kept) if self.group else int(numel * self.share + 1e-9)


def grouped(scores: Tensor, group: int) -> Tensor:
    """(out, in) as (out, in / group, group). Raises ConfigError where M does not divide the width."""
    if scores.shape[1] % group:
        raise ConfigError(
            f"Groups of {group} do not divide a matrix with {scores.shape[1]} inputs. Choose a divisor of the model's widths.",
            param="group",
        )
    return scores.view(len(scores), scores.shape[1] // group, group)


def keep_n(scores: Tensor, kept: int, group: int) -> Tensor:
    """The ``kept`` highest of every ``group`` consecutive inputs of each row, bool (out, in)."""
    order = torch.argsort(grouped(scores, group), dim=-1, descending=True, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order[..., :kept], True).flatten(1)


def masks_of(scores: Tensor, levels: Sequence[Sparsity], *, by_row: bool) -> Iterator[Tensor]:
    """The mask (out, in) of every level, from one sort. Of equal scores the first ones go."""
    ordered: dict[int, tuple[Tensor, Tensor]] = {}  # by group: the scores where they compete, and in order
    for level in levels:
        if level.group not in ordered:
            field = grouped(scores, level.group) if level.group else scores if by_row else scores.flatten()
            ordered = {level.group: (field, _sorted(field))}
        field, values = ordered[level.group]
        yield _without_lowest(field, values, level.pruned(field.shape[-1])).view(scores.shape)


def _sorted(field: Tensor) -> Tensor:
    """The values in order along the last axis. torch's sort also makes their places, eight bytes each."""
    if field.device.type != "cpu" or field.dtype not in (torch.float32, torch.float64):
        return torch.sort(field, dim=-1).values
    values = field.detach().clone()
    values.numpy().sort(axis=-1)
    return values


def _without_lowest(field: Tensor, ordered: Tensor, count: int) -> Tensor:
    """False at the ``count`` lowest of ``field`` (..., n) along its last axis, of equal ones at the first."""
    if count == 0:
        return torch.ones(field.shape, dtype=torch.bool, device=field.device)
    threshold = ordered[..., count - 1 : count]
    kept, equal = field > threshold, field == threshold
    spare = field.shape[-1] - count - kept.sum(-1, keepdim=True)  # as many of the equal ones stay, the last of them
    if bool(spare.any()):
        equal_after = equal.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
        kept |= equal & (equal_after <= spare)
    return kept
