"""Load, entropy and losses against loops over plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dylora_moe.routing import losses, policies
from rounding import EXACT, float64_throughout

TOLERANCE = {"rtol": EXACT, "atol": EXACT}


def random_logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2


def test_load_counts_real_tokens_only():
    weights = random_logits(2, 5, 3).softmax(-1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    kept = [w for row, m in zip(weights.tolist(), mask.tolist(), strict=True) for w, k in zip(row, m, strict=True) if k]
    expected = [sum(w[e] for w in kept) / len(kept) for e in range(3)]
    assert losses.load(weights, mask).tolist() == pytest.approx(expected, abs=EXACT)
    everything = [w for row in weights.tolist() for w in row]
    assert losses.load(weights).tolist() == pytest.approx([sum(w[e] for w in everything) / 10 for e in range(3)])


def test_load_of_no_token_is_zero():
    assert losses.load(torch.ones(1, 4, 2), torch.zeros(1, 4, dtype=torch.bool)).tolist() == [0.0, 0.0]


def test_load_is_differentiable_through_real_tokens_only():
    weights = torch.rand(1, 4, 2, requires_grad=True)
    losses.load(weights, torch.tensor([[True, False, True, True]]))[0].backward()
    assert weights.grad is not None
    assert weights.grad[0, :, 0].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert weights.grad[0, :, 1].tolist() == [0.0] * 4


def test_entropy():
    weights = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert losses.entropy(weights).tolist() == pytest.approx([math.log(4), 0.0, math.log(2)])


def test_uniform_mse():
    weights = random_logits(1, 6, 3).softmax(-1)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool()
    share = losses.load(weights, mask).tolist()
    expected = sum((value - 1 / 3) ** 2 for value in share) / 3
    assert losses.uniform_mse(weights, weights, mask).item() == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("experts", [2, 5])
def test_uniform_mse_is_zero_at_uniform_and_known_at_collapse(experts):
    uniform = torch.full((1, 8, experts), 1 / experts)
    collapsed = torch.zeros(1, 8, experts)
    collapsed[..., 0] = 1.0
    assert losses.uniform_mse(uniform, uniform).item() == pytest.approx(0.0, abs=1e-12)
    expected = ((1 - 1 / experts) ** 2 + (experts - 1) / experts**2) / experts
    assert losses.uniform_mse(collapsed, collapsed).item() == pytest.approx(expected)


@pytest.mark.parametrize("experts", [2, 5])
def test_switch_is_one_at_uniform_and_the_number_of_experts_at_collapse(experts):
    uniform = torch.zeros(1, 8, experts)
    assert losses.switch(uniform, uniform).item() == pytest.approx(1.0)
    collapsed = torch.full((1, 8, experts), -100.0)
    collapsed[..., 1] = 100.0
    assert losses.switch(collapsed, collapsed).item() == pytest.approx(experts)


@pytest.mark.parametrize("masked", [False, True])
@float64_throughout()
def test_switch_equals_transformers(masked):
    logits = random_logits(3, 7, 4)
    mask = torch.ones(3, 7, dtype=torch.long)
    if masked:
        mask[0, :3] = mask[2, 5:] = 0
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = losses.switch(ours, policies.dense(ours), mask.bool() if masked else None)
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
    assert losses.z_loss(logits, mask).item() == pytest.approx(expected, rel=EXACT)
    assert losses.z_loss(logits, mask).shape == ()


@pytest.mark.parametrize("loss", ["uniform_mse", "switch"])
def test_losses_average_the_way_they_are_told(loss):
    """A trainer hands in a mean over all its processes; here one that sees the first row only."""
    logits = random_logits(2, 6, 3)

    def of_the_first_row(values: Tensor, mask: Tensor | None) -> Tensor:
        return losses.masked_mean(values[:1], mask)

    function = losses.BALANCE_LOSSES[loss]
    expected = function(logits[:1], policies.dense(logits[:1]), None, losses.masked_mean)
    found = function(logits, policies.dense(logits), None, of_the_first_row)
    torch.testing.assert_close(found, expected)
    assert abs(found - function(logits, policies.dense(logits), None, losses.masked_mean)) > 1e-3
