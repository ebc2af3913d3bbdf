"""Invariant 1 for whole models: a mixture equals its definition, with the router read in a pass of its own.

In float64 throughout: routers, norms and the loss included.
"""

import pytest
import torch
from torch import Tensor

from dylora_moe import DyLoraMoE
from oracle import Oracle
from rounding import EXACT
from tiny import (
    ARCHITECTURES,
    LAYERS,
    NAMES,
    PLACEMENTS,
    assert_same_gradients,
    difference,
    every_architecture,
    every_combination,
    gradients,
    mixed_experts,
    tiny_base,
    tiny_mixture,
    tokens,
)

pytestmark = pytest.mark.usefixtures("exact")


def pair(architecture: str, train: bool = False, **settings) -> tuple[DyLoraMoE, Oracle]:
    model = tiny_mixture(architecture, torch.float64, **settings).train(train)
    return model, Oracle(model, tiny_base(architecture, torch.float64))


def balance(weights: Tensor) -> Tensor:
    """mean_e (load_e − 1/E)²."""
    load = weights.flatten(0, 1).mean(0)
    return ((load - 1 / len(load)) ** 2).mean()


@every_combination
def test_training_step(architecture, placement):
    model, oracle = pair(architecture, train=True, balance_coefficient=3.0, **PLACEMENTS[placement])
    ids = tokens()
    out = model(ids, labels=ids)
    weights = oracle.weights(oracle.logits(ids), k=None)
    expected = oracle.run(ids, weights, labels=ids)
    aux = 3.0 * balance(weights)
    loss = expected.loss + aux
    assert difference(out.routing_weights, weights) <= EXACT
    assert difference(out.logits, expected.logits) <= EXACT
    assert difference(out.lm_loss, expected.loss) <= EXACT
    assert difference(out.aux_loss, aux) <= EXACT
    assert difference(out.loss, loss) <= EXACT
    out.loss.backward()
    loss.backward()
    assert_same_gradients(gradients(model), oracle.gradients(), EXACT)


def test_an_expert_on_the_head():
    model, oracle = pair("llama", target_modules=["q_proj", "lm_head"])
    ids = tokens()
    weights = oracle.weights(oracle.logits(ids), k=2)
    expected = oracle.run(ids, weights).logits
    assert difference(model(ids).logits, expected) <= EXACT
    assert difference(model(ids, logits_to_keep=3).logits, expected[:, -3:]) <= EXACT
    assert difference(model.get_base_model()(ids).logits, expected) <= EXACT


@every_combination
def test_evaluation_keeps_the_best_two(architecture, placement):
    model, oracle = pair(architecture, **PLACEMENTS[placement])
    ids = tokens(3, 11)
    out = model(ids)
    weights = oracle.weights(oracle.logits(ids), k=2)
    assert ((weights > 0).sum(-1) == 2).all()
    assert difference(out.routing_weights, weights) <= EXACT
    assert difference(out.logits, oracle.run(ids, weights).logits) <= EXACT


@pytest.mark.parametrize(
    ("train", "settings", "k"),
    [
        (True, {"train_top_k": 2}, 2),
        (True, {"train_top_k": 1}, 1),
        (False, {"top_k": 1}, 1),
        (False, {"top_k": 3}, None),
        (True, {"temperature": 3.0}, None),
        (True, {"router_type": "linear"}, None),
        (True, {"route_to_base": True}, None),
        (False, {"route_to_base": True}, 2),
    ],
    ids=str,
)
def test_policies(train, settings, k):
    model, oracle = pair("llama", train, balance_coefficient=0.0, **settings)
    ids = tokens()
    out = model(ids, labels=ids)
    weights = oracle.weights(oracle.logits(ids), k)
    expected = oracle.run(ids, weights, labels=ids)
    assert out.routing_weights.shape == (*ids.shape, len(NAMES))
    assert difference(out.routing_weights, weights[..., : len(NAMES)]) <= EXACT
    assert difference(out.loss, expected.loss) <= EXACT
    out.loss.backward()
    expected.loss.backward()
    found, wanted = gradients(model), oracle.gradients()
    if k == 1:  # the weight of the single expert is 1, whatever its logit
        for name in [name for name in wanted if name.startswith("router")]:
            assert found.pop(name).abs().max() == 0
            del wanted[name]
    assert_same_gradients(found, wanted, EXACT)


@every_architecture
def test_mixed_experts(architecture):
    experts = mixed_experts(architecture)
    model, oracle = pair(architecture, True, experts=experts, router_layer=2, balance_coefficient=0.0)
    assert model.passes_per_step == 1 + 2 / LAYERS  # experts made elsewhere adapt every layer
    ids = tokens()
    out = model(ids, labels=ids)
    expected = oracle.run(ids, oracle.weights(oracle.logits(ids), None), labels=ids)
    assert difference(out.logits, expected.logits) <= EXACT
    out.loss.backward()
    expected.loss.backward()
    assert_same_gradients(gradients(model), oracle.gradients(), EXACT)


@every_combination
def test_sequence_granularity(architecture, placement):
    settings = {"granularity": "sequence", "balance_coefficient": 0.0, **PLACEMENTS[placement]}
    model, oracle = pair(architecture, True, **settings)
    ids, prompt = tokens(), torch.arange(9) < torch.tensor([[4], [6]])
    labels = ids.masked_fill(prompt, -100)
    out = model(ids, labels=labels)
    expected = oracle.run(ids, oracle.weights(oracle.logits(ids, prompt), None), labels=labels)
    assert difference(out.logits, expected.logits) <= EXACT
    out.loss.backward()
    expected.loss.backward()
    assert_same_gradients(gradients(model), oracle.gradients(), EXACT)


@pytest.mark.parametrize(
    ("architecture", "shape"), [("llama", (3,)), ("llama", (2, 3)), *((a, (2, 9, 3)) for a in ARCHITECTURES)], ids=str
)
def test_given_weights(architecture, shape):
    model, oracle = pair(architecture, router_layer=0, target_modules="all-linear")
    ids, weights = tokens(), torch.randn(shape, dtype=torch.float64, requires_grad=True)  # any finite values
    out = model(ids, labels=ids, routing_weights=weights)
    whole = weights.detach().reshape((1, 1, 3) if len(shape) == 1 else (2, -1, 3)).requires_grad_()
    expected = oracle.run(ids, whole, labels=ids)
    assert difference(out.logits, expected.logits) <= EXACT
    assert out.aux_loss is None
    out.loss.backward()
    expected.loss.backward()
    assert difference(weights.grad, whole.grad.reshape(shape)) <= EXACT
    assert_same_gradients(gradients(model), oracle.gradients(), EXACT)


@pytest.mark.parametrize("experts", [["red", "blue"], ["red", None], [None, "base"], ["base", "green"]], ids=str)
@every_architecture
def test_experts_per_row(architecture, experts):
    model, oracle = pair(architecture, True, balance_coefficient=0.0)
    ids = tokens()
    out = model(ids, labels=ids, experts=experts)
    weights = oracle.weights(oracle.logits(ids), None)
    for row, name in enumerate(experts):
        if name is not None:
            weights = weights.clone()
            weights[row] = torch.tensor([float(name == other) for other in NAMES])
    expected = oracle.run(ids, weights, labels=ids)
    assert difference(out.routing_weights, weights) <= EXACT
    assert difference(out.logits, expected.logits) <= EXACT
    out.loss.backward()
    expected.loss.backward()
    found, wanted = gradients(model), oracle.gradients()
    if None not in experts:  # what is not used has no gradient at all, where the loop has zeros
        wanted = {name: g for name, g in wanted.items() if any(f".{e}." in name for e in experts)}
    assert_same_gradients(found, wanted, EXACT)
