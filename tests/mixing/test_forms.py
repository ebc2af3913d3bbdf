"""Every form of the table: one signature, one result, and no work for experts that are not active."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dylora_moe.benchmark.counts import FLOP_FORMULAS
from dylora_moe.config import MoELoraConfig
from dylora_moe.mixing import FORM_NAMES, FORMS, Form
from dylora_moe.mixing.member import LayerExperts, Member
from dylora_moe.routing.policies import top_k
from tiny import difference

every_form = pytest.mark.parametrize("form", FORMS)
TOLERANCE = 1e-12
"""In float64, where the forms differ by the order of additions only."""


def loop(x: Tensor, weights: Tensor, member: Member) -> Tensor:
    """The definition, expert by expert."""
    assert member.weight is not None
    y = x @ member.weight.T + (0 if member.bias is None else member.bias)
    own = member.experts
    for column, scaling, A, B in zip(own.columns, own.scalings, member.lora_A, member.lora_B, strict=True):
        y = y + weights[:, column, None] * scaling * (x @ A.T @ B.T)
    return y


def group(experts: int = 5) -> list[Member]:
    """Two layers fed by one input, their experts of unequal rank and scaling."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    members = []
    for width, ranks in ((6, (3, 1, 2, 4, 2)), (9, (2,) * 5)):
        own = LayerExperts(tuple(range(experts)), ranks, tuple(0.5 + i for i in range(experts)))
        weight, bias = torch.randn(width, 7).double(), torch.randn(width).double()
        members.append(Member(own, weight, bias, [leaf(r, 7) for r in ranks], [leaf(width, r) for r in ranks]))
    return members


@every_form
def test_all_have_the_signature_of_a_form(form):
    expected = list(inspect.signature(Form.__call__).parameters.values())[1:]
    assert list(inspect.signature(FORMS[form]).parameters.values()) == expected


def test_the_configuration_takes_every_name_and_no_other():
    for name in FORM_NAMES:
        assert MoELoraConfig(num_experts=2, mixing_form=name).mixing_form == name
    with pytest.raises(ValueError, match="mixing_form"):
        MoELoraConfig(num_experts=2, mixing_form="sparse")


@every_form
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_of_a_group_are_the_loop_s(form, recompute):
    members = group()
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    weights = top_k(logits, 2)
    indices = weights.detach().topk(2).indices.flip(-1)  # in any order
    found = FORMS[form](x, weights, members, indices, recompute=recompute)
    expected = [loop(x, weights, member) for member in members]
    leaves = [x, logits, *(t for m in members for t in (*m.lora_A, *m.lora_B))]
    dys = [torch.randn_like(y) for y in expected]
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other) <= TOLERANCE
    for one, other in zip(
        torch.autograd.grad(found, leaves, dys, retain_graph=True),
        torch.autograd.grad(expected, leaves, dys),
        strict=True,
    ):
        assert difference(one, other) <= TOLERANCE
    with torch.no_grad():
        packed, memo = {}, {}
        for _ in range(2):  # the second time from what is kept
            again = FORMS[form](x, weights, members, indices, packed=packed, memo=memo)
            for one, other in zip(again, expected, strict=True):
                assert difference(one, other) <= TOLERANCE
        assert packed
        assert memo


@every_form
def test_a_chosen_expert_of_weight_zero_adds_nothing(form):
    """`indices` may name more than the weights use: a top-k of which one weight vanished."""
    members, x = group(), torch.randn(3, 7).double()
    weights = top_k(torch.randn(3, 5).double(), 1)
    indices = weights.topk(3).indices
    for one, member in zip(FORMS[form](x, weights, members, indices), members, strict=True):
        assert difference(one, loop(x, weights, member)) <= TOLERANCE


@pytest.mark.parametrize("form", ["grouped", "gathered"])
def test_experts_that_are_not_active_cost_no_flops(form, member):
    layer, x = member(), torch.randn(8, 64)
    counts = {}
    for experts in (4, 8):
        own = layer.experts
        some = layer._replace(
            experts=LayerExperts(own.columns[:experts], own.ranks[:experts], own.scalings[:experts]),
            lora_A=layer.lora_A[:experts],
            lora_B=layer.lora_B[:experts],
        )
        weights = top_k(torch.randn(len(x), experts), 2)
        counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
        with torch.no_grad(), counter:
            FORMS[form](x, weights, [some], weights.topk(2).indices)
        counts[experts] = counter.get_total_flops()
    floor = 2 * len(x) * (64 * 64 + 2 * 2 * 16 * 64)
    assert counts[4] == counts[8] == floor
