"""The grouped form by itself; `invariants/test_sparse.py` has it inside the layers."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.mixing.grouped import Pairs, grouped_mm
from dylora_moe.mixing.member import LayerExperts


def test_pairs_stand_sorted_by_expert_and_find_their_tokens_again():
    indices = torch.tensor([[2, 0], [0, 3], [3, 2]])
    pairs = Pairs.of(indices, 5)
    assert pairs.tokens.tolist() == [0, 1, 0, 2, 1, 2]
    assert pairs.ends.tolist() == [2, 2, 4, 6, 6]
    assert torch.equal(pairs.place.flatten()[pairs.order], torch.arange(6))
    weights = torch.rand(3, 5)
    own = LayerExperts(tuple(range(5)), (1,) * 5, (1.0, 2.0, 3.0, 4.0, 5.0))
    gates = pairs.gates(weights, own.scaling_row(weights, torch.float32), torch.float32)
    expected = [weights[t, e] * own.scalings[e] for t, e in ((0, 0), (1, 0), (0, 2), (2, 2), (1, 3), (2, 3))]
    assert torch.equal(gates, torch.stack(expected).unsqueeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("X", "Y"), [(16, 24), (5, 3), (1, 8), (16, 1)])
def test_grouped_mm_is_a_product_per_group(X, Y, dtype):
    spans, ends = [(0, 3), (3, 3), (3, 7)], torch.tensor([3, 3, 7], dtype=torch.int32)
    rows, matrices, others = torch.randn(7, X), torch.randn(3, X, Y), torch.randn(7, Y)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    found = grouped_mm(rows.to(dtype), matrices.to(dtype), ends)
    expected = torch.cat([rows[a:b].to(dtype) @ matrices[i].to(dtype) for i, (a, b) in enumerate(spans)])
    torch.testing.assert_close(found, expected, **tolerance)
    found = grouped_mm(rows.to(dtype).T, others.to(dtype), ends)
    expected = torch.stack([rows[a:b].to(dtype).T @ others[a:b].to(dtype) for a, b in spans])
    torch.testing.assert_close(found, expected, **tolerance)
