"""Invariant 2: without routing, or with the whole batch forced to one expert, every bit is PEFT's."""

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from dylora_moe import DyLoraMoE, enable_routing
from rounding import FLOAT32, needs_bfloat16
from tiny import (
    ATTENTION_INPUT,
    NAMES,
    PLACEMENTS,
    difference,
    every_architecture,
    every_combination,
    gradients,
    mixed_experts,
    stock_adapter,
    tiny_base,
    tiny_mixture,
    tokens,
)


def step(model: Any, **options: Any) -> dict[str, Tensor]:
    """Logits, loss and gradients of one training step from seed 7."""
    torch.manual_seed(7)
    ids = tokens()
    out = model(ids, attention_mask=torch.ones_like(ids), labels=ids, **options)
    out.loss.backward()
    found = gradients(model)
    model.zero_grad()
    return {"logits": out.logits, "loss": out.loss, **found}


def assert_bitwise(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def stock_peft(architecture: str, dropout: float = 0.3) -> PeftModel:
    """A stock PEFT model with three different adapters, all active, in training mode with dropout."""
    experts = mixed_experts(architecture, lora_dropout=dropout)
    model = get_peft_model(tiny_base(architecture), experts["red"], adapter_name="red")
    for name in ("green", "blue"):
        model.add_adapter(name, experts[name])
    model.base_model.set_adapter(list(NAMES))
    return model.train()


@every_architecture
def test_enabling_routing_changes_nothing_without_the_argument(architecture):
    stock = stock_peft(architecture)
    routed = enable_routing(copy.deepcopy(stock))
    assert_bitwise(step(routed), step(stock))
    weights = torch.tensor([0.2, 0.3, 0.5])
    assert not torch.equal(step(routed, routing_weights=weights)["logits"], step(stock)["logits"])
    assert_bitwise(step(routed), step(stock))  # nothing stays in force
    for model in (stock, routed):
        model.eval()
        model.base_model.set_adapter(["blue", "red"])
    assert_bitwise(step(routed), step(stock))
    found, expected = (m.generate(tokens(), max_new_tokens=4, do_sample=False) for m in (routed, stock))
    assert torch.equal(found, expected)
    with routed.disable_adapter(), stock.disable_adapter():
        assert torch.equal(routed(tokens()).logits, stock(tokens()).logits)


@every_architecture
def test_the_state_dict_is_that_of_peft(architecture):
    stock = stock_peft(architecture)
    routed = enable_routing(copy.deepcopy(stock))
    assert_bitwise(dict(routed.state_dict()), dict(stock.state_dict()))
    assert not routed.holder.now.anything


@every_combination
def test_a_batch_forced_to_one_expert(architecture, placement):
    model = tiny_mixture(architecture, lora_dropout=0.3, **PLACEMENTS[placement])
    stock = stock_adapter(model, tiny_base(architecture), "green")
    for train in (True, False):
        expected = step(stock.train(train))
        model.train(train)
        assert_bitwise(step(model, experts="green"), expected)
        assert_bitwise(step(model, experts=["green", "green"]), expected)
        with model.use_experts("green"):
            assert_bitwise(step(model), expected)


@every_architecture
def test_each_of_several_different_experts(architecture):
    model = tiny_mixture(architecture, experts=mixed_experts(architecture, lora_dropout=0.1)).train()
    for name in NAMES:
        assert_bitwise(step(model, experts=name), step(stock_adapter(model, tiny_base(architecture), name)))


def test_dora_and_an_embedding():
    settings = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "router_layer": 0}
    model = tiny_mixture("llama", **settings).train()
    assert_bitwise(step(model, experts="red"), step(stock_adapter(model, tiny_base("llama"), "red")))


@needs_bfloat16
@pytest.mark.parametrize("autocast", [True, False])
@every_architecture
def test_low_precision(architecture, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    model = tiny_mixture(architecture, dtype).train()
    stock = stock_adapter(model, tiny_base(architecture, dtype), "blue")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_bitwise(step(model, experts="blue"), step(stock))


@every_architecture
def test_generation_by_one_expert(architecture):
    model = tiny_mixture(architecture, **PLACEMENTS["below"])
    stock = stock_adapter(model, tiny_base(architecture), "red")
    for how in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3}):
        options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, **how}
        torch.manual_seed(3)
        found = model.generate(tokens(), experts="red", **options)
        torch.manual_seed(3)
        expected = stock.generate(tokens(), **options)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert torch.equal(ours, theirs)


@every_combination
def test_forcing_the_base(architecture, placement):
    model = tiny_mixture(architecture, lora_dropout=0.3, **PLACEMENTS[placement])
    base, ids = tiny_base(architecture), tokens()
    for train in (True, False):
        expected = base.train(train)(ids, labels=ids)
        for experts in ("base", ["base", "base"]):
            out = model.train(train)(ids, labels=ids, experts=experts)
            assert torch.equal(out.logits, expected.logits)
            assert torch.equal(out.loss, expected.loss)
            assert not out.routing_weights.any()
    assert torch.equal(
        model.generate(ids, experts="base", max_new_tokens=5, do_sample=False),
        base.generate(ids, max_new_tokens=5, do_sample=False),
    )


def test_enabling_twice_and_adding_adapters_later():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = stock_peft("llama", dropout=0.0).eval()
    assert enable_routing(enable_routing(model)) is model
    target = ATTENTION_INPUT.get("llama", "q_proj")
    model.add_adapter("late", LoraConfig(r=2, target_modules=[target, "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["late", "red"])
    ids = tokens()
    found = model(ids, routing_weights=torch.tensor([1.0, 0.0])).logits
    model.base_model.set_adapter(["late"])
    assert difference(found, model(ids).logits) <= FLOAT32


def test_the_classes_are_those_of_peft():
    model = tiny_mixture("llama")
    assert isinstance(model, DyLoraMoE)
    assert isinstance(model, PeftModel)
    stock = stock_peft("llama")
    routed = enable_routing(copy.deepcopy(stock))
    assert isinstance(routed, type(stock))
    for ours, theirs in zip(routed.modules(), stock.modules(), strict=True):
        assert isinstance(ours, type(theirs))
