"""Invariant 9: one pass of the base per step in the one-pass form, counted; backward reaches no layer below k."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dylora_moe import DyLoraMoE
from tiny import (
    ARCHITECTURES,
    LAYERS,
    PLACEMENTS,
    every_combination,
    every_granularity,
    every_placement,
    gradients,
    tiny_base,
    tiny_mixture,
    tokens,
)

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

PASSES = {"first": 1.0, "middle": 1.0, "last": 2.0, "below": 1.5}


class Counter:
    """Counts the tokens that go through every decoder layer, and the layers that backward goes through."""

    def __init__(self, model: DyLoraMoE):
        self.forward, self.backward = [0] * LAYERS, [0] * LAYERS
        for index, layer in enumerate(model.placement.layers(model.get_base_model())):
            layer.register_forward_hook(lambda *args, index=index: self.ran(index, args[1], args[2]))

    def ran(self, index: int, args: tuple, output: Any) -> None:
        self.forward[index] += args[0].shape[1]
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.reached(index))

    def reached(self, index: int) -> None:
        self.backward[index] += 1

    def passes(self, tokens: int) -> float:
        return sum(self.forward) / LAYERS / tokens


@every_combination
def test_training_step_and_evaluation(architecture, placement):
    model = tiny_mixture(architecture, **PLACEMENTS[placement])
    assert model.passes_per_step == PASSES[placement]
    for train in (True, False):
        counter = Counter(model.train(train))
        for _ in range(3):
            model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
        assert counter.passes(3 * 9) == PASSES[placement]


@every_granularity
@every_combination
def test_generated_tokens(architecture, placement, granularity):
    model = tiny_mixture(architecture, granularity=granularity, **PLACEMENTS[placement])
    counter = Counter(model)
    model.generate(tokens(2, 9), max_new_tokens=5, do_sample=False)
    if granularity == "sequence":  # only the prompt is read
        assert counter.passes(1) == 9 * PASSES[placement] + 4
    else:  # the last token is not fed back
        assert counter.passes(9 + 4) == PASSES[placement]


@pytest.mark.parametrize("experts", ["red", "base", ["red", "blue"]], ids=str)
@every_placement
def test_forced_calls_never_need_a_routing_pass(placement, experts):
    model = tiny_mixture("llama", **PLACEMENTS[placement])
    counter = Counter(model)
    model(tokens(2, 9), experts=experts)
    model.generate(tokens(2, 9), max_new_tokens=5, experts=experts, do_sample=False)
    with model.disable_adapter():
        model(tokens(2, 9))
    model(tokens(2, 9), routing_weights=torch.ones(3))
    assert counter.passes(9 + 13 + 9 + 9) == 1.0


def test_the_default_is_a_quarter_of_the_way_up_in_one_pass():
    model = tiny_mixture("llama", router_layer=None)
    assert model.router_layer == 1
    assert model.passes_per_step == 1.0
    adapted = {model.placement.layer_of(layer.routing_name) for layer in model.routed_layers}
    assert adapted == {1, 2, 3}


@pytest.mark.parametrize("router_layer", range(LAYERS))
def test_every_router_layer(router_layer):
    one = tiny_mixture("gpt2", router_layer=router_layer)
    two = tiny_mixture("gpt2", router_layer=router_layer, layers_to_transform=[0, 3])
    for model, passes in ((one, 1.0), (two, 1 + router_layer / LAYERS if router_layer else 1.0)):
        counter = Counter(model)
        model(tokens(2, 9))
        assert counter.passes(9) == model.passes_per_step == passes


def test_an_expert_on_the_embeddings_needs_the_routing_pass():
    model = tiny_mixture("llama", router_layer=1, target_modules=["embed_tokens", "q_proj"])
    counter = Counter(model)
    model(tokens(2, 9))
    assert counter.passes(9) == model.passes_per_step == 1 + 1 / LAYERS
    with model.disable_adapter():
        hidden = model(tokens(2, 9), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(model(tokens(2, 9)).router_logits, model.router(hidden))


def embedding_hooks(model: DyLoraMoE) -> int:
    return len(model.get_input_embeddings()._forward_hooks)


REQUIRE_GRADS = {
    "never": lambda base: None,
    "once": lambda base: base.enable_input_require_grads(),
    "twice": lambda base: (base.enable_input_require_grads(), base.enable_input_require_grads()),
    "by checkpointing": lambda base: base.gradient_checkpointing_enable(),
}


@pytest.mark.parametrize("how", REQUIRE_GRADS)
@pytest.mark.parametrize(("architecture", "placement"), [("llama", "first"), *((a, "middle") for a in ARCHITECTURES)])
def test_backward_stops_at_the_router_layer(architecture, placement, how):
    model = tiny_mixture(architecture, **PLACEMENTS[placement]).train()
    REQUIRE_GRADS[how](model.get_base_model())
    model.enable_input_require_grads()  # Trainer and TRL do
    k, counter = model.router_layer_index, Counter(model)
    out = model(tokens(), labels=tokens(), output_hidden_states=True)
    assert [hidden.requires_grad for hidden in out.hidden_states] == [i > k for i in range(LAYERS + 1)]
    out.loss.backward()
    assert [bool(count) for count in counter.backward] == [i >= k for i in range(LAYERS)]
    assert all(f".{i}." not in name for name in gradients(model) for i in range(k))


@pytest.mark.parametrize("before", [True, False])
def test_backward_stops_when_the_base_was_prepared_before(before):
    base = tiny_base("llama")
    if before:
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable()
    model = tiny_mixture("llama", base=base, router_layer=2).train()
    if not before:
        model.get_base_model().gradient_checkpointing_enable()
        model.get_base_model().enable_input_require_grads()
        model.base_model.enable_input_require_grads()
    out = model(tokens(), labels=tokens(), output_hidden_states=True)
    assert not any(hidden.requires_grad for hidden in out.hidden_states[:3])


def test_a_hook_of_the_user_on_the_embeddings_stays():
    model, seen = tiny_mixture("llama", router_layer=2).train(), []
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    model.get_base_model().enable_input_require_grads()
    model(tokens(), labels=tokens())
    assert seen == [1]


def test_the_router_reads_the_frozen_base_whatever_the_experts_are():
    model = tiny_mixture("llama", router_layer=2)
    expected = model(tokens()).router_logits
    for parameter in model.expert_tensors("red") + model.expert_tensors("blue"):
        nn.init.normal_(parameter.tensor)
    assert torch.equal(model(tokens()).router_logits, expected)
