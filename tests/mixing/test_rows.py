"""Rows that belong to one expert each: the loop's outputs and gradients, for the cost of one expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dylora_moe.benchmark.counts import FLOP_FORMULAS
from dylora_moe.mixing.member import LayerExperts, Member, dropout_mask
from dylora_moe.mixing.rows import row_mixture
from dylora_moe.routing.decision import one_hot_weights
from tiny import difference

TOLERANCE = 1e-12
"""In float64, where the two differ by the order of additions only."""
COLUMNS = [(0, 1, 2), (2, 0, 2, 2, -1, 0), (-1, 3), (1, -1, 1), (-1, -1), (3, 3)]


def loop(x: Tensor, columns: tuple[int, ...], member: Member) -> Tensor:
    """The definition, row by row."""
    own, rows = member.experts, x.chunk(len(columns))
    outputs = []
    for row, column in zip(rows, columns, strict=True):
        y = row.new_zeros(len(row), len(member.lora_B[0])) if member.weight is None else row @ member.weight.T
        y = y if member.bias is None else y + member.bias
        if column in own.columns:
            i = own.columns.index(column)
            y = y + own.scalings[i] * (row @ member.lora_A[i].T @ member.lora_B[i].T)
        outputs.append(y)
    return torch.cat(outputs)


def members(dropout: float = 0.0) -> list[Member]:
    """Two layers fed by one input with experts of unequal rank and scaling; the second lacks experts 1 and 3."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    made = []
    for width, columns, ranks in ((6, (0, 1, 2, 3), (3, 1, 2, 4)), (9, (0, 2), (2, 5))):
        own = LayerExperts(columns, ranks, tuple(0.5 + i for i in columns), dropout)
        weight, bias = torch.randn(width, 7).double(), torch.randn(width).double()
        made.append(Member(own, weight, bias, [leaf(r, 7) for r in ranks], [leaf(width, r) for r in ranks]))
    return made


def by_row(x: Tensor, columns: tuple[int, ...], group: list[Member], **how: bool) -> list[Tensor]:
    return row_mixture(x, one_hot_weights(columns, 9)[:, 0], columns, group, **how)


def leaves_of(group: list[Member]) -> list[Tensor]:
    return [t for m in group for t in (*m.lora_A, *m.lora_B)]


def compare(found: list[Tensor], expected: list[Tensor], leaves: list[Tensor]) -> list[Tensor | None]:
    """Outputs and gradients agree; an expert that no row uses has zeros, where the loop gives it nothing."""
    dys = [torch.randn_like(y) for y in expected]
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other) <= TOLERANCE
    ours = torch.autograd.grad(found, leaves, dys, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, dys, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None
        if other is None:
            assert not one.any()
        else:
            assert difference(one, other) <= TOLERANCE
    return list(ours)


@pytest.mark.parametrize("columns", COLUMNS, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_are_the_loop_s(columns, recompute):
    group, x = members(), torch.randn(4 * len(columns), 7, dtype=torch.float64, requires_grad=True)
    found = by_row(x, columns, group, recompute=recompute)
    compare(found, [loop(x, columns, m) for m in group], [x, *leaves_of(group)])
    with torch.no_grad():
        for one, member in zip(by_row(x, columns, group), group, strict=True):
            assert difference(one, loop(x, columns, member)) <= TOLERANCE


def test_the_experts_sum_alone_where_the_base_is_only_called():
    columns, group = (1, -1, 0), [members()[0]._replace(weight=None, bias=None)]
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    compare(by_row(x, columns, group), [loop(x, columns, group[0])], [x, *leaves_of(group)])


def test_rows_may_be_empty():
    group, x = members(), torch.randn(0, 7, dtype=torch.float64, requires_grad=True)
    found = by_row(x, (0, 1), group)
    assert [y.shape for y in found] == [(0, 6), (0, 9)]
    sum(y.sum() for y in found).backward()
    assert x.grad is not None


def test_what_is_only_touched_receives_zeros():
    group, columns = members(), (0, 0, 2)
    weights = one_hot_weights(columns, 4)[:, 0].requires_grad_()
    x = torch.randn(6, 7, dtype=torch.float64)
    sum(y.sum() for y in row_mixture(x, weights, columns, group)).backward()
    assert weights.grad is not None
    assert not weights.grad.any()
    assert [bool(t.grad.any()) for t in group[0].lora_A] == [True, False, True, False]


def test_frozen_experts_and_outputs_that_nobody_uses_get_no_gradient():
    group, x = members(), torch.randn(4, 7, dtype=torch.float64)
    group[0].lora_A[0].requires_grad_(False)
    by_row(x, (0, 2), group)[0].sum().backward()
    assert group[0].lora_A[0].grad is None
    assert group[0].lora_B[0].grad.any()
    assert all(t.grad is None for t in (*group[1].lora_A, *group[1].lora_B))


def test_dropout_draws_one_mask_and_the_backward_pass_draws_it_again(monkeypatch):
    columns, group = (1, 0, -1, 1), members(dropout=0.5)
    monkeypatch.setattr("dylora_moe.mixing.rows.dropout_seed", lambda: 7)
    x = torch.randn(12, 7, dtype=torch.float64, requires_grad=True)
    mask = dropout_mask(x, 0.5, 7)
    for recompute in (False, True):
        found = by_row(x, columns, group, recompute=recompute)
        expected = []
        for m in group:
            bare = torch.nn.functional.linear(x, m.weight, m.bias)
            expected.append(bare + loop(x * mask, columns, m._replace(weight=None, bias=None)))
        compare(found, expected, [x, *leaves_of(group)])


@pytest.mark.parametrize("experts", [2, 8])
def test_a_row_costs_one_expert_and_keeps_its_own_h_however_many_there_are(member, experts):
    x, layer = torch.randn(8 * 16, 64, requires_grad=True), member(experts=experts)
    for t in (*layer.lora_A, *layer.lora_B):
        t.requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (layer.weight, *layer.lora_A, *layer.lora_B)}
    kept: list[int] = []
    keep = lambda t: kept.append(0 if t.untyped_storage().data_ptr() in known else t.numel()) or t  # noqa: E731
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), counter:
        (y,) = by_row(x, tuple(i % experts for i in range(8)), [layer])
        y.sum().backward()
    assert sum(kept) == len(x) * (64 + 16) + 8 * 9  # x, H and the weights
    adding_up = 0 if experts == 8 else 2 * 2 * experts * 8 * 16 * 64  # the gradients of an expert's rows
    assert counter.get_total_flops() == 2 * len(x) * (2 * 64 * 64 + 3 * 2 * 64 * 16) + adding_up
