"""The router: its formula, float32 everywhere, and rows that stay put when others come and go."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dylora_moe import Router
from dylora_moe.routing.granularity import GRANULARITIES, Deciding
from dylora_moe.routing.router import CALIBRATIONS
from tiny import tiny_mixture, tokens


def score_loop(hidden: Tensor, up: Tensor, down: Tensor | None = None) -> Tensor:
    """The formula, token by token in float64."""
    rows = []
    for state in hidden.double().flatten(0, -2):
        state = (state - state.mean()) / (state.var(unbiased=False) + 1e-5).sqrt()
        if down is not None:
            state = down.double() @ state
            state = state / (1 + (-state).exp())
        rows.append(up.double() @ state)
    return torch.stack(rows).unflatten(0, hidden.shape[:-1])


@pytest.mark.parametrize("router_type", ["mlp", "linear"])
def test_scores_follow_the_formula(router_type):
    router = Router(16, 3, router_type, 8)
    hidden = torch.randn(2, 5, 16) * 3 + 1
    scores = router(hidden)
    assert scores.shape == (2, 5, 3)
    # float32 products of length 16 against float64
    torch.testing.assert_close(
        scores.double(), score_loop(hidden, router.up, getattr(router, "down", None)), rtol=1e-4, atol=1e-5
    )


def test_mlp_has_exactly_two_parameters_and_linear_one():
    mlp = {name: tuple(p.shape) for name, p in Router(16, 3, "mlp", 8).named_parameters()}
    linear = {name: tuple(p.shape) for name, p in Router(16, 3, "linear", 8).named_parameters()}
    assert mlp == {"down": (8, 16), "up": (3, 8)}
    assert linear == {"up": (3, 16)}


@pytest.mark.parametrize("router_type", ["mlp", "linear"])
def test_initial_scores_are_small_and_different(router_type):
    scores = Router(256, 4, router_type)(torch.randn(50, 256))
    assert 0.01 < scores.std() < 2
    assert len(set(scores.argmax(-1).tolist())) > 1


def test_autocast_changes_nothing():
    router = Router(16, 3)
    hidden = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = router(hidden)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, router(hidden))


def test_cast_router_still_computes_in_float32():
    router = Router(16, 3).bfloat16()
    rounded = Router(16, 3)
    rounded.load_state_dict(router.state_dict())
    hidden = torch.randn(4, 16).bfloat16()
    scores = router(hidden)
    assert router.up.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    assert torch.equal(scores, rounded(hidden.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mixture_cast_to_another_dtype_routes_in_float32(dtype):
    model = tiny_mixture().to(dtype)
    with torch.no_grad():
        output = model(tokens())
    assert output.logits.dtype == dtype
    assert output.router_logits.dtype == torch.float32
    assert output.routing_weights.dtype == torch.float32


def test_every_parameter_gets_a_gradient():
    router = Router(16, 3)
    F.softmax(router(torch.randn(4, 16)), -1)[:, 0].sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("router_type", ["mlp", "linear"])
@pytest.mark.parametrize("position", [0, 1, 3])
def test_growing_leaves_every_other_row_bit_identical(router_type, position):
    router = Router(16, 3, router_type, 8)
    before = {name: p.detach().clone() for name, p in router.named_parameters()}
    router.grow(position)
    kept = [row for row in range(4) if row != position]
    assert router.num_outputs == 4
    assert torch.equal(router.up.data[kept], before["up"])
    assert 0 < router.up.data[position].abs().max() <= 1 / math.sqrt(router.up.shape[1])
    if router_type == "mlp":
        assert torch.equal(router.down, before["down"])


@pytest.mark.parametrize("position", [0, 1, 2])
def test_shrinking_leaves_every_other_row_bit_identical(position):
    router = Router(16, 3)
    before = router.up.detach().clone()
    router.shrink(position)
    assert router.num_outputs == 2
    assert torch.equal(router.up, before[[row for row in range(3) if row != position]])


@pytest.mark.parametrize("requires_grad", [True, False])
def test_growing_and_shrinking_keep_dtype_and_requires_grad(requires_grad):
    router = Router(16, 3).bfloat16().requires_grad_(requires_grad)
    for change in (router.grow, router.shrink):
        change(1)
        assert isinstance(router.up, torch.nn.Parameter)
        assert router.up.dtype == torch.bfloat16
        assert router.up.requires_grad is requires_grad


def test_a_computed_router_is_frozen_and_starts_with_nothing():
    router = Router(16, 3, "closed_form")
    shapes = {name: tuple(p.shape) for name, p in router.named_parameters()}
    assert shapes == {"weight": (3, 16), "bias": (3,), "temperature": (len(CALIBRATIONS),)}
    assert not any(p.requires_grad for p in router.parameters())
    assert router.computed
    assert router(torch.randn(2, 16)).abs().max() == 0


def test_a_computed_router_scores_linearly_and_grows_by_an_empty_row():
    router = Router(16, 3, "closed_form")
    router.weight.data.normal_()
    router.bias.data.normal_()
    hidden = torch.randn(2, 5, 16)
    before = router(hidden)
    expected = score_loop(hidden, router.weight) + router.bias
    torch.testing.assert_close(before.double(), expected.double(), rtol=1e-4, atol=1e-5)  # float32 against float64
    router.grow(1)
    torch.testing.assert_close(router(hidden)[..., [0, 2, 3]], before)  # a product of another size may round otherwise
    assert router(hidden)[..., 1].abs().max() == 0
    router.shrink(0)
    torch.testing.assert_close(router(hidden)[..., [1, 2]], before[..., 1:])
    assert not any(p.requires_grad for p in router.parameters())


@pytest.mark.parametrize("name", GRANULARITIES)
def test_each_granularity_has_its_own_temperature(name):
    router, granularity = Router(16, 3, "closed_form"), GRANULARITIES[name]
    router.weight.data.normal_()
    router.temperature.data.copy_(torch.tensor([2.0, 5.0]))
    hidden, deciding = torch.randn(2, 5, 16), Deciding(torch.rand(2, 5) < 0.7)
    plain = granularity.aggregate(router(hidden), deciding).scores
    expected = plain / {"token": 2.0, "sequence": 5.0, "prefix": 5.0}[name]
    assert torch.equal(router.scores(hidden, granularity, deciding).scores, expected)
    trained = Router(16, 3)
    plain = granularity.aggregate(trained(hidden), deciding).scores
    assert torch.equal(trained.scores(hidden, granularity, deciding).scores, plain)
