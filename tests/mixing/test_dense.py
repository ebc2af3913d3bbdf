"""The dense form by itself; `invariants/test_fast_path.py` has it inside the layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dylora_moe.mixing.dense import dense_mixture
from dylora_moe.mixing.member import LayerExperts, Member


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("ranks", [(2, 2), (3, 1, 2)])
def test_gradcheck(fused, ranks):
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    scalings = (0.5, 2.0, 1.0)[: len(ranks)]
    experts = LayerExperts(columns=tuple(range(len(ranks)))[::-1], ranks=ranks, scalings=scalings)
    weight, bias = (torch.randn(5, 4).double(), torch.randn(5).double()) if fused else (None, None)
    factors = [leaf(r, 4) for r in ranks] + [leaf(5, r) for r in ranks]

    def function(x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        member = Member(experts, weight, bias, factors[: len(ranks)], factors[len(ranks) :])
        return dense_mixture(x, weights, [member])[0]

    assert torch.autograd.gradcheck(function, (leaf(3, 4), leaf(3, len(ranks)), *factors))


@torch.no_grad()
def test_packed_matrices_are_made_once_per_dtype(member):
    layer, x, weights, packed = member(), torch.randn(3, 64), torch.rand(3, 8), {}
    first = dense_mixture(x, weights, [layer], packed=packed)[0]
    kept = packed[torch.float32]
    assert torch.equal(dense_mixture(x, weights, [layer], packed=packed)[0], first)
    assert packed[torch.float32] is kept
    with torch.autocast("cpu", torch.bfloat16):
        dense_mixture(x, weights, [layer], packed=packed)
    assert packed.keys() == {torch.float32, torch.bfloat16}
