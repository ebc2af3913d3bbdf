"""The mixture of each token's K best experts; the others cost neither FLOPs nor a synchronisation with the host.

Grouped, for many tokens: the T·K pairs of token and expert stand sorted by expert, and each GEMM runs over the groups.
The gate is applied to H `[P, R]`, not to the output.

    H  = x[token_of_pair] · A_expertᵀ          [P, R]    P = T·K
    Hw = H ⊙ (w · s)[pair]                     [P, R]
    y  = x Wᵀ + b + Σ_pairs Hw · B_expertᵀ     [T, O]

Gathered, for few tokens (decoding): the K experts' matrices of each token are copied together, and the pairs are rows
of one matrix. On a CPU without gradients nothing is copied, so that it serves many tokens too: H is a sampled product,
those entries of x · A_catᵀ that belong to a token's experts, and y a weighted sum of rows of B_catᵀ.

Experts of unequal rank are padded with zeros to the largest. The gradient of a weight outside a token's top K is zero,
as the policy's own gradient makes it. Shapes: T tokens, D in, O out, R rank, E experts, K active experts per token.
"""

from __future__ import annotations

import functools
import itertools
import warnings
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
    on_eager_cpu,
    remember,
    side_by_side,
    tensors_of,
)


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
    def of(cls, weights: Tensor, active: int) -> Pairs:
        """The pairs of the `active` largest of `weights [T, E]`."""
        indices = best(weights, active)
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.zeros(weights.shape[1], dtype=torch.int32, device=order.device)
        ends = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        return cls(indices, order, order // active, place.view_as(indices), ends)

    def gates(self, weights: Tensor, scalings: Tensor | float, dtype: torch.dtype) -> Tensor:
        """`(w · s)` of each sorted pair, `[P, 1]`."""
        return _gates(weights, self.indices, scalings, dtype).flatten().index_select(0, self.order).unsqueeze(-1)


def best(weights: Tensor, active: int) -> Tensor:
    """The columns of the `active` largest of `weights [T, E]`: `[T, K]`, in no promised order."""
    return weights.detach().topk(active, dim=-1, sorted=False).indices


def grouped_mixture(
    x: Tensor,
    weights: Tensor,
    members: Sequence[Member],
    active: int,
    recompute: bool = False,
    packed: dict[Hashable, Any] | None = None,
    memo: dict[Hashable, Any] | None = None,
) -> list[Tensor]:
    """`dense_mixture` where each row of `weights [T, E]` has at most `active` entries that are not zero.

    Every member carries the same experts, one per column and in their order.
    """
    dtype, dropout = compute_dtype(x), members[0].experts.dropout
    experts = tuple(m.experts for m in members)
    pairs = remember(memo, ("pairs", x.shape[0]), lambda: Pairs.of(weights, active))
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


def gathered_mixture(
    x: Tensor,
    weights: Tensor,
    members: Sequence[Member],
    active: int,
    packed: dict[Hashable, Any] | None = None,
    memo: dict[Hashable, Any] | None = None,
) -> list[Tensor]:
    """The same as `grouped_mixture`; unless `gathers_in_place`, copies T·K of the A and B, so for few tokens."""
    dtype, dropout, tokens = compute_dtype(x), members[0].experts.dropout, x.shape[0]
    in_place = tokens > 1 and gathers_in_place(x)
    by_rows = packed is not None or (in_place and tokens * active >= weights.shape[1])  # transposed no more than copied
    A, Bs, scalings = remember(packed, ("gathered", dtype), lambda: _gatherable(members, dtype, by_rows))
    rank = A.shape[1]
    chosen = remember(
        memo, ("chosen", tokens, dtype, rank, scalings), lambda: Chosen.of(weights, active, members, rank, dtype)
    )
    xd, width = (F.dropout(x, dropout) if dropout else x).to(dtype), len(members) * active * rank
    if in_place:
        pattern = remember(memo, ("pattern", tokens, dtype, A.shape), lambda: chosen.pattern(A, tokens))
        H = torch.sparse.sampled_addmm(pattern, xd, A.flatten(0, 1).t()).values()
    elif tokens == 1:
        H = F.linear(xd, A.index_select(0, chosen.matrices).view(width, -1))
    else:
        H = torch.bmm(A.index_select(0, chosen.matrices).view(tokens, width, x.shape[1]), xd.unsqueeze(-1))
    if tokens == 1:
        H = H.view(len(members), -1)
    else:
        H = H.view(tokens, len(members), active * rank).transpose(0, 1).flatten(1)
    outputs = []
    for member, B, gated in zip(members, Bs, (H * chosen.gates).unbind(), strict=True):
        if B.dim() == 2:  # Σ gated · B[rows]
            delta = torch.embedding_bag(B, chosen.rows, chosen.starts, False, 0, False, gated)[0]
        else:
            pairs = torch.bmm(B.index_select(0, chosen.experts), gated.view(-1, rank, 1))
            delta = pairs.view(tokens, active, B.shape[1]).sum(1)
        if member.weight is not None:
            y = F.linear(x, member.weight, member.bias)
            delta = y + delta if torch.is_grad_enabled() or torch.compiler.is_compiling() else y.add_(delta)
        outputs.append(delta)
    return outputs


def gathers_in_place(x: Tensor) -> bool:
    """Whether the gathered form needs no copies of the matrices of `x`'s experts."""
    return on_eager_cpu(x) and not torch.is_grad_enabled() and compute_dtype(x) in (torch.float32, torch.float64)


class Chosen(NamedTuple):
    """Where the gathered form finds the matrices of each token's experts; M members, all padded to the rank R.

    Attributes:
        experts: `[T·K]`, those of one token after the other.
        matrices: `[T·M·K]` of the A, among those `[M·E, R, D]` of all members.
        rows: `[T·K·R]` of each member's B, among the rows `[E·R, O]`.
        starts: `[T]` where the rows of each token start.
        gates: `[M, T·K·R]`, or `[1, T·K·R]` where all members have the same.
    """

    experts: Tensor
    matrices: Tensor
    rows: Tensor
    starts: Tensor
    gates: Tensor

    @classmethod
    def of(cls, weights: Tensor, active: int, members: Sequence[Member], rank: int, dtype: torch.dtype) -> Chosen:
        """The `active` largest of `weights [T, E]`."""
        (tokens, experts), device = weights.shape, weights.device
        indices = best(weights, active)
        first = torch.arange(len(members), device=device) * experts
        rows = indices.unsqueeze(-1) * rank + torch.arange(rank, device=device)
        kinds = members[:1] if len({m.experts.scalings for m in members}) == 1 else members
        gates = [_gates(weights, indices, m.experts.scaling_row(weights, dtype), dtype) for m in kinds]
        return cls(
            indices.flatten(),
            (indices.unsqueeze(1) + first.unsqueeze(-1)).flatten(),
            rows.flatten(),
            torch.arange(tokens, device=device) * (active * rank),
            torch.stack(gates).repeat_interleave(rank, dim=-1).flatten(1),
        )

    def pattern(self, A: Tensor, tokens: int) -> Tensor:
        """Zeros, sparse `[T, M·E·R]`: M·K·R entries per token, where it needs a row of all A `[M·E, R, D]`."""
        _silence_sparse_layouts()
        columns = (self.matrices.unsqueeze(-1) * A.shape[1] + torch.arange(A.shape[1], device=A.device)).flatten()
        starts = torch.arange(tokens + 1, device=A.device) * (len(columns) // tokens)
        values, shape = A.new_zeros(len(columns)), (tokens, len(A) * A.shape[1])
        return torch.sparse_csr_tensor(starts, columns, values, shape, device=A.device, check_invariants=False)


@functools.cache
def _silence_sparse_layouts() -> None:
    """Use up the one warning per process that torch's sparse layouts are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        torch.sparse_csr_tensor(none.new_zeros(1), none, none.float(), (0, 0), device="cpu", check_invariants=False)


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


def stacked(tensors: Sequence[Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """`[E, rows, columns]` in `dtype`, padded with zeros; a view where the tensors lie side by side in memory."""
    if [t.shape for t in tensors].count(torch.Size((rows, columns))) == len(tensors):
        flat = side_by_side(tensors)
        stack = torch.stack(list(tensors)) if flat is None else flat.view(len(tensors), rows, columns)
    else:
        stack = torch.stack([F.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0])) for t in tensors])
    return stack.to(dtype)


def stack_A(members: Sequence[Member], dtype: torch.dtype) -> Tensor:
    """`[E, ΣR, D]`: for each expert the rows of all members, each padded to the member's largest rank."""
    parts = [stacked(m.lora_A, _padded_rank(m, dtype), m.lora_A[0].shape[1], dtype) for m in members]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def stack_B(members: Sequence[Member], dtype: torch.dtype) -> list[Tensor]:
    """`[E, O, R]` of each member, padded to its largest rank."""
    return [stacked(m.lora_B, m.lora_B[0].shape[0], _padded_rank(m, dtype), dtype) for m in members]


def _padded_rank(member: Member, dtype: torch.dtype) -> int:
    block = 16 // dtype.itemsize
    return -(-max(member.experts.ranks) // block) * block


def _gatherable(
    members: Sequence[Member], dtype: torch.dtype, by_rows: bool
) -> tuple[Tensor, list[Tensor], tuple[float | tuple[float, ...], ...]]:
    """The A of all members `[M·E, R, D]`, each member's B `[E, O, R]` or `by_rows` `[E·R, O]`, and its scalings.

    Scalings that are all the same stand as one number.
    """
    rank = max(_padded_rank(m, dtype) for m in members)
    A = [matrix for m in members for matrix in m.lora_A]
    Bs = [stacked(m.lora_B, m.lora_B[0].shape[0], rank, dtype) for m in members]
    if by_rows:
        Bs = [_rows_of(B) for B in Bs]
    scalings = [m.experts.scalings for m in members]
    return stacked(A, rank, A[0].shape[1], dtype), Bs, tuple(s[0] if s.count(s[0]) == len(s) else s for s in scalings)


def _rows_of(B: Tensor) -> Tensor:
    """`B [E, O, R]` as rows `[E·R, O]`, copied."""
    if B.device.type != "cpu" or not B.numel():
        return B.transpose(1, 2).flatten(0, 1)
    E, O, R = B.shape  # a shuffle of channels is the same copy, twice as fast there
    return F.channel_shuffle(B.view(1, E, 1, O * R).permute(0, 3, 1, 2), O).permute(0, 2, 3, 1).reshape(E * R, O)


def _gates(weights: Tensor, indices: Tensor, scalings: Tensor | float, dtype: torch.dtype) -> Tensor:
    gates = weights.gather(1, indices).to(torch.promote_types(weights.dtype, dtype))
    return (gates * (scalings[indices] if isinstance(scalings, Tensor) else scalings)).to(dtype)


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
