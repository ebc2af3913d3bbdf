"""How many skills rows are of: clouds that lie apart are found, one cloud stays one."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.lifelong.split import proposal, split


def clouds(*sizes: int, apart: float = 3.0) -> torch.Tensor:
    made = torch.Generator().manual_seed(0)
    centres = apart * torch.randn(len(sizes), 16, generator=made, dtype=torch.float64)
    parts = [
        torch.randn(size, 16, generator=made, dtype=torch.float64) + c for size, c in zip(sizes, centres, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("sizes", [(40,), (40, 30), (50, 40, 30), (40, 36, 30, 26)])
def test_clouds_are_found(sizes):
    expected = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assert torch.equal(proposal(clouds(*sizes), fewest=8), expected)
    assert torch.equal(split(clouds(*sizes), len(sizes)), expected)


def test_a_few_rows_apart_are_no_skill():
    assert int(proposal(clouds(40, 5), fewest=8).max()) == 0


def test_rows_that_are_all_the_same_are_of_one_skill():
    assert int(proposal(torch.ones(20, 4, dtype=torch.float64), fewest=8).max()) == 0
    assert int(split(torch.ones(20, 4, dtype=torch.float64), 3).max()) < 3
