"""The gathered form by itself; `invariants/test_sparse.py` has it inside the layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dylora_moe.mixing import gathered
from dylora_moe.mixing.dense import dense_mixture
from dylora_moe.mixing.gathered import gathered_mixture
from dylora_moe.routing.policies import top_k
from rounding import ulps
from tiny import difference


def chosen(tokens: int, experts: int) -> tuple[Tensor, Tensor]:
    """Top-2 weights and their columns."""
    weights = top_k(torch.randn(tokens, experts), 2)
    return weights, weights.topk(2).indices


@torch.no_grad()
def test_sparse_checks_and_another_default_device_do_no_harm(member):
    layer, x = member(), torch.randn(8, 64)
    weights, indices = chosen(8, 8)
    expected = dense_mixture(x, weights, [layer])[0]
    gathered._silence_sparse_layouts.cache_clear()
    torch.sparse.check_sparse_tensor_invariants.enable()
    torch.set_default_device("meta")  # as a user with a GPU sets it, with this model on the CPU
    try:
        found = gathered_mixture(x, weights, [layer], indices)[0]
    finally:
        torch.set_default_device(None)
        torch.sparse.check_sparse_tensor_invariants.disable()
    assert difference(found, expected) <= ulps(64)


@torch.no_grad()
def test_without_gradients_no_matrix_is_copied_per_token(member):
    """No matrix of `[T·K, R, D]` or `[T·K, O, R]`: nothing larger than the experts' own matrices is allocated."""
    layer, x = member(experts=8, rank=16, width=64), torch.randn(512, 64)
    weights, indices = chosen(512, 8)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.layout == torch.strided)
            return out

    with Sizes():
        found = gathered_mixture(x, weights, [layer], indices)
    assert max(sizes) <= len(x) * 64  # of x and y; T·K copies would be 32 times that
    assert difference(found[0], dense_mixture(x, weights, [layer])[0]) <= ulps(64)
