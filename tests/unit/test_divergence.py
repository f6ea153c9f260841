"""Divergences on chosen tokens are near the exact ones, which are those of plain log-softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from selfpruner.architectures.kernels import soft_cap, soft_cap_change
from selfpruner.errors import CancelledTaskError
from selfpruner.evaluation import divergence
from selfpruner.evaluation.divergence import EXACT, SAMPLED, Divergences, choose, divergences
from selfpruner.evaluation.pieces import divergences_in_pieces

VOCABULARY, WIDTH = 8192, 24
CAPS = [None, 12.0]


def norm(x: Tensor) -> Tensor:
    return x * 1.5


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Head (V, d), dense stream (B, S, d), streams at several distances from it, and tokens (B, S)."""
    g = torch.Generator().manual_seed(0)
    head = torch.randn(VOCABULARY, WIDTH, generator=g) * 0.5
    dense = torch.randn(8, 32, WIDTH, generator=g)
    common = torch.randn(8, 32, WIDTH, generator=g)
    finals = [dense + size * (common + 0.3 * torch.randn(8, 32, WIDTH, generator=g)) for size in (0.02, 0.1, 0.2, 0.4)]
    return head, dense, finals, torch.randint(0, VOCABULARY, (8, 32), generator=g)


def plain(head: Tensor, dense: Tensor, finals: list[Tensor], tokens: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """(models, B, S) KL and NLL from log-probabilities in float64."""

    def said(stream: Tensor) -> Tensor:
        logits = norm(stream).double() @ head.double().T
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    p = said(dense)
    kl, nll = [], []
    for final in finals:
        q = said(final)
        kl.append((p.exp() * (p - q)).sum(-1))
        loss = torch.zeros(tokens.shape, dtype=torch.float64)
        loss[:, :-1] = -q[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
        nll.append(loss)
    return torch.stack(kl), torch.stack(nll)


@pytest.mark.parametrize("cap", CAPS)
def test_exact_is_exact(problem: tuple[Tensor, Tensor, list[Tensor], Tensor], cap: float | None) -> None:
    found = divergences(problem[0], norm, *problem[1:], exact=True, cap=cap)
    kl, nll = plain(*problem, cap)
    torch.testing.assert_close(found.kl.double(), kl, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found.nll.double(), nll, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_it_makes_no_difference_which_sequences_are_compared_together(
    problem: tuple[Tensor, Tensor, list[Tensor], Tensor], exact: bool
) -> None:
    head, dense, finals, tokens = problem
    whole = divergences(head, norm, dense, finals, tokens, exact=exact)
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        found = divergences(head, norm, dense[part], [final[part] for final in finals], tokens[part], exact=exact)
        torch.testing.assert_close(found.kl.sum((1, 2)), whole.kl[:, part].sum((1, 2)), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.nll.sum((1, 2)), whole.nll[:, part].sum((1, 2)), rtol=1e-6, atol=0)


def test_a_cap_changes_relative_to_the_change() -> None:
    logits = torch.linspace(-30, 30, 601)
    capped = soft_cap(logits, 7.0)
    for size in (1e-6, 1e-2, 1.0, 40.0):
        change = size * torch.cos(torch.arange(601.0))
        expected = soft_cap(logits.double() + change.double(), 7.0) - soft_cap(logits.double(), 7.0)
        torch.testing.assert_close(soft_cap_change(change, capped, 7.0).double(), expected, rtol=2e-3, atol=1e-6 * size)
    assert soft_cap(logits, None) is logits


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("which", [[0], [1], [2], [3], [1, 2], [0, 1, 2, 3]])
def test_compact_is_near(problem: tuple[Tensor, Tensor, list[Tensor], Tensor], which: list[int], cap: float | None) -> None:
    """A vocabulary much flatter than a language model's, and 256 positions only: within 1 % of the mean, capped within 5 %."""
    head, dense, finals, tokens = problem
    chosen = [finals[index] for index in which]
    found = divergences(head, norm, dense, chosen, tokens, cap=cap)
    kl, nll = plain(head, dense, chosen, tokens, cap)
    for index in range(len(which)):
        assert float(found.kl[index].mean()) == pytest.approx(float(kl[index].mean()), rel=1e-2 if cap is None else 5e-2)
        assert float(found.nll[index].mean()) == pytest.approx(float(nll[index].mean()), rel=1e-3)
    # One model alone is its own control: exact. Several are not, or nothing was approximated.
    same = torch.allclose(found.kl, divergences(head, norm, dense, chosen, tokens, exact=True, cap=cap).kl, rtol=1e-3, atol=1e-4)
    assert same == (len(which) == 1)


def test_a_model_that_goes_astray_alone_is_seen(
    problem: tuple[Tensor, Tensor, list[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four positions at which one of eight models says something that no other does: its mass is where nobody looks."""
    head, dense, tokens = problem[0], problem[1].reshape(2, 128, WIDTH), problem[3].reshape(2, 128)
    g = torch.Generator().manual_seed(5)
    finals = [dense + 0.05 * torch.randn(dense.shape, generator=g) for _ in range(8)]
    for sequence, position in ((0, 3), (0, 100), (1, 9), (1, 20)):
        finals[2][sequence, position] += 4 * torch.randn(WIDTH, generator=g)
    expected = plain(head, dense, finals, tokens)[0].mean((1, 2))
    errors = []
    for share in (10**9, divergence.ASTRAY):
        monkeypatch.setattr(divergence, "ASTRAY", share)
        found = divergences(head, norm, dense, finals, tokens).kl.double().mean((1, 2))
        errors.append(float((found / expected - 1).abs().max()))
    assert errors[1] < 0.01 < errors[0]


def test_a_small_vocabulary_is_taken_whole(problem: tuple[Tensor, Tensor, list[Tensor], Tensor]) -> None:
    head, dense, finals, tokens = problem
    small, few = head[:512], tokens % 512
    assert torch.equal(divergences(small, norm, dense, finals, few).kl, divergences(small, norm, dense, finals, few, exact=True).kl)


@pytest.mark.parametrize("exact", [False, True])
def test_chunks_and_company_change_nothing(problem: tuple[Tensor, Tensor, list[Tensor], Tensor], exact: bool) -> None:
    head, dense, finals, tokens = problem
    whole = divergences(head, norm, dense, finals, tokens, exact=exact)
    again = divergences(head, norm, dense, finals, tokens, exact=exact)
    cut = divergences(head, norm, dense, finals, tokens, exact=exact, memory_bytes=1 << 22)
    assert torch.equal(whole.kl, again.kl)
    torch.testing.assert_close(cut.kl, whole.kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cut.nll, whole.nll, rtol=1e-4, atol=1e-4)
    broken = [finals[0], finals[1] * math.nan, dense]
    mixed = divergences(head, norm, dense, broken, tokens, exact=exact)
    assert bool(mixed.kl[1].isnan().all())
    assert bool(mixed.kl[[0, 2]].isfinite().all()), "a model that broke down spoils no other"
    assert float(mixed.kl[2].abs().max()) == 0, "no change, no divergence"
    assert divergences(head, norm, dense, [], tokens, exact=exact).kl.shape == (0, 8, 32)
    with pytest.raises(CancelledTaskError):
        divergences(head, norm, dense, finals, tokens, exact=exact, cancelled=lambda: True)


def test_pieces_of_the_head(problem: tuple[Tensor, Tensor, list[Tensor], Tensor]) -> None:
    head, dense, finals, tokens = problem

    def pieces() -> Iterator[tuple[int, Tensor]]:
        for start in range(0, VOCABULARY, 3000):
            yield start, head[start : start + 3000]

    found = divergences_in_pieces(pieces(), norm, dense, finals, tokens, rows=50)
    whole = divergences(head, norm, dense, finals, tokens, exact=True)
    assert isinstance(found, Divergences)
    torch.testing.assert_close(found.kl, whole.kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.nll, whole.nll, rtol=1e-4, atol=1e-4)


def test_chosen_tokens_stand_for_the_distribution() -> None:
    """Weights sum to one; the likeliest have their own; an average over many starts is the distribution's."""
    g = torch.Generator().manual_seed(1)
    z = (torch.randn(VOCABULARY, generator=g) * 2).expand(512, -1).contiguous()
    other = z + torch.randn(VOCABULARY, generator=g)
    tokens, log_weights = choose(z, z.softmax(-1), other.softmax(-1), torch.arange(len(z)))
    assert tokens.shape == log_weights.shape == (512, EXACT + SAMPLED)
    torch.testing.assert_close(log_weights.logsumexp(-1), torch.zeros(512), atol=1e-5, rtol=0)
    value = torch.randn(VOCABULARY, generator=g)
    p = z[0].softmax(-1)
    estimate = (log_weights.exp() * value[tokens]).sum(-1)
    assert float(estimate.mean()) == pytest.approx(float(p @ value), abs=5e-3)
    assert float(estimate.std()) < 0.1
    assert bool((tokens[:, EXACT:] >= 0).all())
    assert bool((tokens < VOCABULARY).all())


def test_a_distribution_without_a_tail() -> None:
    z = torch.full((3, VOCABULARY), -1e4)
    z[:, 5] = 0
    tokens, log_weights = choose(z, z.softmax(-1), z.softmax(-1), torch.arange(len(z)))
    assert not bool(log_weights.isnan().any())
    assert float(log_weights.exp()[tokens == 5].sum()) == pytest.approx(3)
    head, dense = torch.eye(VOCABULARY)[:, :8] * 1e4, torch.eye(8)[None, :3]
    assert float(divergence.divergences(head, norm, dense, [dense * 2], torch.zeros(1, 3, dtype=torch.long)).kl.abs().max()) < 1e-6
