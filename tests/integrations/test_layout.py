"""The order in which a loaded matrix keeps its rows."""

import torch

from dylora_moe_vllm.layout import row_order


def test_as_expected():
    file = torch.randn(6, 4)
    assert row_order(file, file[2:4], [2, 3]) == [2, 3]


def test_in_another_order():
    file, order = torch.randn(6, 4), [4, 0, 5, 2]
    assert row_order(file, file[order], [0, 1, 2, 3]) == order


def test_equal_rows_are_no_answer_unless_they_are_expected():
    file = torch.zeros(4, 4)
    assert row_order(file, file[:2], [0, 1]) == [0, 1]
    file = torch.tensor([[1.0], [1.0], [2.0]])
    assert row_order(file, file[[2, 1]], [0, 1]) is None


def test_other_values_are_no_answer():
    assert row_order(torch.zeros(4, 2), torch.ones(2, 2), [0, 1]) is None
