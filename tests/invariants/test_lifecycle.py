"""Invariant 15: adding, removing, renaming and freezing leave the other experts and router rows bit-identical."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dylora_moe import DyLoraMoE
from rounding import EXACT, float64_throughout
from tiny import (
    ATTENTION_INPUT,
    NAMES,
    difference,
    every_architecture,
    mixed_experts,
    tiny_mixture,
    tokens,
)


def add(model: DyLoraMoE) -> None:
    model.add_expert("late")


def add_another_shape(model: DyLoraMoE) -> None:
    target = ATTENTION_INPUT.get(model.config.model_type, "q_proj")
    model.add_expert("late", LoraConfig(r=7, target_modules=[target], use_rslora=True, init_lora_weights=False))


def remove(model: DyLoraMoE) -> None:
    model.remove_expert("green")


def remove_the_first(model: DyLoraMoE) -> None:
    model.remove_expert("red")


def rename(model: DyLoraMoE) -> None:
    model.rename_expert("green", "verdant")


def freeze(model: DyLoraMoE) -> None:
    model.freeze_expert("green")


def add_and_remove(model: DyLoraMoE) -> None:
    model.add_expert("late")
    model.start_routing("late")
    model.remove_expert("late")


def fail_to_add(model: DyLoraMoE) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        model.add_expert("late", LoraConfig(target_modules=["nowhere"]))


def freeze_the_last(model: DyLoraMoE) -> None:
    model.freeze_expert("late")


def fail_to_add_again(model: DyLoraMoE) -> None:
    with pytest.raises(ValueError, match="'late' exists already"):
        model.add_expert("late")


CHANGES: list[Callable[[DyLoraMoE], None]] = [
    add,
    add_another_shape,
    remove,
    remove_the_first,
    rename,
    freeze,
    add_and_remove,
    fail_to_add,
]


def state(model: DyLoraMoE) -> dict[str, dict[str, Any]]:
    """Per expert: its tensors, its router row, its forced logits, and what it does as a row of a mixed batch."""
    ids, found = tokens(), {}
    for column, name in enumerate(model.expert_names):
        with torch.no_grad():
            found[name] = {
                "tensors": [t.tensor.detach().clone() for t in model.expert_tensors(name)],
                "row": model.router.up[column].detach().clone(),
                "forced": model(ids, experts=name).logits,
                "generated": model.generate(ids, experts=name, max_new_tokens=2, do_sample=False),
            }
    return found


def assert_identical(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    else:
        assert found.keys() == expected.keys()
        for key in expected:
            assert_identical(found[key], expected[key])


@pytest.mark.parametrize(("architecture", "different"), [("llama", False), ("llama", True), ("gpt2", True)])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_other_experts_stay(architecture, change, different):
    model = tiny_mixture(architecture, experts=mixed_experts(architecture) if different else None)
    before, down = state(model), model.router.down.detach().clone()
    change(model)
    after = state(model)
    if "verdant" in after:
        assert list(after) == ["red", "verdant", "blue"]
        after["green"] = after.pop("verdant")
    survivors = [name for name in before if name in after]
    assert len(survivors) == 3 - change.__name__.startswith("remove")
    assert_identical({name: after[name] for name in survivors}, {name: before[name] for name in survivors})
    assert torch.equal(model.router.down, down)
    model.train()(tokens(), labels=tokens()).loss.backward()


@every_architecture
def test_the_others_stay_through_a_whole_life(architecture):
    model = tiny_mixture(architecture, experts=mixed_experts(architecture))
    before = state(model)
    for change in (add_another_shape, remove_the_first, rename, freeze_the_last, fail_to_add_again):
        change(model)
    after = state(model)
    assert list(after) == ["verdant", "blue", "late"]
    assert_identical(after["verdant"], before["green"])
    assert_identical(after["blue"], before["blue"])


@every_architecture
@float64_throughout()
def test_a_new_expert_changes_no_routed_output_until_it_is_routed(architecture):
    model = tiny_mixture(architecture, torch.float64, route_to_base=True)
    expected = {train: model.train(train)(tokens()) for train in (True, False)}
    model.add_expert("late", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    for train in (True, False):
        out = model.train(train)(tokens())
        assert difference(out.logits, expected[train].logits) <= EXACT
        assert difference(out.routing_weights[..., :3], expected[train].routing_weights) <= EXACT
        assert not out.routing_weights[..., 3].any()
        assert out.router_logits[..., 3].eq(-torch.inf).all()
    labelled = model.train()(tokens(), labels=tokens())
    assert labelled.loss.isfinite()
    labelled.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.router.parameters())
    assert not model.router.up.grad[3].any()
    model.start_routing("late")
    out = model(tokens(), labels=tokens())
    assert (out.routing_weights[..., 3] > 0).all()
    model.zero_grad()
    out.loss.backward()
    assert model.router.up.grad[3].any()


def test_removing_undoes_adding_for_routed_outputs():
    model = tiny_mixture("llama", torch.float64)
    expected = model(tokens())
    add_and_remove(model)
    out = model(tokens())
    assert torch.equal(out.routing_weights, expected.routing_weights)
    assert torch.equal(out.logits, expected.logits)


@every_architecture
def test_freezing_keeps_tensors_through_an_optimizer_step(architecture):
    model = tiny_mixture(architecture).train()
    model.freeze_expert("green")
    before = {name: [t.tensor.detach().clone() for t in model.expert_tensors(name)] for name in NAMES}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    for name in NAMES:
        changed = [
            not torch.equal(t.tensor, old) for t, old in zip(model.expert_tensors(name), before[name], strict=True)
        ]
        assert all(changed) if name != "green" else not any(changed)


def test_passes_follow_the_set_of_experts():
    model = tiny_mixture("llama", router_layer=2)
    assert model.passes_per_step == 1.0
    model.add_expert("low", LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]))
    assert model.passes_per_step == 1.5
    model.remove_expert("low")
    assert model.passes_per_step == 1.0
