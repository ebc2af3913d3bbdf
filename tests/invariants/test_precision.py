"""Invariant 11, without a trainer: bf16, autocast and full-graph compilation are the plain run within a tolerance.

What eight bits of mantissa may cost is measured, not guessed: at most five times what they cost one stock adapter on
the same base, since the router's choice moves as well.
"""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from dylora_moe import DyLoraMoE, enable_routing
from rounding import FLOAT32, needs_bfloat16
from tiny import (
    NAMES,
    PLACEMENTS,
    difference,
    every_architecture,
    every_combination,
    gradients,
    mixed_experts,
    tiny_base,
    tiny_mixture,
    tokens,
)

COMPILED = FLOAT32
"""The compiled graph adds up in another order in float32."""


def step(model: Any, **options: Any) -> dict[str, Tensor]:
    """Logits, loss and gradients of one step."""
    out = model(tokens(), labels=tokens(), **options)
    out.loss.backward()
    found = gradients(getattr(model, "_orig_mod", model))
    model.zero_grad()
    return {"logits": out.logits, "loss": out.loss, **found}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest gradient of all where it is one."""
    assert found.keys() == expected.keys()
    largest = max(float(t.abs().max()) for name, t in expected.items() if name not in ("logits", "loss"))
    far = [difference(found[name], expected[name]) for name in ("logits", "loss")]
    far += [float((found[name] - t).abs().max()) / largest for name, t in expected.items() if name not in far]
    return max(far)


def relative_norm(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over everything."""
    assert found.keys() == expected.keys()
    flat = [torch.cat([t[name].double().flatten() for name in expected]) for t in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@needs_bfloat16
@every_combination
def test_bfloat16_autocast(architecture, placement):
    model = tiny_mixture(architecture, **PLACEMENTS[placement]).train()
    error = {}
    for experts in (None, "red"):
        expected = step(model, experts=experts)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(tokens()).router_logits.dtype == torch.float32
            error[experts] = relative_norm(step(model, experts=experts), expected)
    assert 0 < error[None] <= 5 * error["red"]


@needs_bfloat16
@every_architecture
def test_bfloat16_base(architecture):
    model = tiny_mixture(architecture, torch.bfloat16).train()
    exact = copy.deepcopy(model).float()
    assert {t.tensor.dtype for t in model.expert_tensors("red")} == {torch.float32}
    tolerance = 5 * relative_norm(step(model, experts="red"), step(exact, experts="red"))
    found = step(model)
    assert found["logits"].dtype == torch.bfloat16
    assert 0 < relative_norm(found, step(exact)) <= tolerance
    model.bfloat16()  # casts router and experts, too
    assert model(tokens()).router_logits.dtype == torch.float32
    assert relative_norm(step(model), step(exact)) <= tolerance


def compiled(model: DyLoraMoE) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def small(architecture: str, layers: int = 2, **settings: Any) -> DyLoraMoE:
    """A mixture of few layers, whose base knows its loss (GPT-2 looks it up with a warning, which breaks the graph)."""
    base = tiny_base(architecture, **{"n_layer" if architecture == "gpt2" else "num_hidden_layers": layers})
    base.loss_type = "ForCausalLM"
    return tiny_mixture(architecture, base=base, **settings)


def test_compiled_training_step():
    model = small("llama", layers=1, router_layer=0).train()
    expected = step(model)
    assert distance(step(compiled(model)), expected) <= COMPILED


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("settings", [{"router_layer": 1}, {"router_layer": "last"}], ids=str)
@every_architecture
def test_compiled(architecture, settings, train):
    model = small(architecture, **settings).train(train)
    options = [{}, {"experts": "red"}, {"experts": ["blue", None]}, {"routing_weights": torch.randn(2, 3)}]
    expected = [step(model, **o) for o in options]
    fast = compiled(model)
    for o, wanted in zip(options, expected, strict=True):
        found = step(fast, **o)
        for name in found.keys() - wanted.keys():  # one graph for every forced expert: zeros instead of None
            assert not found.pop(name).any()
        assert distance(found, wanted) <= COMPILED
    assert model.holder.now is model.holder.resting


@pytest.mark.slow
@every_architecture
def test_compiled_routed_peft_model(architecture):
    experts = mixed_experts(architecture)
    base = tiny_base(architecture)
    base.loss_type = "ForCausalLM"
    model = get_peft_model(base, experts["red"], adapter_name="red")
    for name in ("green", "blue"):
        model.add_adapter(name, experts[name])
    model.base_model.set_adapter(list(NAMES))
    model = enable_routing(model)
    weights = torch.randn(2, 9, 3)
    expected = [step(model), step(model, routing_weights=weights)]
    fast = compiled(model)
    assert distance(step(fast), expected[0]) <= COMPILED
    assert distance(step(fast, routing_weights=weights), expected[1]) <= COMPILED
