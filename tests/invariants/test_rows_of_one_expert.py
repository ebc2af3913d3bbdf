"""Invariant 1 for batches whose rows are all forced: each row computes its own expert only, and the loop's result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe import DyLoraMoE
from dylora_moe.layers import groups
from rounding import EXACT, float64_throughout
from tiny import (
    NAMES,
    PLACEMENTS,
    assert_same_gradients,
    difference,
    every_architecture,
    every_placement,
    gradients,
    mixed_experts,
    tiny_base,
    tiny_mixture,
    tokens,
)

LENGTH = 20
WAYS = [["red", "blue"], ["green", "base", "green", "red"], ["blue", "red", "red", "green", "base", "red"]]


@pytest.fixture
def rowwise(monkeypatch) -> list[int]:
    """Grows by one whenever layers are computed row by row, so that no other form answers in its place."""
    calls: list[int] = []
    real = groups.row_mixture
    monkeypatch.setattr(groups, "row_mixture", lambda *a, **how: calls.append(1) or real(*a, **how))
    return calls


def step(model: DyLoraMoE, form: str, experts: list[str], **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.moe_config.mixing_form = form
    model.zero_grad()
    ids = tokens(len(experts), LENGTH)
    output = model(ids, labels=ids, experts=experts, **inputs)
    output.loss.backward()
    return output.logits, gradients(model)


def assert_the_loop_s(model: DyLoraMoE, experts: list[str], rowwise: list[int]) -> None:
    expected, theirs = step(model, "reference", experts)
    assert rowwise == []
    found, ours = step(model, "auto", experts)
    assert rowwise
    assert difference(found, expected) <= EXACT
    assert_same_gradients(ours, theirs, EXACT)
    used = {name for name in NAMES for path in ours if f".{name}." in path}
    assert used == set(experts) - {"base"}
    with torch.no_grad():
        assert difference(model.eval()(tokens(len(experts), LENGTH), experts=experts).logits, expected) <= EXACT


@float64_throughout()
@every_architecture
@pytest.mark.parametrize("experts", WAYS, ids=len)
def test_outputs_and_gradients_are_the_loop_s(architecture, experts, rowwise):
    assert_the_loop_s(tiny_mixture(architecture).double().train(), experts, rowwise)


@float64_throughout()
@every_placement
def test_wherever_the_router_stands(placement, rowwise):
    assert_the_loop_s(tiny_mixture("llama", **PLACEMENTS[placement]).double().train(), WAYS[1], rowwise)


@float64_throughout()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_experts_that_differ_in_everything_and_lack_layers(architecture, rowwise):
    model = tiny_mixture(architecture, experts=mixed_experts(architecture)).double().train()
    assert_the_loop_s(model, WAYS[2], rowwise)


@float64_throughout()
def test_kept_or_computed_again(rowwise):
    assert_the_loop_s(tiny_mixture("llama", recompute_shrink=True).double().train(), WAYS[2], rowwise)


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_bits(dropout, rowwise):
    model = tiny_mixture("llama", lora_dropout=dropout).train()
    torch.manual_seed(3)
    expected = step(model, "auto", WAYS[2])
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    found = step(model, "auto", WAYS[2])
    assert rowwise
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


@float64_throughout()
@pytest.mark.parametrize("experts", [["red", "red"], ["base", "base"], *WAYS], ids=str)
def test_where_all_experts_are_touched_the_others_get_zeros(experts, rowwise):
    model = tiny_mixture("llama").double().train()
    expected, theirs = (None, {}) if set(experts) == {"base"} else step(model, "reference", experts)
    model.touch_all_experts = True
    rowwise.clear()
    found, ours = step(model, "auto", experts)
    assert rowwise
    if expected is not None:
        assert difference(found, expected) <= EXACT
    assert set(ours) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in ours.items():
        assert difference(gradient, theirs[name]) <= EXACT if name in theirs else not gradient.any(), name


def test_a_batch_of_one_expert_stays_peft_s_bit_for_bit(rowwise):
    model = tiny_mixture("llama")
    with torch.no_grad():
        one, many = (model(tokens(3, LENGTH), experts=e).logits for e in ("red", ["red"] * 3))
    assert torch.equal(one, many)
    assert rowwise == []


@torch.no_grad()
def test_generation_with_an_expert_per_row_is_each_row_s_own(rowwise):
    model, ids = tiny_mixture("llama").double(), tokens(3, LENGTH)
    experts = ["red", "base", "blue"]
    together = model.generate(ids, experts=experts, max_new_tokens=4, do_sample=False, num_beams=2)
    assert rowwise  # the prompt
    for row, expert in enumerate(experts):
        alone = model.generate(ids[row : row + 1], experts=expert, max_new_tokens=4, do_sample=False, num_beams=2)
        assert torch.equal(alone[0], together[row])


def test_autocast_is_the_loop_s_within_its_precision(rowwise):
    model = tiny_mixture("llama").train()
    with torch.autocast("cpu", torch.bfloat16):
        expected, theirs = step(model, "reference", WAYS[1])
        found, ours = step(model, "auto", WAYS[1])
    assert rowwise
    assert difference(found.float(), expected.float()) < 0.05
    assert ours.keys() == theirs.keys()
    assert all(difference(ours[name], theirs[name]) < 0.15 for name in ours)


def test_a_base_whose_linear_is_only_called(rowwise):
    base = tiny_base("llama")
    model = tiny_mixture("llama", base=base).double().train()
    for layer in model.routed_layers:  # hooked: its GEMM is not fused
        layer.base_layer.register_forward_hook(lambda *_: None)
    assert_the_loop_s(model, WAYS[2], rowwise)
