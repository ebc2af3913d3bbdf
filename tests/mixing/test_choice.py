"""The choice of the form follows from shapes, and the measured crossovers are read as they are written."""

from __future__ import annotations

import torch

from dylora_moe.mixing import choose
from dylora_moe.mixing.choice import LEAST_TOKENS_PER_ROW, Crossovers, crossovers, pays_by_row


def test_the_choice_follows_from_shapes(member):
    layer, x = member(experts=64), torch.randn(512, 64)
    assert choose("auto", x, [layer], 64, None) == "dense"
    assert choose("auto", x, [layer], 64, 64) == "dense"
    assert choose("auto", x[:1], [layer], 64, 2) == "gathered"
    assert choose("auto", x, [layer], 64, 2) == "grouped"
    with torch.no_grad():  # where the gathered form copies nothing
        assert choose("auto", x, [layer], 64, 2) == "gathered"
        assert choose("auto", x, [layer], 64, 64 // 2) == "dense"
        assert choose("auto", x.bfloat16(), [layer], 64, 2) == "grouped"


def test_what_is_asked_for_is_given_where_it_is_exact(member):
    layer, x = member(), torch.randn(3, 64)
    for form in ("dense", "grouped", "gathered"):
        assert choose(form, x, [layer], 8, 2) == form
        assert choose(form, x, [layer], 8, None) == "dense"  # every weight may be used
    some = layer._replace(experts=layer.experts._replace(columns=(*range(7), 70)))
    assert choose("grouped", x, [some], 8, 2) == "dense"  # an expert that the layer lacks


def test_tokens_are_those_of_x_unless_given(member):
    layer, x = member(experts=64), torch.randn(512, 64)
    assert choose("auto", x, [layer], 64, 2, tokens=1) == choose("auto", x[:1], [layer], 64, 2) == "gathered"
    assert choose("auto", x[:1], [layer], 64, 2, tokens=512) == "grouped"


def test_grouped_is_left_where_torch_takes_no_such_sizes(member):
    layer = member(experts=64, width=63)
    assert choose("auto", torch.randn(512, 63), [layer], 64, 2) == "dense"


def test_each_crossover_is_the_first_size_that_pays():
    at = Crossovers(gathered_copies=4, gathered_ratio=4, gathered_tokens=3, grouped_ratio=8, grouped_tokens=5)
    assert at.fastest(1, 8, 2, in_place=False) == "gathered"
    assert at.fastest(2, 8, 2, in_place=False) == "dense"
    assert [at.fastest(tokens, 16, 2, in_place=False) for tokens in (4, 5)] == ["dense", "grouped"]
    assert [at.fastest(9, experts, 2, in_place=False) for experts in (15, 16)] == ["dense", "grouped"]
    assert [at.fastest(tokens, 8, 2, in_place=True) for tokens in (2, 3)] == ["dense", "gathered"]
    assert [at.fastest(9, experts, 2, in_place=True) for experts in (7, 8)] == ["dense", "gathered"]


def test_a_device_that_nobody_measured_goes_by_the_cpu():
    assert crossovers("meta") == crossovers("cpu")


def test_rows_of_few_tokens_are_computed_with_all_experts():
    assert [pays_by_row(LEAST_TOKENS_PER_ROW + i) for i in (-1, 0)] == [False, True]
