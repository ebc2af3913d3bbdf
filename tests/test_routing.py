"""Policies, load, entropy and losses against loops over plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dylora_moe import routing
from rounding import EXACT, float64_throughout

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
    torch.testing.assert_close(routing.dense(logits, temperature), expected, **TOLERANCE)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_top_k_is_the_softmax_over_the_best_and_zero_elsewhere(k, temperature):
    logits = random_logits(2, 6, 4)
    weights = routing.top_k(logits, k, temperature)
    for row, found in zip(logits.flatten(0, 1).tolist(), weights.flatten(0, 1).tolist(), strict=True):
        best = sorted(range(4), key=lambda e: -row[e])[:k]
        shares = softmax_loop([row[e] / temperature for e in best])
        expected = [shares[best.index(e)] if e in best else 0.0 for e in range(4)]
        assert found == pytest.approx(expected, abs=EXACT)
        assert [e for e in range(4) if found[e] == 0.0] == [e for e in range(4) if e not in best]


@pytest.mark.parametrize("k", [4, 7])
def test_top_k_of_all_is_dense(k):
    logits = random_logits(3, 4)
    assert torch.equal(routing.top_k(logits, k), routing.dense(logits))


@pytest.mark.parametrize("experts", [3, 8, 17, 64, 300])
def test_ties_go_to_the_lowest_index_whatever_the_number_of_experts(experts):
    logits = torch.zeros(5, experts)
    logits[:, 0] = -1.0
    weights = routing.top_k(logits, 2)
    assert weights[:, 1:3].tolist() == [[0.5, 0.5]] * 5
    assert weights.count_nonzero().item() == 10


def test_ties_do_not_depend_on_the_memory_layout():
    logits = torch.randint(0, 3, (40, 33), generator=torch.Generator().manual_seed(0)).float()
    expected = routing.top_k(logits, 5)
    transposed = logits.T.contiguous().T
    strided = torch.stack([logits, -logits], dim=-1)[..., 0]
    assert not transposed.is_contiguous()
    assert torch.equal(routing.top_k(transposed, 5), expected)
    assert torch.equal(routing.top_k(strided, 5), expected)
    assert torch.equal(routing.top_k(logits[7:8], 5), expected[7:8])


def test_masked_logits_get_exactly_zero_even_where_k_reaches_them():
    logits = torch.tensor([[0.3, -math.inf, 0.1, -math.inf]])
    assert routing.dense(logits)[0, [1, 3]].tolist() == [0.0, 0.0]
    weights = routing.top_k(logits, 3)
    assert weights[0, [1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(weights, routing.dense(logits))


def test_top_k_sends_gradient_to_the_kept_logits_only():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    routing.top_k(logits, 2)[0, 0].backward()
    share = 1 / (1 + math.exp(-1.0))
    expected = [share * (1 - share), 0.0, -share * (1 - share), 0.0]
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx(expected, abs=EXACT)


def test_load_counts_real_tokens_only():
    weights = random_logits(2, 5, 3).softmax(-1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    kept = [w for row, m in zip(weights.tolist(), mask.tolist(), strict=True) for w, k in zip(row, m, strict=True) if k]
    expected = [sum(w[e] for w in kept) / len(kept) for e in range(3)]
    assert routing.load(weights, mask).tolist() == pytest.approx(expected, abs=EXACT)
    everything = [w for row in weights.tolist() for w in row]
    assert routing.load(weights).tolist() == pytest.approx([sum(w[e] for w in everything) / 10 for e in range(3)])


def test_load_of_no_token_is_zero():
    assert routing.load(torch.ones(1, 4, 2), torch.zeros(1, 4, dtype=torch.bool)).tolist() == [0.0, 0.0]


def test_load_is_differentiable_through_real_tokens_only():
    weights = torch.rand(1, 4, 2, requires_grad=True)
    routing.load(weights, torch.tensor([[True, False, True, True]]))[0].backward()
    assert weights.grad is not None
    assert weights.grad[0, :, 0].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert weights.grad[0, :, 1].tolist() == [0.0] * 4


def test_entropy():
    weights = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert routing.entropy(weights).tolist() == pytest.approx([math.log(4), 0.0, math.log(2)])


def test_uniform_mse():
    weights = random_logits(1, 6, 3).softmax(-1)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool()
    share = routing.load(weights, mask).tolist()
    expected = sum((value - 1 / 3) ** 2 for value in share) / 3
    assert routing.uniform_mse(weights, weights, mask).item() == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("experts", [2, 5])
def test_uniform_mse_is_zero_at_uniform_and_known_at_collapse(experts):
    uniform = torch.full((1, 8, experts), 1 / experts)
    collapsed = torch.zeros(1, 8, experts)
    collapsed[..., 0] = 1.0
    assert routing.uniform_mse(uniform, uniform).item() == pytest.approx(0.0, abs=1e-12)
    expected = ((1 - 1 / experts) ** 2 + (experts - 1) / experts**2) / experts
    assert routing.uniform_mse(collapsed, collapsed).item() == pytest.approx(expected)


@pytest.mark.parametrize("experts", [2, 5])
def test_switch_is_one_at_uniform_and_the_number_of_experts_at_collapse(experts):
    uniform = torch.zeros(1, 8, experts)
    assert routing.switch(uniform, uniform).item() == pytest.approx(1.0)
    collapsed = torch.full((1, 8, experts), -100.0)
    collapsed[..., 1] = 100.0
    assert routing.switch(collapsed, collapsed).item() == pytest.approx(experts)


@pytest.mark.parametrize("masked", [False, True])
@float64_throughout()
def test_switch_equals_transformers(masked):
    logits = random_logits(3, 7, 4)
    mask = torch.ones(3, 7, dtype=torch.long)
    if masked:
        mask[0, :3] = mask[2, 5:] = 0
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = routing.switch(ours, routing.dense(ours), mask.bool() if masked else None)
    expected = load_balancing_loss_func((theirs.flatten(0, 1),), 4, top_k=1, attention_mask=mask if masked else None)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    loss.backward()
    expected.backward()
    assert ours.grad is not None
    assert ours.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad, theirs.grad, **TOLERANCE)


def test_z_loss():
    logits = random_logits(2, 3, 4)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    rows = [row for row, kept in zip(logits.flatten(0, 1).tolist(), mask.flatten().tolist(), strict=True) if kept]
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(rows)
    assert routing.z_loss(logits, mask).item() == pytest.approx(expected, rel=EXACT)
    assert routing.z_loss(logits, mask).shape == ()


@pytest.mark.parametrize("loss", ["uniform_mse", "switch"])
def test_losses_average_the_way_they_are_told(loss):
    """A trainer hands in a mean over all its processes; here one that sees the first row only."""
    logits = random_logits(2, 6, 3)

    def of_the_first_row(values: Tensor, mask: Tensor | None) -> Tensor:
        return routing.masked_mean(values[:1], mask)

    function = routing.BALANCE_LOSSES[loss]
    expected = function(logits[:1], routing.dense(logits[:1]), None, routing.masked_mean)
    found = function(logits, routing.dense(logits), None, of_the_first_row)
    torch.testing.assert_close(found, expected)
    assert abs(found - function(logits, routing.dense(logits), None, routing.masked_mean)) > 1e-3


def test_one_hot_weights():
    weights = routing.one_hot_weights([2, None, 0], 3)
    assert weights.tolist() == [[[0, 0, 1]], [[0, 0, 0]], [[1, 0, 0]]]
