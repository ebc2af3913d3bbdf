"""The mixture in two GEMMs around the base's own, for any number of experts and mixed ranks.

    H  = x · A_catᵀ                    [T, ΣR]
    Hw = H ⊙ (w · s)[expert_of_row]    [T, ΣR]
    y  = x Wᵀ + b + Hw · B_catᵀ        [T, O]

The backward pass is written out so that only x (which the base's other branches share), H and w are kept, and the
gates once for all layers of a pass.

Shapes: T tokens, D in, O out, R rank of one expert, ΣR the sum of the ranks, E experts. Of several members, A_cat holds
the rows of all.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .member import (
    LayerExperts,
    Member,
    add_base_grad,
    compute_dtype,
    dropout_mask,
    dropout_seed,
    dropped,
    members_from,
    remember,
    side_by_side,
    tensors_of,
)


def dense_mixture(
    x: Tensor,
    weights: Tensor,
    members: Sequence[Member],
    indices: Tensor | None = None,
    *,
    recompute: bool = False,
    packed: dict[Hashable, Any] | None = None,
    memo: dict[Hashable, Any] | None = None,
) -> list[Tensor]:
    """A `Form` that computes every expert for every token and needs no `indices`."""
    dtype, dropout = compute_dtype(x), members[0].experts.dropout
    experts = tuple(m.experts for m in members)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        seed = dropout_seed() if dropout else 0
        return list(_DenseMixture.apply(x, weights, experts, seed, recompute, memo, *tensors_of(members)))
    xd = F.dropout(x, dropout) if dropout else x
    A, Bs = remember(packed, dtype, lambda: (pack_A(members, dtype), pack_B(members, dtype)))
    gates = all_gates(experts, weights, dtype, memo)
    parts = shrink(xd.to(dtype), A, gates)[1].split([e.width for e in experts], dim=-1)
    return [expand(x, m, part, B) for m, part, B in zip(members, parts, Bs, strict=True)]


def shrink(x: Tensor, A: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """`H = x · Aᵀ` and `H ⊙ gates`, both `[T, ΣR]`."""
    if kernels.available(x):
        return kernels.shrink(x, A, gates)
    H = F.linear(x, A)
    return H, H * gates


def expand(x: Tensor, member: Member, gated: Tensor, B: Tensor) -> Tensor:
    """Base GEMM (if any) plus `gated [T, ΣR] · Bᵀ`, accumulated into one output `[T, O]`."""
    if member.weight is None:
        return gated @ B.T
    y = F.linear(x, member.weight, member.bias)
    if kernels.available(y):
        return kernels.expand(y, gated, B) if torch.is_grad_enabled() else kernels.expand_(y, gated, B)
    if torch.compiler.is_compiling():
        return y + gated @ B.T
    return y.addmm_(gated, B.T)


def pack_A(members: Sequence[Member], dtype: torch.dtype) -> Tensor:
    """`A_cat` of all members in `dtype`."""
    rows = [A for m in members for A in m.lora_A]
    flat = side_by_side(rows)
    return (torch.cat(rows) if flat is None else flat.view(-1, rows[0].shape[1])).to(dtype)


def pack_B(members: Sequence[Member], dtype: torch.dtype) -> list[Tensor]:
    """`B_cat [O, ΣR]` of each member in `dtype`."""
    return [(m.lora_B[0] if len(m.lora_B) == 1 else torch.cat(list(m.lora_B), dim=1)).to(dtype) for m in members]


def all_gates(
    experts: tuple[LayerExperts, ...], weights: Tensor, dtype: torch.dtype, memo: dict[Hashable, Any] | None
) -> Tensor:
    """The gates of all members side by side, the same for all layers of a pass that have such experts."""

    def side_by_side() -> Tensor:
        known = {own: own.gates(weights, dtype) for own in dict.fromkeys(experts)}
        return known[experts[0]] if len(experts) == 1 else torch.cat([known[own] for own in experts], dim=-1)

    return remember(memo, (experts, dtype, weights.shape[0]), side_by_side)


class _DenseMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weights, experts, seed: int, recompute: bool, memo, *tensors):
        members, dtype = members_from(experts, tensors), compute_dtype(x)
        xd, gates = dropped(x, experts[0].dropout, seed, dtype), all_gates(experts, weights, dtype, memo)
        H, gated = shrink(xd, pack_A(members, dtype), gates)
        parts = gated.split([e.width for e in experts], dim=-1)
        ctx.set_materialize_grads(False)
        ctx.experts, ctx.seed, ctx.dtype = experts, seed, dtype
        ctx.save_for_backward(x, None if recompute else H, gates, weights, *tensors)
        packed = pack_B(members, dtype)
        return tuple(expand(x, m, part, B) for m, part, B in zip(members, parts, packed, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs):
        x, H, gates, weights, *tensors = ctx.saved_tensors
        experts, dtype = ctx.experts, ctx.dtype
        members = members_from(experts, tensors)
        need_x, need_w, *_ = ctx.needs_input_grad
        need = members_from(experts, ctx.needs_input_grad[6:])
        dys = [None if dy is None else dy.to(dtype) for dy in grad_outputs]
        if H is None:
            H = F.linear(dropped(x, experts[0].dropout, ctx.seed, dtype), pack_A(members, dtype))
        packed = pack_B(members, dtype)
        widths = [own.width for own in experts]
        gated, grads = (H * gates).split(widths, dim=-1), []
        for member, wanted, dy, part in zip(members, need, dys, gated, strict=True):
            dB: list[Tensor | None] = [None] * len(member.lora_B)
            if dy is not None and any(wanted.lora_B):
                dB = _split(_columns(dy.T @ part, member.experts.ranks), member.lora_B, wanted.lora_B)
            grads.append([None, None, *[None] * len(member.lora_A), *dB])
        need_A = any(flag for wanted in need for flag in wanted.lora_A)
        dx = dweights = None
        if need_x or need_w or need_A:
            per_member = [
                H.new_zeros(H.shape[0], width) if dy is None else dy @ B
                for dy, B, width in zip(dys, packed, widths, strict=True)
            ]
            dHw = per_member[0] if len(per_member) == 1 else torch.cat(per_member, dim=-1)
            if need_w:
                rows = (dHw * H).split(widths, dim=-1)
                dweights = sum(own.weights_grad(row, weights) for own, row in zip(experts, rows, strict=True))
            dH = dHw.mul_(gates)
            mask = dropout_mask(x, experts[0].dropout, ctx.seed) if experts[0].dropout else None
            if need_A:
                dA = dH.T @ (x if mask is None else x * mask).to(dtype)
                for member, wanted, part, grad in zip(members, need, dA.split(widths), grads, strict=True):
                    count = len(member.lora_A)
                    grad[2 : 2 + count] = _split(part.split(member.experts.ranks), member.lora_A, wanted.lora_A)
            if need_x:
                A = pack_A(members, dtype)
                if mask is None:
                    dx = add_base_grad(None, dys, members, dtype)
                    dx = dH @ A if dx is None else dx.addmm_(dH, A)
                else:
                    dx = add_base_grad((dH @ A).mul_(mask), dys, members, dtype)
                dx = cast(Tensor, dx).to(x.dtype)
        return dx, dweights, None, None, None, None, *[g for grad in grads for g in grad]


def _columns(grad: Tensor, ranks: tuple[int, ...]) -> Sequence[Tensor]:
    """Split `grad [O, ΣR]` by experts; of equal ranks in one copy, which autograd takes as it is instead of E."""
    if ranks.count(ranks[0]) != len(ranks):
        return grad.split(ranks, 1)
    return grad.unflatten(1, (len(ranks), ranks[0])).transpose(0, 1).contiguous().unbind()


def _split(parts: Sequence[Tensor], like: Sequence[Tensor], need: Sequence[Any]) -> list[Tensor | None]:
    return [p.to(t.dtype) if wanted else None for p, t, wanted in zip(parts, like, need, strict=True)]
