"""Policies against loops over plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dylora_moe.routing import policies
from rounding import EXACT

TOLERANCE = {"rtol": EXACT, "atol": EXACT}


def softmax_loop(row: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def random_logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_dense_is_the_softmax_over_all(temperature):
    logits = random_logits(5, 4)
    expected = logits.new_tensor([softmax_loop([value / temperature for value in row]) for row in logits.tolist()])
    torch.testing.assert_close(policies.dense(logits, temperature), expected, **TOLERANCE)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_top_k_is_the_softmax_over_the_best_and_zero_elsewhere(k, temperature):
    logits = random_logits(2, 6, 4)
    weights = policies.top_k(logits, k, temperature)
    for row, found in zip(logits.flatten(0, 1).tolist(), weights.flatten(0, 1).tolist(), strict=True):
        best = sorted(range(4), key=lambda e: -row[e])[:k]
        shares = softmax_loop([row[e] / temperature for e in best])
        expected = [shares[best.index(e)] if e in best else 0.0 for e in range(4)]
        assert found == pytest.approx(expected, abs=EXACT)
        assert [e for e in range(4) if found[e] == 0.0] == [e for e in range(4) if e not in best]


@pytest.mark.parametrize("k", [4, 7])
def test_top_k_of_all_is_dense(k):
    logits = random_logits(3, 4)
    assert torch.equal(policies.top_k(logits, k), policies.dense(logits))


@pytest.mark.parametrize("experts", [3, 8, 17, 64, 300])
def test_ties_go_to_the_lowest_index_whatever_the_number_of_experts(experts):
    logits = torch.zeros(5, experts)
    logits[:, 0] = -1.0
    weights = policies.top_k(logits, 2)
    assert weights[:, 1:3].tolist() == [[0.5, 0.5]] * 5
    assert weights.count_nonzero().item() == 10


def test_ties_do_not_depend_on_the_memory_layout():
    logits = torch.randint(0, 3, (40, 33), generator=torch.Generator().manual_seed(0)).float()
    expected = policies.top_k(logits, 5)
    transposed = logits.T.contiguous().T
    strided = torch.stack([logits, -logits], dim=-1)[..., 0]
    assert not transposed.is_contiguous()
    assert torch.equal(policies.top_k(transposed, 5), expected)
    assert torch.equal(policies.top_k(strided, 5), expected)
    assert torch.equal(policies.top_k(logits[7:8], 5), expected[7:8])


def test_masked_logits_get_exactly_zero_even_where_k_reaches_them():
    logits = torch.tensor([[0.3, -math.inf, 0.1, -math.inf]])
    assert policies.dense(logits)[0, [1, 3]].tolist() == [0.0, 0.0]
    weights = policies.top_k(logits, 3)
    assert weights[0, [1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(weights, policies.dense(logits))


def test_top_k_sends_gradient_to_the_kept_logits_only():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    policies.top_k(logits, 2)[0, 0].backward()
    share = 1 / (1 + math.exp(-1.0))
    expected = [share * (1 - share), 0.0, -share * (1 - share), 0.0]
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx(expected, abs=EXACT)
