"""Where deciding and applying meet: what is in force at every layer of a pass, and who is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dylora_moe import DyLoraMoE
from dylora_moe.layers.in_force import Generation, InForce
from dylora_moe.routing.call import Call
from tiny import NAMES, PLACEMENTS, difference, tiny_mixture, tokens


def seen_by_layers(model: DyLoraMoE, run: Any) -> list[InForce]:
    """What is in force when each decoder layer begins."""
    seen: list[InForce] = []
    layers = model.placement.layers(model.get_base_model())
    handles = [layer.register_forward_pre_hook(lambda *_: seen.append(model.holder.now)) for layer in layers]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def test_below_the_router_the_base_then_one_value_for_all():
    model = tiny_mixture("llama", router_layer=2, top_k=2)
    below, also, at, above = seen_by_layers(model, lambda: model(tokens()))
    assert below is also
    assert below.forced == ()
    assert at is above
    assert at.names == NAMES
    assert at.active.shape == (2, 9, 2)
    assert (at.weights.gather(-1, at.active).sum(-1) > 0.999).all()
    assert model.holder.now is model.holder.resting


def test_a_decision_of_the_caller_is_in_force_from_the_start():
    model = tiny_mixture("llama", router_layer=2)
    assert {now.forced for now in seen_by_layers(model, lambda: model(tokens(), experts="red"))} == {("red",)}
    mixed = seen_by_layers(model, lambda: model(tokens(), experts=["red", "base"]))
    assert {now.names for now in mixed} == {("red",)}  # experts that no row uses are not touched
    assert {now.rows for now in mixed} == {(0, -1)}
    given = seen_by_layers(model, lambda: model(tokens(), routing_weights=torch.tensor([0.2, 0.3, 0.5])))
    assert all(now.active is None and now.weights.shape == (1, 1, 3) for now in given)


def test_the_form_is_the_configurations():
    model = tiny_mixture("llama", router_layer=0, mixing_form="reference", recompute_shrink=True)
    assert {(now.form, now.recompute_shrink) for now in seen_by_layers(model, lambda: model(tokens()))} == {
        ("reference", True)
    }


def test_the_policy_follows_mode_configuration_and_states():
    model = tiny_mixture("llama", top_k=1)
    assert (model.policy.k, model.policy.masked) == (1, ())
    assert model.train().policy.k is None
    model.moe_config.train_top_k, model.moe_config.temperature = 2, 0.5
    assert (model.policy.k, model.policy.temperature) == (2, 0.5)
    model.add_expert("late")
    assert model.policy.masked == (3,)


def test_a_generation_left_behind_by_an_interrupt_is_taken_down():
    model = tiny_mixture("llama")
    expected = model(tokens()).logits
    model.holder.generation = Generation()
    assert torch.equal(model.get_base_model()(tokens()).logits, expected)
    assert model.holder.generation is None
    model.holder.generation = Generation()
    with model.hooks.calling(Call()):
        assert model.holder.generation is None
    assert model.holder.generation is None


@pytest.mark.parametrize("placement", ["first", "middle", "last", "below"])
def test_prompt_scores_are_those_that_a_generation_holds(placement):
    model, ids = tiny_mixture(granularity="sequence", **PLACEMENTS[placement]), tokens(1, 9)
    scores = model.hooks.prompt_scores({"input_ids": ids})
    with torch.no_grad():
        expected = model(ids).router_logits[:, :1]
    assert difference(scores, expected) <= 1e-5
    assert model.holder.now is model.holder.resting
