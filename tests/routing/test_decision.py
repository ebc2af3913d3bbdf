"""What a decision makes of scores, of forced rows and of the base route."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.routing.decision import Rows, decide, largest, one_hot_weights
from dylora_moe.routing.policies import Policy

SCORES = torch.tensor([[[2.0, 1.0, 0.0, -1.0]], [[0.0, 3.0, 1.0, 2.0]]])


def test_one_hot_weights():
    weights = one_hot_weights([2, None, 0, -1], 3)
    assert weights.tolist() == [[[0.0, 0.0, 1.0]], [[0.0] * 3], [[1.0, 0.0, 0.0]], [[0.0] * 3]]


def test_dense_weights_have_no_active_columns():
    decision = decide(SCORES, Rows(2, 5), Policy(), 4)
    torch.testing.assert_close(decision.weights, SCORES.softmax(-1))
    assert decision.active is None
    assert decision.all_weights.shape == decision.logits.shape == decision.shares.shape == (2, 5, 4)


def test_the_active_columns_are_those_the_policy_kept():
    decision = decide(SCORES, Rows(2, 1), Policy(k=2), 4)
    assert decision.active.tolist() == [[[0, 1]], [[1, 3]]]
    assert (decision.weights.gather(-1, decision.active).sum(-1) == 1).all()


@pytest.mark.parametrize("k", [1, 2])
def test_forced_rows_are_among_the_active_columns(k):
    rows = Rows(2, 1, columns=(3, None))
    decision = decide(SCORES, rows, Policy(k=k), 4)
    assert decision.weights[0, 0].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert 3 in decision.active[0, 0].tolist()
    assert 1 in decision.active[1, 0].tolist()
    assert rows.routed_mask(torch.device("cpu")).tolist() == [[False], [True]]


def test_the_base_route_is_no_expert():
    decision = decide(SCORES, Rows(2, 1), Policy(k=2), 3)  # the last of four outputs
    assert decision.weights.shape[-1] == 3
    assert decision.active.max() < 3
    assert all(len(set(row)) == 2 for row in decision.active.flatten(0, 1).tolist())
    assert float(decision.weights[1].sum()) < 1  # what is left goes to no expert
    torch.testing.assert_close(decision.shares.sum(-1), torch.ones(2, 1))


def test_new_experts_get_nothing():
    decision = decide(SCORES, Rows(2, 1), Policy(masked=(1,)), 4)
    assert (decision.weights[..., 1] == 0).all()
    assert torch.isinf(decision.logits[..., 1]).all()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.2, 0.5, 0.3], "b"),
        ([0.4, 0.4, 0.2], "a"),
        ([0.3, 0.0, 0.2], "base"),
        ([0.5, 0.0, 0.0], "a"),
        ([0.0] * 3, "base"),
    ],
)
def test_the_largest_share_may_be_the_bases(weights, expected):
    assert largest(weights, ("a", "b", "c")) == expected
