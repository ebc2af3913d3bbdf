"""Invariant 14: forced experts get gradients, all others and the router have none."""

import pytest
import torch

from dylora_moe import DyLoraMoE, MoELoraConfig, gradient_report
from tiny import NAMES, PLACEMENTS, every_architecture, every_placement, tiny_base, tiny_mixture, tokens


def gpt2_with_two_experts() -> DyLoraMoE:
    """The GPT-2 shape of twelve layers, r=8, alpha=16 on c_attn, router at the embeddings."""
    config = MoELoraConfig(
        num_experts=2,
        r=8,
        lora_alpha=16,
        target_modules=["c_attn"],
        router_layer=0,
        balance_coefficient=0.01,
        init_lora_weights=False,
    )
    return DyLoraMoE.from_base(tiny_base("gpt2", n_layer=12), config).train()


def counts(model: DyLoraMoE) -> dict[str, tuple[int, int]]:
    """Per group: tensors with a gradient, tensors."""
    return {name: (stats.with_gradient, stats.tensors) for name, stats in gradient_report(model).items()}


def test_a_routed_step_reaches_router_and_all_experts():
    model = gpt2_with_two_experts()
    with model.trace() as trace:
        model(tokens(), labels=tokens()).loss.backward()
    found = counts(model)
    frozen = len(list(model.get_base_model().parameters())) - 48
    assert found == {"expert_0": (24, 24), "expert_1": (24, 24), "router": (2, 2), "frozen": (0, frozen)}
    assert len(trace.layers_reached) == 12
    assert set(trace.reached.values()) == {1}
    assert all(stats.maximum > 0 for name, stats in gradient_report(model).items() if name != "frozen")


@pytest.mark.parametrize("forced", [0, 1])
@pytest.mark.parametrize("per_row", [True, False])
def test_a_forced_expert_alone_has_gradients(forced, per_row):
    model, name = gpt2_with_two_experts(), f"expert_{forced}"
    with model.trace() as trace:
        model(tokens(), labels=tokens(), experts=[name, name] if per_row else name).loss.backward()
    found = counts(model)
    assert found[name] == (24, 24)
    assert found[f"expert_{1 - forced}"] == (0, 24)
    assert found["router"] == (0, 2)
    assert found["frozen"][0] == 0
    assert len(trace.layers_reached) == 12


def test_the_balance_loss_alone_reaches_the_router():
    model = gpt2_with_two_experts()
    out = model(tokens(), labels=tokens())
    assert out.aux_loss.item() == pytest.approx(0.01 * out.balance_loss.item())
    out.aux_loss.backward()
    assert counts(model)["router"] == (2, 2)
    assert all(parameter.grad.abs().max() > 0 for parameter in model.router.parameters())
    assert counts(model)["expert_0"] == counts(model)["expert_1"] == (0, 24)


WAYS = [
    (["red", "blue"], {"red", "blue"}),
    (["red", "base"], {"red"}),
    (["base", "base"], set()),
    (["red", None], {*NAMES, "router"}),
    ([None, None], {*NAMES, "router"}),
    ("blue", {"blue"}),
    (None, {*NAMES, "router"}),
]


@every_architecture
def test_every_way_to_force(architecture):
    model = tiny_mixture(architecture).train()
    for experts, reached in WAYS:
        loss = model(tokens(), labels=tokens(), experts=experts).loss
        if reached:
            loss.backward()
        else:
            assert not loss.requires_grad
        found = counts(model)
        for name in (*NAMES, "router"):
            assert found[name] == (found[name][1] if name in reached else 0, found[name][1]), (experts, name)
        assert found["frozen"][0] == 0
        model.zero_grad()


@every_placement
def test_use_experts_and_given_weights(placement):
    model = tiny_mixture("llama", **PLACEMENTS[placement]).train()
    with model.use_experts("green"):
        model(tokens(), labels=tokens()).loss.backward()
    found = counts(model)
    assert {name for name in (*NAMES, "router") if found[name][0]} == {"green"}
    model.zero_grad()
    model(tokens(), labels=tokens(), routing_weights=torch.tensor([0.5, 0.5, 0.0])).loss.backward()
    found = counts(model)
    assert found["router"][0] == 0
    assert found["red"][0] == found["red"][1]


def test_frozen_experts_have_no_gradient_but_the_router_learns_to_use_them():
    model = tiny_mixture("llama").train()
    for name in NAMES:
        model.freeze_expert(name)
    model(tokens(), labels=tokens()).loss.backward()
    found = counts(model)
    assert found["router"] == (2, 2)
    assert all(found[name][0] == 0 for name in NAMES)
    model.unfreeze_expert("blue")
    model(tokens(), labels=tokens()).loss.backward()
    assert counts(model)["blue"][0] == counts(model)["blue"][1]
