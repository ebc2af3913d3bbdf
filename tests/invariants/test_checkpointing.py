"""Invariant 8: gradient checkpointing gives the same gradients, bit for bit, and statistics count every token once."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from dylora_moe import DyLoraMoE, enable_routing
from tiny import (
    LAYERS,
    NAMES,
    PLACEMENTS,
    every_architecture,
    every_combination,
    every_placement,
    gradients,
    mixed_experts,
    tiny_base,
    tiny_mixture,
    tokens,
)

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


SWITCHES: dict[str, Callable[[DyLoraMoE], Any]] = {
    "model": lambda model: model.gradient_checkpointing_enable(),
    "model, as TRL does": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    "base": lambda model: model.get_base_model().activation_checkpointing_enable(),
    "base, every second layer": lambda model: model.get_base_model().activation_checkpointing_enable(every_n_layers=2),
    "decoder": lambda model: model.placement.decoder(model.get_base_model()).activation_checkpointing_enable(),
}


def count_layer_runs(model: Any) -> list[int]:
    """Grows by one whenever the attention of a decoder layer runs, recomputation included."""
    runs: list[int] = []
    for path, module in model.get_base_model().named_modules():
        if path.rpartition(".")[2] in ("self_attn", "attn"):
            module.register_forward_hook(lambda *_: runs.append(1))
    return runs


def several_forwards(model: DyLoraMoE) -> dict[str, Tensor]:
    """Gradients of one backward pass through four forward passes that are routed differently."""
    torch.manual_seed(3)
    first, second, third, fourth = (tokens(2, 7, seed=seed) for seed in range(4))
    weights = torch.randn(2, 7, 3, requires_grad=True)
    losses = [
        model(first, labels=first).loss,
        model(second, labels=second, experts="red").loss,
        model(third, labels=third, experts=["blue", None]).loss,
        model(fourth, labels=fourth, routing_weights=weights).loss,
        model(second, labels=second, experts=["blue", "green"]).loss,
    ]
    torch.stack(losses).sum().backward()
    found = gradients(model)
    model.zero_grad()
    return {**found, "weights": weights.grad}


def assert_exact(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(found[name], gradient), name


@every_combination
def test_several_forwards_before_one_backward(architecture, placement):
    model = tiny_mixture(architecture, lora_dropout=0.2, **PLACEMENTS[placement]).train()
    expected = several_forwards(model)
    model.gradient_checkpointing_enable()
    runs = count_layer_runs(model)
    assert_exact(several_forwards(model), expected)
    routing_passes = 2 * (model.passes_per_step - 1)  # of the first and the third
    recomputed = 2 if placement == "middle" else 4  # no gradient below layer k in the one-pass form
    assert len(runs) == 5 * (LAYERS + recomputed) + routing_passes * LAYERS
    model.gradient_checkpointing_disable()
    assert_exact(several_forwards(model), expected)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_however_it_was_switched_on(architecture, switch):
    model = tiny_mixture(architecture).train()
    expected = several_forwards(model)
    SWITCHES[switch](model)
    runs = count_layer_runs(model)
    assert_exact(several_forwards(model), expected)
    assert len(runs) == 5 * (LAYERS + (1 if "second" in switch else 3))  # layer 0 is below the router layer
    SWITCHES[switch](model)  # Trainer and TRL switch it on once more
    assert_exact(several_forwards(model), expected)


def test_switched_on_before_the_mixture_was_made():
    base = tiny_base("llama")
    base.gradient_checkpointing_enable()
    model = tiny_mixture("llama", base=base).train()
    expected = several_forwards(tiny_mixture("llama").train())
    assert_exact(several_forwards(model), expected)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"granularity": "sequence"}, {"granularity": "prefix"}, {"route_to_base": True}],
    ids=str,
)
def test_further_settings(settings):
    model = tiny_mixture("llama", balance_coefficient=1.0, **settings).train()

    def step() -> dict[str, Tensor]:
        ids = tokens()
        model(ids, labels=ids.masked_fill(torch.arange(9) < 4, -100)).loss.backward()
        found = gradients(model)
        model.zero_grad()
        return found

    expected = step()
    model.gradient_checkpointing_enable()
    assert_exact(step(), expected)


@every_placement
def test_statistics_are_counted_once(placement):
    model = tiny_mixture("llama", **PLACEMENTS[placement]).train()
    model.gradient_checkpointing_enable()
    scored: list[int] = []
    model.router.register_forward_hook(lambda *_: scored.append(1))
    with model.trace() as trace, model.recording() as records:
        losses = [model(tokens(seed=seed), labels=tokens()).loss for seed in range(3)]
        torch.stack(losses).sum().backward()  # recomputes within the trace
    assert len(scored) == len(trace.passes) == len(records) == 3
    assert trace.weights.shape == (2, 27, 3)
    assert set(trace.reached.values()) == {3}
    assert set(trace.layers_reached) == {layer.routing_name for layer in model.routed_layers}
    assert abs(sum(trace.load().values()) - 1) < 1e-6


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"preserve_rng_state": True}], ids=str)
@pytest.mark.parametrize("switch", ["model", "base"])
def test_reentrant_checkpointing_is_refused(switch, kwargs):
    model = tiny_mixture("llama").train()
    owner = model if switch == "model" else model.get_base_model()
    owner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    with pytest.raises(ValueError, match=r"reentrant gradient checkpointing .* would silently lose"):
        model(tokens(), labels=tokens())
    assert model.holder.now is model.holder.resting
    model.eval()(tokens())  # evaluation does not checkpoint
    owner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()(tokens(), labels=tokens()).loss.backward()


def test_generating_while_checkpointing_is_on():
    model = tiny_mixture("llama", **PLACEMENTS["below"])
    expected = model.generate(tokens(), max_new_tokens=5, do_sample=False)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(tokens(), max_new_tokens=5, do_sample=False), expected)
    assert torch.equal(model.train().eval().generate(tokens(), max_new_tokens=5, do_sample=False), expected)


@every_architecture
def test_a_routed_peft_model(architecture):
    experts = mixed_experts(architecture, lora_dropout=0.2)
    model = get_peft_model(tiny_base(architecture), experts["red"], adapter_name="red")
    for name in ("green", "blue"):
        model.add_adapter(name, experts[name])
    model.base_model.set_adapter(list(NAMES))
    model = enable_routing(model).train()

    def step(model: Any) -> dict[str, Tensor]:
        torch.manual_seed(5)
        losses, weights = [], [torch.randn(2, 9, 3, requires_grad=True) for _ in range(2)]
        for w in weights:
            losses.append(model(tokens(), labels=tokens(), routing_weights=w).loss)
        losses.append(model(tokens(), labels=tokens()).loss)  # stock PEFT
        torch.stack(losses).sum().backward()
        return {**gradients(model), "first": weights[0].grad, "second": weights[1].grad}

    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs = count_layer_runs(twin)
    assert_exact(step(twin), step(model))
    assert len(runs) == 2 * 3 * LAYERS
