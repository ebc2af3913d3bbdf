"""Invariant 1: the two-GEMM path equals the loop over experts, outputs and all gradients.

Single layers in float64, where the two differ only by the order of additions: 1e-12 relative.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylora_moe.layers.in_force import Generation
from dylora_moe.mixing.member import dropout_mask
from oracle import Loop
from rounding import EXACT, ulps
from tiny import EXPERTS, difference, mix, routed_layer

TOLERANCE = EXACT


class QuantizedLike(nn.Linear):
    """A base layer of another class whose weight must not be used directly: it computes 2 x Wᵀ + b."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


def hooked(base: nn.Module) -> nn.Module:
    base.register_forward_hook(lambda module, args, output: 3 * output)
    return base


def pre_hooked(base: nn.Module) -> nn.Module:
    base.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return base


BASES = {
    "Linear": lambda: nn.Linear(7, 5),
    "Linear without bias": lambda: nn.Linear(7, 5, bias=False),
    "Conv1D": lambda: Conv1D(5, 7),
    "subclass of Linear": lambda: QuantizedLike(7, 5),
    "hook": lambda: hooked(nn.Linear(7, 5)),
    "pre-hook": lambda: pre_hooked(nn.Linear(7, 5)),
    "trainable": lambda: nn.Linear(7, 5),
}


def loop_of(layer: Any) -> Loop:
    loop = Loop(layer, copy.deepcopy(layer.base_layer), layer.peft_configs)
    loop.names = list(layer.peft_configs)
    return loop


def compare(layer: Any, x: Tensor, weights: Tensor, dy: Tensor | None = None, tolerance: float = TOLERANCE) -> None:
    """Outputs and the gradients of x, the weights and every parameter are those of the loop."""
    loop = loop_of(layer)
    xs = [x.detach().requires_grad_() for _ in range(2)]
    ws = [weights.detach().clone().requires_grad_() for _ in range(2)]
    mix(layer, tuple(loop.names), ws[0])
    found = layer(xs[0])
    loop.weights = ws[1].expand(*x.shape[:-1], -1)
    expected = loop(xs[1])
    assert found.dtype == expected.dtype
    assert difference(found, expected) <= tolerance
    for y in (found, expected):
        y.sum().backward() if dy is None else y.backward(dy)  # sum() hands down a gradient of stride 0
    assert difference(xs[0].grad, xs[1].grad) <= tolerance
    assert difference(ws[0].grad, ws[1].grad) <= tolerance
    parameters = dict(layer.named_parameters())
    for ours, theirs in (("lora_A", "A"), ("lora_B", "B"), ("base_layer", "base")):
        for name, parameter in getattr(loop, theirs).named_parameters():
            gradient = parameters[f"{ours}.{name}"].grad
            assert (gradient is None) == (parameter.grad is None), name
            assert gradient is None or difference(gradient, parameter.grad) <= tolerance, name


def inputs(*leading: int, width: int = 7, experts: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(*leading, width).double(), torch.rand(*leading, experts).double()


@pytest.mark.parametrize("kind", BASES)
def test_mixed_experts_on_every_kind_of_base(kind):
    layer = routed_layer(BASES[kind]()).double()
    if kind == "trainable":
        layer.base_layer.requires_grad_(True)
    compare(layer, *inputs(2, 3), dy=torch.randn(2, 3, 5).double())


@pytest.mark.parametrize("shared", [(), ("sequence",), ("batch", "sequence")], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "subclass of Linear"])
def test_weights_that_several_tokens_share(kind, shared):
    x, weights = inputs(4, 3)
    weights = weights[: 1 if "batch" in shared else None, : 1 if "sequence" in shared else None]
    compare(routed_layer(BASES[kind]()).double(), x, weights)


def test_equal_experts_take_the_short_cuts_of_equal_ranks_and_scalings():
    layer = routed_layer(nn.Linear(7, 5), {name: {"r": 3, "lora_alpha": 2} for name in EXPERTS}).double()
    compare(layer, *inputs(2, 3))


def test_a_single_expert():
    compare(routed_layer(nn.Linear(7, 5), {"red": EXPERTS["red"]}).double(), *inputs(2, 3, experts=1))


def test_an_expert_that_does_not_adapt_the_layer_contributes_zero():
    layer = routed_layer(nn.Linear(7, 5)).double()
    for part in (layer.lora_A, layer.lora_B):
        del part["green"]
    compare(layer, *inputs(2, 3))


def test_columns_follow_the_names_in_force_not_the_order_in_the_layer():
    layer = routed_layer(nn.Linear(7, 5)).double()
    layer.peft_configs = {name: layer.peft_configs[name] for name in ("blue", "red", "green")}
    compare(layer, *inputs(2, 3))


@pytest.mark.parametrize("leading", [(1, 1), (1, 6), (3, 1), (0, 4), (2, 0)], ids=str)
def test_one_token_and_none(leading):
    compare(routed_layer(nn.Linear(7, 5)).double(), *inputs(*leading))


def test_flattened_tokens():
    layer, (x, weights) = routed_layer(nn.Linear(7, 5)).double(), inputs(2, 3)
    mix(layer, tuple(EXPERTS), weights)
    assert difference(layer(x.flatten(0, 1)), layer(x).flatten(0, 1)) <= TOLERANCE
    mix(layer, tuple(EXPERTS), weights[:, :1])  # one row of weights per sequence
    assert difference(layer(x.flatten(0, 1)), layer(x).flatten(0, 1)) <= TOLERANCE


def test_non_contiguous_input_weights_and_gradient():
    layer = routed_layer(nn.Linear(7, 5)).double()
    x, weights = torch.randn(7, 3, 4).double().transpose(0, 2), torch.rand(3, 3, 4).double().transpose(0, 2)
    assert not x.is_contiguous()
    assert not weights.is_contiguous()
    compare(layer, x, weights, dy=torch.randn(5, 3, 4).double().transpose(0, 2))


def test_gradients_of_stride_zero():
    compare(
        routed_layer(nn.Linear(7, 5)).double(), *inputs(2, 3), dy=torch.ones(1, dtype=torch.float64).expand(2, 3, 5)
    )


@pytest.mark.parametrize("frozen", [("red",), ("red", "blue"), tuple(EXPERTS)], ids=str)
def test_frozen_experts_get_no_gradient(frozen):
    layer = routed_layer(nn.Linear(7, 5)).double()
    x, weights = inputs(2, 3)
    for name in frozen:
        for part in (layer.lora_A[name], layer.lora_B[name]):
            part.requires_grad_(False)
    compare(layer, x, weights)
    for name in EXPERTS:
        assert (layer.lora_A[name].weight.grad is None) == (name in frozen)
        assert (layer.lora_B[name].weight.grad is None) == (name in frozen)


def test_parts_of_an_expert_frozen():
    layer = routed_layer(nn.Linear(7, 5)).double()
    layer.lora_A["red"].requires_grad_(False)
    layer.lora_B["green"].requires_grad_(False)
    compare(layer, *inputs(2, 3))


def test_without_gradients_and_in_inference_mode():
    layer = routed_layer(nn.Linear(7, 5)).double()
    x, weights = inputs(2, 3)
    mix(layer, tuple(EXPERTS), weights)
    expected = layer(x)
    for layer.holder.generation in (None, Generation()):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert difference(layer(x), expected) <= TOLERANCE
                assert difference(layer(x), expected) <= TOLERANCE  # from the packed matrices
        assert layer.holder.generation is None or len(layer.holder.generation.packed) == 1


@settings(max_examples=60)
@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 4),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    rslora=st.booleans(),
    bias=st.booleans(),
    per_sequence=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_shapes(batch, length, sizes, ranks, rslora, bias, per_sequence, seed):
    torch.manual_seed(seed)
    experts = {
        f"e{i}": {"r": r, "lora_alpha": 1 + 2 * i, "use_rslora": rslora, "lora_bias": bias} for i, r in enumerate(ranks)
    }
    layer = routed_layer(nn.Linear(*sizes, bias=bias), experts).double()
    x, weights = inputs(batch, length, width=sizes[0], experts=len(ranks))
    compare(layer, x, weights[:, :1] if per_sequence and length else weights)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "subclass of Linear"])
def test_dropout_is_one_mask_shared_by_the_experts(kind):
    p = 0.4
    layer = routed_layer(BASES[kind](), {n: {**e, "lora_dropout": p} for n, e in EXPERTS.items()}, train=True).double()
    x, weights = inputs(4, 6)
    xs, ws = [x.clone().requires_grad_() for _ in range(2)], [weights.clone().requires_grad_() for _ in range(2)]
    mix(layer, tuple(EXPERTS), ws[0])
    torch.manual_seed(5)
    found = layer(xs[0])
    torch.manual_seed(5)
    mask = dropout_mask(x.flatten(0, 1), p, seed=int(torch.randint(2**62, ()))).unflatten(0, (4, 6))
    assert mask.unique().tolist() == [0.0, 1 / (1 - p)]
    loop = loop_of(layer)
    loop.weights = ws[1]
    base = loop.base(xs[1])
    loop.base = nn.Identity()
    expected = base + loop.add_experts(xs[1] * mask, torch.zeros_like(base))
    dy = torch.randn_like(expected)
    found.backward(dy)
    expected.backward(dy)
    assert difference(found, expected) <= TOLERANCE
    assert difference(xs[0].grad, xs[1].grad) <= TOLERANCE
    assert difference(ws[0].grad, ws[1].grad) <= TOLERANCE
    for name in EXPERTS:
        assert difference(layer.lora_A[name].weight.grad, loop.A[name].weight.grad) <= TOLERANCE
        assert difference(layer.lora_B[name].weight.grad, loop.B[name].weight.grad) <= TOLERANCE


def test_dropout_masks_differ_between_calls_and_follow_the_seed():
    layer = routed_layer(nn.Linear(7, 5), {"red": {"r": 2, "lora_dropout": 0.5}}, train=True)
    x, weights = torch.randn(2, 9, 7), torch.ones(2, 9, 1)
    mix(layer, ("red",), weights)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
def test_dropout_keeps_the_expected_value(grad):
    experts = {name: {**e, "lora_dropout": 0.5} for name, e in EXPERTS.items()}
    layer = routed_layer(nn.Linear(7, 5), experts, train=True).double()
    x, weights = inputs(1, 1)
    mix(layer, tuple(EXPERTS), weights)
    with torch.set_grad_enabled(grad):
        mean = layer(x.expand(1, 20000, 7)).mean(1, keepdim=True)
        expected = layer.eval()(x)
    assert difference(mean, expected) < 0.05  # several standard errors of the mean


def test_float32():
    torch.manual_seed(3)
    x, weights = torch.randn(4, 8, 7), torch.rand(4, 8, 3)
    compare(routed_layer(nn.Linear(7, 5)), x, weights, tolerance=ulps(8))
