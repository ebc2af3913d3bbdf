"""The definition that every form is tested against, itself against arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dylora_moe.mixing import reference_mixture
from tiny import EXPERTS, difference, routed_layer


def parts(layer, x):
    """The base's output and each expert's delta, one matrix product after the other."""
    deltas = {
        name: layer.lora_B[name](x @ layer.lora_A[name].weight.T) * layer.scaling[name] for name in EXPERTS
    }  # fmt: skip
    return layer.base_layer(x), deltas


def test_it_is_the_sum_of_the_weighted_deltas_in_the_order_of_the_names():
    layer, x, names = routed_layer(nn.Linear(7, 5)).double(), torch.randn(2, 3, 7).double(), ("blue", "red", "green")
    weights = torch.rand(2, 3, 3).double()
    base, deltas = parts(layer, x)
    expected = base + sum(weights[..., i, None] * deltas[name] for i, name in enumerate(names))
    assert difference(reference_mixture(layer, x, weights, names), expected) <= 1e-12


def test_an_expert_that_the_layer_does_not_carry_adds_nothing():
    layer, x = routed_layer(nn.Linear(7, 5)).double(), torch.randn(1, 3, 7).double()
    weights = torch.rand(1, 1, 2).double()
    base, deltas = parts(layer, x)
    found = reference_mixture(layer, x, weights, ("elsewhere", "red"))
    assert difference(found, base + weights[..., 1, None] * deltas["red"]) <= 1e-12


@pytest.mark.parametrize("names", [("red", "green"), ("green",)])
def test_a_merged_expert_is_taken_out_of_the_base_again(names):
    layer, x = routed_layer(nn.Linear(7, 5)).double(), torch.randn(1, 3, 7).double()
    weights = torch.rand(1, 3, len(names)).double()
    expected = reference_mixture(layer, x, weights, names)
    layer.merge(adapter_names=["red"])
    assert difference(reference_mixture(layer, x, weights, names), expected) <= 1e-12
