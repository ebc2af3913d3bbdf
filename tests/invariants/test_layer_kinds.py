"""Invariant 1 where there is no fast form, or another dtype: DoRA, embeddings, merged adapters, unequal dropout, bf16.

The oracle is stock PEFT: y = base + Σ_e w_e (y_e − base), with y_e its output when only expert e is active.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from dylora_moe.layers.in_force import Generation, InForce
from rounding import EXACT, needs_bfloat16, ulps
from tiny import EXPERTS, difference, routed_layer

NAMES = tuple(EXPERTS)
FEW_ULPS_OF_BFLOAT16 = 2e-2

DORA = {
    "red": {"r": 2, "lora_alpha": 3, "use_dora": True},
    "green": {"r": 5, "lora_alpha": 4},
    "blue": {"r": 1, "lora_alpha": 7, "use_dora": True, "use_rslora": True},
}
TABLE = {"red": {"r": 2, "lora_alpha": 3}, "green": {"r": 5, "use_rslora": True}, "blue": {"r": 1}}
KINDS = {
    "DoRA on Linear": (lambda: nn.Linear(7, 5), DORA),
    "DoRA on Conv1D": (lambda: Conv1D(5, 7), DORA),
    "Embedding": (lambda: nn.Embedding(7, 5), TABLE),
    "scaled Embedding": (lambda: Gemma3TextScaledWordEmbedding(7, 5, 0, embed_scale=3.0), TABLE),
    "DoRA on Embedding": (lambda: nn.Embedding(7, 5), {n: {**e, "use_dora": True} for n, e in TABLE.items()}),
}


def stock_mixture(layer: Any, x: Tensor, weights: Tensor) -> Tensor:
    """Σ_e w_e (y_e − base) + base from PEFT's own forward, one expert active at a time."""
    layer.holder.rest()
    base = layer.base_layer(x)
    y = base
    for column, name in enumerate(NAMES):
        layer.set_adapter([name])
        layer.requires_grad_(True)
        y = y + weights[..., column, None] * (layer(x) - base)
    layer.set_adapter(list(NAMES))
    return y


def outcome(layer: Any, x: Tensor, weights: Tensor, dy: Tensor, mixed: bool) -> dict[str, Tensor]:
    """Output and all gradients, of the routed layer or of the stock ones."""
    layer.zero_grad()
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    weights = weights.detach().requires_grad_()
    if mixed:
        layer.holder.put(InForce(NAMES, weights))
        y = layer(x)
    else:
        y = stock_mixture(layer, x, weights)
    y.backward(dy)
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None and "base_layer" not in name}
    found |= {"y": y, "w": weights.grad} | ({"x": x.grad} if x.is_floating_point() else {})
    return found


def example(kind: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    make, experts = KINDS[kind]
    layer = routed_layer(make(), experts).double()
    x = torch.randint(7, (2, 4)) if "Embedding" in kind else torch.randn(2, 4, 7).double()
    return layer, x, torch.rand(2, 4, 3).double(), torch.randn(2, 4, 5).double()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_without_a_fast_form(kind):
    layer, x, weights, dy = example(kind)
    expected = outcome(layer, x, weights, dy, mixed=False)
    found = outcome(layer, x, weights, dy, mixed=True)
    assert found.keys() == expected.keys()
    for name in expected:
        assert difference(found[name], expected[name]) <= EXACT, name


@pytest.mark.parametrize("merged", [["red"], ["green", "blue"], list(NAMES)], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 5), lambda: Conv1D(5, 7), lambda: nn.Embedding(7, 5)])
def test_merged_adapters_are_counted_once(make, merged):
    layer = routed_layer(make(), TABLE).double()
    x = torch.randint(7, (2, 4)) if isinstance(layer.base_layer, nn.Embedding) else torch.randn(2, 4, 7).double()
    weights = torch.rand(2, 4, 3).double()
    expected = stock_mixture(layer, x, weights)
    forced = {name: only(layer, x, [name]) for name in NAMES}
    layer.merge(adapter_names=merged)
    layer.holder.put(InForce(NAMES, weights))
    assert difference(layer(x), expected) <= EXACT
    for name in NAMES:
        layer.holder.put(InForce(forced=(name,)))
        assert difference(layer(x), forced[name]) <= EXACT, name
    layer.holder.put(InForce(("blue",), weights[..., 2:]))  # the merged ones are not among those in force
    blue = layer(x)
    layer.unmerge()
    assert difference(layer(x), blue) <= EXACT


def only(layer: Any, x: Tensor, names: list[str]) -> Tensor:
    layer.holder.put(InForce(forced=tuple(names)))
    return layer(x)


def test_merged_dora_is_refused():
    layer, x, weights, _ = example("DoRA on Linear")
    layer.merge(adapter_names=["red"])
    layer.holder.put(InForce(NAMES, weights))
    with pytest.raises(ValueError, match=r"'red' is merged and uses DoRA; call unmerge_adapter\(\)"):
        layer(x)


def test_experts_of_unequal_dropout_draw_a_mask_each():
    rates = {"red": 0.0, "green": 0.3, "blue": 0.6}
    layer = routed_layer(nn.Linear(7, 5), {n: {**e, "lora_dropout": rates[n]} for n, e in EXPERTS.items()}, train=True)
    layer.double()
    x, weights = torch.randn(2, 4, 7).double(), torch.rand(2, 4, 3).double()
    layer.holder.put(InForce(NAMES, weights))
    torch.manual_seed(2)
    found = layer(x)
    torch.manual_seed(2)
    expected = layer.base_layer(x)
    for column, name in enumerate(NAMES):
        xd = F.dropout(x, rates[name]) if rates[name] else x
        expected = (
            expected + weights[..., column, None] * layer.lora_B[name](layer.lora_A[name](xd)) * layer.scaling[name]
        )
    assert difference(found, expected) <= EXACT
    layer.eval()
    assert difference(layer(x), stock_mixture(layer, x, weights)) <= EXACT


def float_version(layer: Any) -> Any:
    """The same layer in float32."""
    return copy.deepcopy(layer).float()


@needs_bfloat16
@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 48), lambda: Conv1D(48, 64)])
def test_bfloat16_base_with_float32_adapters(make):
    layer = routed_layer(make().bfloat16())
    assert layer.lora_A["red"].weight.dtype == torch.float32
    x, weights, dy = torch.randn(2, 9, 64).bfloat16(), torch.rand(2, 9, 3), torch.randn(2, 9, 48).bfloat16()
    expected = outcome(float_version(layer), x.float(), weights, dy.float(), mixed=False)
    found = outcome(layer, x, weights, dy, mixed=True)
    assert {name: t.dtype for name, t in found.items()} == {
        **dict.fromkeys(expected, torch.float32),
        **dict.fromkeys(["x", "y"], torch.bfloat16),
    }
    for name in expected:
        assert difference(found[name], expected[name]) <= FEW_ULPS_OF_BFLOAT16, name


@needs_bfloat16
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_autocast(adapters):
    layer = routed_layer(nn.Linear(64, 48))
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapters)
    x, weights, dy = torch.randn(2, 9, 64), torch.rand(2, 9, 3), torch.randn(2, 9, 48)
    expected = outcome(float_version(layer), x, weights, dy, mixed=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(layer, x, weights, dy.bfloat16(), mixed=True)
        with torch.no_grad():
            layer.holder.generation = Generation()
            evaluated = layer(x), layer(x)
    assert found["y"].dtype == torch.bfloat16
    assert found["x"].dtype == torch.float32
    assert found["lora_A.red.weight"].dtype == adapters
    for name in expected:
        assert difference(found[name], expected[name]) <= FEW_ULPS_OF_BFLOAT16, name
    for y in evaluated:
        assert difference(y, expected["y"]) <= FEW_ULPS_OF_BFLOAT16


def test_autocast_leaves_float64_alone():
    layer = routed_layer(nn.Linear(7, 5)).double()
    x, weights, dy = torch.randn(2, 4, 7).double(), torch.rand(2, 4, 3).double(), torch.randn(2, 4, 5).double()
    expected = outcome(layer, x, weights, dy, mixed=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(layer, x, weights, dy, mixed=True)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_weights_keep_their_own_dtype_and_precision():
    layer = routed_layer(nn.Linear(7, 5)).double()
    x, weights, dy = torch.randn(2, 4, 7).double(), torch.rand(2, 4, 3), torch.randn(2, 4, 5).double()
    expected = outcome(layer, x, weights.double(), dy, mixed=True)
    found = outcome(layer, x, weights, dy, mixed=True)
    assert found["w"].dtype == torch.float32
    for name in expected:
        assert difference(found[name], expected[name]) <= (ulps(1) if name == "w" else EXACT), name
