"""The mixture of each token's K experts as GEMMs over groups: the others cost neither FLOPs nor a wait for the host.

The T·K pairs of token and expert stand sorted by expert, and each GEMM runs over the groups. The gate is applied to
H `[P, R]`, not to the output.

    H  = x[token_of_pair] · A_expertᵀ          [P, R]    P = T·K
    Hw = H ⊙ (w · s)[pair]                     [P, R]
    y  = x Wᵀ + b + Σ_pairs Hw · B_expertᵀ     [T, O]

Experts of unequal rank are padded with zeros to the largest. The gradient of a weight outside a token's K experts is
zero, as the policy's own gradient makes it. Shapes: T tokens, D in, O out, R rank, E experts, K active experts per
token.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .member import (
    Member,
    add_base_grad,
    compute_dtype,
    dropout_mask,
    dropout_seed,
    dropped,
    members_from,
    pair_gates,
    remember,
    tensors_of,
)
from .stacks import stack_A, stack_B


class Pairs(NamedTuple):
    """The pairs of a token and one of its active experts, sorted by expert.

    Attributes:
        indices: `[T, K]` the active experts.
        order: `[P]` which pair (counted token by token) comes where.
        tokens: `[P]` the token of each sorted pair.
        place: `[T, K]` where a token's pairs went.
        ends: `[E]` int32, where each expert's group ends.
    """

    indices: Tensor
    order: Tensor
    tokens: Tensor
    place: Tensor
    ends: Tensor

    @classmethod
    def of(cls, indices: Tensor, num_experts: int) -> Pairs:
        """The pairs of `indices [T, K]`, int64."""
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.zeros(num_experts, dtype=torch.int32, device=order.device)
        ends = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        return cls(indices, order, order // indices.shape[1], place.view_as(indices), ends)

    def gates(self, weights: Tensor, scalings: Tensor | float, dtype: torch.dtype) -> Tensor:
        """`(w · s)` of each sorted pair, `[P, 1]`."""
        return pair_gates(weights, self.indices, scalings, dtype).flatten().index_select(0, self.order).unsqueeze(-1)


def grouped_mixture(
    x: Tensor,
    weights: Tensor,
    members: Sequence[Member],
    indices: Tensor | None = None,
    *,
    recompute: bool = False,
    packed: dict[Hashable, Any] | None = None,
    memo: dict[Hashable, Any] | None = None,
) -> list[Tensor]:
    """A `Form` for many tokens. Every member carries the same experts, one per column and in their order."""
    assert indices is not None
    dtype, dropout = compute_dtype(x), members[0].experts.dropout
    experts = tuple(m.experts for m in members)
    pairs = remember(memo, ("pairs", x.shape[0]), lambda: Pairs.of(indices, weights.shape[1]))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        seed = dropout_seed() if dropout else 0
        return list(_GroupedMixture.apply(x, weights, pairs, experts, seed, recompute, *tensors_of(members)))
    xs = (F.dropout(x, dropout) if dropout else x).to(dtype).index_select(0, pairs.tokens)
    A, Bs = remember(packed, ("grouped", dtype), lambda: (stack_A(members, dtype), stack_B(members, dtype)))
    H, ends = grouped_mm(xs, A.transpose(1, 2), pairs.ends), pairs.ends
    outputs = []
    for member, part, B in zip(members, H.split([B.shape[-1] for B in Bs], dim=-1), Bs, strict=True):
        gated = part * pairs.gates(weights, member.experts.scaling_row(weights, dtype), dtype)
        outputs.append(_expand(x, member, gated, B, pairs, ends))
    return outputs


def grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm`, and on a CPU also where that refuses: float64, rows not of 16-byte blocks.

    Args:
        a: `[P, X]` rows in groups, or `[X, P]` columns in groups.
        b: `[E, X, Y]` one matrix per group, or `[P, Y]` rows in groups.
        ends: `[E]` int32 where the groups end.

    Returns:
        `[P, Y]`, or `[E, X, Y]` where both sides are grouped.
    """
    block = 16 // a.element_size()
    strides = [s for t in (a, b) for s in t.stride() if s != 1]
    thin = any(t.stride()[-2:] == (1, 1) for t in (a, b))  # which of the two it takes for the row's stride is open
    if a.dtype != torch.float64 and all(s % block == 0 for s in strides) and not thin and a.numel() and b.numel():
        return F.grouped_mm(a, b, offs=ends)
    spans = list(itertools.pairwise([0, *ends.tolist()]))
    if b.dim() == 2:
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])
    return torch.cat([a[start:end] @ b[i] for i, (start, end) in enumerate(spans)])


def aligned(x: Tensor, members: Sequence[Member]) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes these sizes as they are."""
    dtype = compute_dtype(x)
    block = 16 // dtype.itemsize
    sizes = [x.shape[-1], *(m.lora_B[0].shape[0] for m in members)]
    return dtype != torch.float64 and all(size % block == 0 for size in sizes)


def _expand(x: Tensor, member: Member, gated: Tensor, B: Tensor, pairs: Pairs, ends: Tensor) -> Tensor:
    rows = grouped_mm(gated, B.transpose(1, 2), ends)
    delta = rows[pairs.place].sum(1) if torch.compiler.is_compiling() else _sum_of_pairs(rows, pairs)
    if member.weight is None:
        return delta
    y = F.linear(x, member.weight, member.bias)
    return y + delta if torch.compiler.is_compiling() else y.add_(delta)


def _sum_of_pairs(rows: Tensor, pairs: Pairs) -> Tensor:
    """Sum `rows [P, X]` over the pairs of each token, `[T, X]`, in a fixed order."""
    if not rows.numel():
        return rows.new_zeros(pairs.place.shape[0], rows.shape[1])
    return F.embedding_bag(pairs.place, rows, mode="sum")


class _GroupedMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weights, pairs: Pairs, experts, seed: int, recompute: bool, *tensors):
        members, dtype = members_from(experts, tensors), compute_dtype(x)
        H = _shrink(x, members, pairs, seed, dtype)
        Bs = stack_B(members, dtype)
        outputs = []
        for member, part, B in zip(members, H.split([B.shape[-1] for B in Bs], dim=-1), Bs, strict=True):
            gated = part * pairs.gates(weights, member.experts.scaling_row(weights, dtype), dtype)
            outputs.append(_expand(x, member, gated, B, pairs, pairs.ends))
        ctx.set_materialize_grads(False)
        ctx.pairs, ctx.experts, ctx.seed, ctx.dtype = pairs, experts, seed, dtype
        ctx.save_for_backward(x, None if recompute else H, weights, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs):
        x, H, weights, *tensors = ctx.saved_tensors
        experts, dtype, pairs = ctx.experts, ctx.dtype, ctx.pairs
        members = members_from(experts, tensors)
        need_x, need_w, *_ = ctx.needs_input_grad
        need = members_from(experts, ctx.needs_input_grad[6:])
        dys = [None if dy is None else dy.to(dtype).contiguous() for dy in grad_outputs]
        if H is None:
            H = _shrink(x, members, pairs, ctx.seed, dtype)
        Bs = stack_B(members, dtype)
        widths = [B.shape[-1] for B in Bs]
        grads: list[list[Tensor | None]] = []
        dH, dweights = torch.zeros_like(H), torch.zeros_like(weights) if need_w else None
        for member, wanted, dy, B, part, out in zip(
            members, need, dys, Bs, H.split(widths, -1), dH.split(widths, -1), strict=True
        ):
            count = len(member.lora_B)
            grads.append([None] * (2 + 2 * count))
            if dy is None:
                continue
            scalings = member.experts.scaling_row(weights, dtype)
            gates, of_pairs = pairs.gates(weights, scalings, dtype), dy.index_select(0, pairs.tokens)
            if any(wanted.lora_B):
                dB = grouped_mm(of_pairs.T, part * gates, pairs.ends)
                grads[-1][2 + count :] = _of_experts(dB, member.lora_B, wanted.lora_B)
            dHw = grouped_mm(of_pairs, B, pairs.ends)
            if dweights is not None:
                sums = (dHw * part).sum(-1, dtype=torch.promote_types(weights.dtype, dtype))[pairs.place]  # [T, K]
                sums = sums * (scalings[pairs.indices] if isinstance(scalings, Tensor) else scalings)
                dweights.scatter_add_(1, pairs.indices, sums.to(weights.dtype))
            torch.mul(dHw, gates, out=out)
        mask = dropout_mask(x, experts[0].dropout, ctx.seed) if experts[0].dropout else None
        if any(flag for wanted in need for flag in wanted.lora_A):
            xs = (x if mask is None else x * mask).to(dtype).index_select(0, pairs.tokens)
            dA = grouped_mm(dH.T, xs, pairs.ends).split(widths, dim=1)
            for member, wanted, part, grad in zip(members, need, dA, grads, strict=True):
                grad[2 : 2 + len(member.lora_A)] = _of_experts(part, member.lora_A, wanted.lora_A)
        dx = None
        if need_x:
            dx = _sum_of_pairs(grouped_mm(dH, stack_A(members, dtype), pairs.ends), pairs)
            dx = add_base_grad(dx if mask is None else dx.mul_(mask), dys, members, dtype)
            dx = cast(Tensor, dx).to(x.dtype)
        return dx, dweights, None, None, None, None, *[g for grad in grads for g in grad]


def _shrink(x: Tensor, members: Sequence[Member], pairs: Pairs, seed: int, dtype: torch.dtype) -> Tensor:
    xs = dropped(x, members[0].experts.dropout, seed, dtype).index_select(0, pairs.tokens)
    return grouped_mm(xs, stack_A(members, dtype).transpose(1, 2), pairs.ends)


def _of_experts(grads: Tensor, like: Sequence[Tensor], need: Sequence[Any]) -> list[Tensor | None]:
    """The experts' own parts of `grads [E, …, …]`, without the padding."""
    return [
        grads[i, : t.shape[0], : t.shape[1]].to(t.dtype).contiguous() if wanted else None
        for i, (t, wanted) in enumerate(zip(like, need, strict=True))
    ]
