"""The measurement behind the choice of a form."""

from __future__ import annotations

import math

import pytest
import torch

from dylora_moe.benchmark.crossovers import Shape, calls, grid, regret, seconds, shapes
from dylora_moe.mixing import FORMS
from dylora_moe.mixing.choice import Crossovers, crossovers

SHAPE = Shape(backward=False, width=16, tokens=3, experts=4)


def test_every_form_is_timed_on_every_shape():
    assert len(set(shapes([16, 32]))) == 2 * len(shapes([16]))
    for shape in (SHAPE, SHAPE._replace(backward=True)):
        assert seconds(shape, "cpu", torch.float32, rounds=2).keys() == FORMS.keys()


def test_what_copies_too_much_is_out_of_the_question():
    row = seconds(Shape(True, 16, 64, 4), "cpu", torch.float32, rounds=1)
    assert row.pop("gathered") == math.inf
    assert max(row.values()) < math.inf


@pytest.mark.parametrize("backward", [False, True])
def test_the_forms_of_a_call_do_the_same_work(backward, monkeypatch):
    found = {}
    for form, real in FORMS.items():
        keep = lambda *a, form=form, real=real, **k: found.setdefault(form, real(*a, **k))  # noqa: E731
        monkeypatch.setitem(FORMS, form, keep)
    with torch.set_grad_enabled(backward):
        for call in calls(SHAPE._replace(backward=backward), "cpu", torch.float32).values():
            call()
    for (y,) in found.values():
        torch.testing.assert_close(y, found["dense"][0], rtol=1e-4, atol=1e-4)


def test_regret_is_the_time_lost_by_the_rule():
    at = Crossovers(gathered_copies=1000, gathered_ratio=1000, gathered_tokens=1, grouped_ratio=1000, grouped_tokens=1)
    times = {SHAPE: {"dense": 2.0, "grouped": 3.0, "gathered": 1.0}}  # the rule says dense
    assert regret(at, times, "cpu") == pytest.approx(math.log(2))
    assert regret(at._replace(gathered_ratio=2), times, "cpu") == 0
    assert regret(at._replace(grouped_ratio=2), times, "cuda") == pytest.approx(math.log(3))


def test_the_crossovers_in_use_are_of_the_grid():
    assert crossovers("cpu") in grid()
