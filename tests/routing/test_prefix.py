"""The running mean of a row's scores, against a loop over positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dylora_moe.routing.granularity import GRANULARITIES, Deciding
from dylora_moe.routing.prefix import mean_of, running_totals
from tiny import difference

EXACT = 1e-12  # float64 sums of a few terms, or their differences
S = 9
REAL = torch.tensor([[1] * S, [0, 0, 1, 1, 1, 0, 1, 1, 0], [0] * S]).bool()
STARTS = torch.tensor([[0, 0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0, 0], [0] * S]).bool()


def loop(scores: Tensor, real: Tensor | None, starts: Tensor | None, before: Tensor | None) -> Tensor:
    """`[B, S, n]`: the mean of the scores of each position's own sequence, one token after the other."""
    means = torch.zeros_like(scores)
    for b in range(scores.shape[0]):
        total = torch.zeros(scores.shape[2]) if before is None else before[b, 0, :-1].clone()
        count = 0.0 if before is None else float(before[b, 0, -1])
        for t in range(scores.shape[1]):
            if starts is not None and starts[b, t]:
                total, count = torch.zeros_like(total), 0.0
            if real is None or real[b, t]:
                total, count = total + scores[b, t], count + 1
            means[b, t] = total / max(count, 1)
    return means


@pytest.mark.parametrize("before", [None, torch.tensor([[[3.0, -1.0, 2.0]], [[0.0, 0.0, 0.0]], [[5.0, 5.0, 7.0]]])])
@pytest.mark.parametrize("starts", [None, STARTS], ids=["one sequence", "packed"])
@pytest.mark.parametrize("real", [None, REAL], ids=["all", "padded"])
def test_the_mean_so_far(real, starts, before):
    scores = torch.randn(3, S, 2, dtype=torch.float64)
    before = None if before is None else before.double()
    totals = running_totals(scores, real, starts, before)
    assert difference(mean_of(totals), loop(scores, real, starts, before)) <= EXACT
    found = GRANULARITIES["prefix"].aggregate(scores, Deciding(real, starts, before))
    assert torch.equal(found.scores, mean_of(totals))
    assert torch.equal(found.totals, totals)
    pieces, last = [], before
    for piece in (slice(0, 4), slice(4, 5), slice(5, S)):
        cut = [None if part is None else part[:, piece] for part in (real, starts)]
        pieces.append(running_totals(scores[:, piece], *cut, last))
        last = pieces[-1][:, -1:]
    assert difference(torch.cat(pieces, 1), totals) <= EXACT


def test_padding_begins_no_sequence_and_its_scores_do_not_matter():
    scores = torch.randn(1, 4, 2)
    real = torch.tensor([[1, 1, 0, 0]]).bool()
    starts = torch.tensor([[0, 0, 1, 1]]).bool()
    expected = running_totals(scores, real, None, None)
    scores[:, 2:] = torch.inf
    assert torch.equal(running_totals(scores, real, starts, None), expected)


def test_a_long_row_read_token_by_token_is_the_row_read_at_once():
    scores = 5 + torch.randn(1, 4_000, 2)
    whole, last = running_totals(scores, None, None, None), None
    for t in range(scores.shape[1]):
        last = running_totals(scores[:, t : t + 1], None, None, last)
    means = mean_of(torch.cat([whole[:, -1:], last])).float()
    assert difference(means[1], means[0]) <= torch.finfo(torch.float32).eps
    exact = scores.double().mean(1)
    assert difference(means[0], exact) <= torch.finfo(torch.float32).eps
