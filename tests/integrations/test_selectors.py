"""Requests that name a selector get its weights, and nobody else does."""

import pytest
import torch

from dylora_moe_vllm.selectors import forced, selector_of


def test_only_tokens_with_a_slot_are_forced():
    weights, rows = torch.rand(5, 3), torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    found = forced(weights, rows, torch.tensor([-1, 0, 1, -1, 0]))
    assert torch.equal(found[[0, 3]], weights[[0, 3]])
    assert found[[1, 4]].tolist() == [[1, 0, 0]] * 2
    assert found[2].tolist() == [0, 0, 0]


def test_slots_of_padding_may_be_anything():
    weights, rows = torch.rand(3, 3), torch.eye(3)
    found = forced(weights, rows, torch.tensor([10**9, -(10**9), 1]))
    assert found[2].tolist() == [0, 1, 0]
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("model", "selector"),
    [
        ("mix:red", "red"),
        ("mix:base", "base"),
        ("or:g/mix:red", "red"),
        ("mix", None),
        ("mix:", None),
        ("mix:blue", None),
        ("other:red", None),
        ("red", None),
        (":red", None),
        ("mix:../red", None),
    ],
)
def test_a_name_stands_for_a_selector_or_for_nothing(model: str, selector: str | None):
    assert selector_of(model, {"mix", "or:g/mix"}, {"red", "base"}) == selector
