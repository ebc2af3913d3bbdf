"""What the forms know of a layer: gates, gradients of the weights, and memory side by side."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dylora_moe.mixing.member import (
    LayerExperts,
    dropout_mask,
    lay_side_by_side,
    members_from,
    pair_gates,
    remember,
    side_by_side,
    tensors_of,
)

OWN = LayerExperts(columns=(2, 0), ranks=(1, 3), scalings=(0.5, 2.0))
EQUAL = LayerExperts(columns=(0, 1, 2), ranks=(2, 2, 2), scalings=(3.0, 3.0, 3.0))


def test_one_gate_per_row_of_the_experts_that_the_layer_has():
    weights = torch.tensor([[0.1, 0.2, 0.7]])
    torch.testing.assert_close(OWN.gates(weights, torch.float32), torch.tensor([[0.35, 0.2, 0.2, 0.2]]))
    torch.testing.assert_close(
        EQUAL.gates(weights, torch.float32), torch.tensor([[0.3, 0.3, 0.6, 0.6, 2.1, 2.1]])
    )  # fmt: skip


@pytest.mark.parametrize("own", [OWN, EQUAL])
def test_the_gradient_of_the_weights_is_that_of_the_gates(own):
    weights = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    gates = own.gates(weights, torch.float64)
    per_row = torch.randn_like(gates)
    (expected,) = torch.autograd.grad(gates, weights, per_row)
    torch.testing.assert_close(own.weights_grad(per_row, weights.detach()), expected, rtol=1e-12, atol=1e-12)


def test_gates_of_pairs_are_computed_in_the_wider_dtype():
    weights, indices = torch.rand(3, 4), torch.tensor([[3, 1], [0, 2], [2, 1]])
    scalings = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = pair_gates(weights, indices, scalings, torch.float64)
    expected = torch.stack([weights[t, row].double() * scalings[row] for t, row in enumerate(indices)])
    assert torch.equal(found, expected)
    assert pair_gates(weights, indices, 2.0, torch.bfloat16).dtype == torch.bfloat16


def test_members_survive_the_row_of_tensors(member):
    members = [member(experts=2), member(experts=3)]
    again = members_from([m.experts for m in members], tensors_of(members))
    for one, other in zip(again, members, strict=True):
        assert one.weight is other.weight
        assert one.bias is other.bias
        assert all(a is b for a, b in zip(one.lora_A, other.lora_A, strict=True))
        assert all(a is b for a, b in zip(one.lora_B, other.lora_B, strict=True))


@torch.no_grad()
def test_parameters_laid_side_by_side_keep_their_values():
    parameters = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 3))]
    values = [p.detach().clone() for p in parameters]
    assert side_by_side(parameters) is None
    lay_side_by_side(parameters)
    flat = side_by_side(parameters)
    assert flat is not None
    assert torch.equal(flat, torch.cat([v.flatten() for v in values]))
    assert all(torch.equal(p, v) for p, v in zip(parameters, values, strict=True))
    assert side_by_side(parameters[::-1]) is None


def test_a_view_of_all_would_hide_their_gradients():
    block = torch.randn(2, 6)
    with torch.no_grad():
        assert side_by_side(list(block)) is not None
    assert side_by_side(list(block)) is None


def test_dropout_mask_follows_its_seed_alone():
    x = torch.randn(50, 40)
    mask = dropout_mask(x, 0.25, seed=3)
    assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(mask, dropout_mask(x, 0.25, seed=3))
    assert not torch.equal(mask, dropout_mask(x, 0.25, seed=4))


def test_what_is_remembered_is_made_once():
    made, memo = [], {}
    for _ in range(2):
        assert remember(memo, "key", lambda: made.append(1) or "value") == "value"
    assert made == [1]
    remember(None, "key", lambda: made.append(2))
    assert made == [1, 2]
