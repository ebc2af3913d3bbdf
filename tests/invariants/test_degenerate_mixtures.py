"""Invariant 3: equal experts under any weights are the single adapter; without deltas there is only the base.

In float64 throughout, norms and routers included.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe import DyLoraMoE
from rounding import EXACT
from tiny import (
    NAMES,
    PLACEMENTS,
    difference,
    every_architecture,
    every_combination,
    gradients,
    stock_adapter,
    tiny_base,
    tiny_mixture,
    tokens,
)

pytestmark = pytest.mark.usefixtures("exact")


def equal_experts(architecture: str, **changes) -> DyLoraMoE:
    """A mixture in float64 whose three experts hold the same tensors."""
    model = tiny_mixture(architecture, torch.float64, **changes)
    for other in NAMES[1:]:
        for ours, theirs in zip(model.expert_tensors(other), model.expert_tensors("red"), strict=True):
            ours.tensor.data.copy_(theirs.tensor.data)
    return model


@every_architecture
def test_equal_experts_under_any_weights(architecture):
    model = equal_experts(architecture)
    ids = tokens()
    expected = model(ids, experts="red").logits
    drawn = torch.randn(*ids.shape, 3).double()
    shares = [drawn.softmax(-1), drawn / drawn.sum(-1, keepdim=True).clamp(min=0.5)]
    shares[1][..., 0] += 1 - shares[1].sum(-1)  # negative ones and ones above 1, too
    for weights in [*shares, *torch.eye(3).double()]:
        assert difference(model(ids, routing_weights=weights).logits, expected) <= EXACT


@every_combination
def test_equal_experts_routed(architecture, placement):
    model = equal_experts(architecture, **PLACEMENTS[placement])
    ids = tokens()
    expected = model(ids, experts="red").logits
    assert difference(model(ids).logits, expected) <= EXACT
    assert difference(model.train()(ids).logits, expected) <= EXACT


@pytest.fixture(scope="module")
def one_mixture() -> DyLoraMoE:
    return equal_experts("opt")


@settings(max_examples=25)
@given(raw=st.lists(st.floats(-3, 3), min_size=3, max_size=3), length=st.integers(1, 7))
def test_random_weights(one_mixture, raw, length):
    model, ids = one_mixture, tokens(1, length)
    weights = torch.tensor(raw, dtype=torch.float64)
    weights[0] += 1 - weights.sum()
    expected = model(ids, experts="green").logits
    assert difference(model(ids, routing_weights=weights).logits, expected) <= 10 * EXACT  # weights up to 10


@every_architecture
def test_equal_experts_share_the_gradient_of_the_single_adapter(architecture):
    model = equal_experts(architecture)
    ids, weights = tokens(), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    stock = stock_adapter(model, tiny_base(architecture, torch.float64), "red")
    stock(ids, labels=ids).loss.backward()
    model(ids, labels=ids, routing_weights=weights).loss.backward()
    found = gradients(model)
    for name, gradient in gradients(stock).items():
        for share, expert in zip(weights, NAMES, strict=True):
            assert difference(found[name.replace(".red.", f".{expert}.")], share * gradient) <= EXACT


@every_combination
def test_a_zero_delta_leaves_the_base(architecture, placement):
    model = tiny_mixture(architecture, torch.float64, init_lora_weights=True, **PLACEMENTS[placement])
    expected = tiny_base(architecture, torch.float64)(tokens()).logits
    assert difference(model(tokens()).logits, expected) <= EXACT
    assert difference(model.train()(tokens()).logits, expected) <= EXACT


@every_architecture
def test_weights_of_zero_leave_the_base(architecture):
    model = tiny_mixture(architecture, torch.float64)
    expected = tiny_base(architecture, torch.float64)(tokens()).logits
    assert difference(model(tokens(), routing_weights=torch.zeros(3)).logits, expected) <= EXACT


@every_architecture
def test_an_expert_alone_is_its_column(architecture):
    model = tiny_mixture(architecture, torch.float64)
    for name, weights in zip(NAMES, torch.eye(3).double(), strict=True):
        expected = model(tokens(), experts=name).logits
        assert difference(model(tokens(), routing_weights=weights).logits, expected) <= EXACT
