"""The mixture where every batch row belongs wholly to one expert or to the base: each computes its own expert only.

All rows have the same number of tokens, so that the experts' matrices, one set per row, make batched GEMMs beside the
base's own, as many as one adapter needs, and nothing is sorted:

    H  = x · A_rowᵀ                    [N, L, R]
    y  = x Wᵀ + b + s_row · H · B_rowᵀ

A step costs what one adapter costs, however many experts there are. Saved for backward are x and H. Experts of unequal
rank are padded with zeros to the largest; rows of the base have zeros. Shapes: N rows, L tokens per row, T = N·L, D in,
O out, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .member import (
    LayerExperts,
    Member,
    add_base_grad,
    compute_dtype,
    dropout_mask,
    dropout_seed,
    dropped,
    members_from,
    tensors_of,
)


def row_mixture(
    x: Tensor, weights: Tensor, columns: tuple[int, ...], members: Sequence[Member], *, recompute: bool = False
) -> list[Tensor]:
    """The output of every member, `[T, O]` each, in the dtype of the base GEMM.

    Args:
        x: `[T, D]`, row after row.
        weights: `[N, E]` that give each row wholly to its expert; their gradient is zero.
        columns: what `weights` say, without a look at their values: per row the expert's column, -1 for the base.
        members: the layers fed by x. Dropout is the first's: one mask for all.
        recompute: compute H again in the backward pass instead of keeping it.
    """
    dropout, experts = members[0].experts.dropout, tuple(m.experts for m in members)
    seed = dropout_seed() if dropout else 0
    return list(_RowMixture.apply(x, weights, columns, experts, seed, recompute, *tensors_of(members)))


class _RowMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weights, columns, experts, seed: int, recompute: bool, *tensors):
        members, dtype = members_from(experts, tensors), compute_dtype(x)
        H = _shrink(x, columns, members, seed, dtype)
        outputs = []
        for member, part in zip(members, H.split(_widths(experts), dim=-1), strict=True):
            B = _rows_of_B(member, columns, dtype)
            gated = (part * _gates(member.experts, columns, H)).to(dtype)
            if member.weight is None:
                y = torch.bmm(gated, B.transpose(1, 2))
            else:
                y = F.linear(x, member.weight, member.bias).view(*H.shape[:2], B.shape[1])
                y.baddbmm_(gated, B.transpose(1, 2))
            outputs.append(y.flatten(0, 1))
        ctx.set_materialize_grads(False)
        ctx.columns, ctx.experts, ctx.seed, ctx.dtype = columns, experts, seed, dtype
        ctx.save_for_backward(x, None if recompute else H, weights, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs):
        x, H, weights, *tensors = ctx.saved_tensors
        columns, experts, dtype = ctx.columns, ctx.experts, ctx.dtype
        members = members_from(experts, tensors)
        need_x, need_w, *_ = ctx.needs_input_grad
        need = members_from(experts, ctx.needs_input_grad[6:])
        if H is None:
            H = _shrink(x, columns, members, ctx.seed, dtype)
        dys = [None if dy is None else dy.to(dtype) for dy in grad_outputs]
        widths, grads, dHs = _widths(experts), [], []
        need_A = any(flag for wanted in need for flag in wanted.lora_A)
        for member, wanted, dy, part in zip(members, need, dys, H.split(widths, dim=-1), strict=True):
            count = len(member.lora_B)
            grads.append([None] * (2 + 2 * count))
            if dy is None:
                dHs.append(torch.zeros_like(part))
                continue
            by_row, gates = dy.reshape(*H.shape[:2], dy.shape[1]), _gates(member.experts, columns, H)
            if any(wanted.lora_B):
                dB = torch.bmm(by_row.transpose(1, 2), (part * gates).to(dtype))
                grads[-1][2 + count :] = _of_experts(dB, weights, columns, member.experts, member.lora_B, wanted.lora_B)
            if need_x or need_A:
                dHs.append(torch.bmm(by_row, _rows_of_B(member, columns, dtype)).mul_(gates))
        dx = None
        if need_x or need_A:
            dH = dHs[0] if len(dHs) == 1 else torch.cat(dHs, dim=-1)
            mask = dropout_mask(x, experts[0].dropout, ctx.seed) if experts[0].dropout else None
            if need_A:
                xd = (x if mask is None else x * mask).to(dtype).reshape(*H.shape[:2], x.shape[1])
                parts = torch.bmm(dH.transpose(1, 2), xd).split(widths, dim=1)
                for member, wanted, dy, dA, grad in zip(members, need, dys, parts, grads, strict=True):
                    if dy is not None and any(wanted.lora_A):
                        own = member.experts
                        found = _of_experts(dA, weights, columns, own, member.lora_A, wanted.lora_A)
                        grad[2 : 2 + len(found)] = found
            if need_x:
                A = _rows_of_A(members, columns, dtype)
                dx = add_base_grad(None, dys, members, dtype) if mask is None else None
                if dx is None:
                    dx = torch.bmm(dH, A).flatten(0, 1)
                else:
                    dx.view(*H.shape[:2], dx.shape[1]).baddbmm_(dH, A)
                if mask is not None:
                    dx = add_base_grad(dx.mul_(mask), dys, members, dtype)
                assert dx is not None
                dx = dx.to(x.dtype)
        dweights = torch.zeros_like(weights) if need_w else None
        return dx, dweights, None, None, None, None, *[g for grad in grads for g in grad]


def _shrink(x: Tensor, columns: tuple[int, ...], members: Sequence[Member], seed: int, dtype: torch.dtype) -> Tensor:
    """H of all members side by side, `[N, L, ΣR]`."""
    rows = dropped(x, members[0].experts.dropout, seed, dtype).view(len(columns), -1, x.shape[1])
    return torch.bmm(rows, _rows_of_A(members, columns, dtype).transpose(1, 2))


def _widths(experts: Sequence[LayerExperts]) -> list[int]:
    """R of each member: the largest rank of its experts."""
    return [max(own.ranks) for own in experts]


def _gates(own: LayerExperts, columns: tuple[int, ...], like: Tensor) -> Tensor | float:
    """s of each row, `[N, 1, 1]`, or the one that all experts share."""
    if own.scalings.count(own.scalings[0]) == len(own.scalings):
        return own.scalings[0]  # for the base, too, whose H is zero
    known = dict(zip(own.columns, own.scalings, strict=True))
    scalings = [known.get(column, 0.0) for column in columns]
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.tensor(scalings, dtype=dtype, device=like.device).view(-1, 1, 1)


def _rows_of_A(members: Sequence[Member], columns: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`[N, ΣR, D]`: for each row its expert's A of all members, each padded to the member's R."""
    width = members[0].lora_A[0].shape[1]
    by_member = [_by_row(m.experts, m.lora_A, (max(m.experts.ranks), width), columns) for m in members]
    rows = torch.cat([A for row in zip(*by_member, strict=True) for A in row])
    return rows.to(dtype).view(len(columns), -1, width)  # one cast, not one for each


def _rows_of_B(member: Member, columns: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`[N, O, R]`: for each row its expert's B."""
    shape = (member.lora_B[0].shape[0], max(member.experts.ranks))
    return torch.stack(_by_row(member.experts, member.lora_B, shape, columns)).to(dtype)


def _by_row(
    own: LayerExperts, matrices: Sequence[Tensor], shape: tuple[int, int], columns: tuple[int, ...]
) -> list[Tensor]:
    """For each row its expert's matrix, padded with zeros to `shape`; zeros where the layer carries none."""
    place, made = {column: i for i, column in enumerate(own.columns)}, {}
    for column in set(columns):
        if column not in place:
            made[column] = matrices[0].new_zeros(shape)
            continue
        matrix = matrices[place[column]]
        if matrix.shape != shape:
            matrix = F.pad(matrix, (0, shape[1] - matrix.shape[1], 0, shape[0] - matrix.shape[0]))
        made[column] = matrix
    return [made[column] for column in columns]


def _of_experts(
    by_row: Tensor,
    weights: Tensor,
    columns: tuple[int, ...],
    own: LayerExperts,
    like: Sequence[Tensor],
    need: Sequence[Any],
) -> list[Tensor | None]:
    """The gradient of each expert's matrix: of those `by_row [N, X, Y]` the sum over its rows, without the padding."""
    rows = {column: row for row, column in enumerate(columns)}
    if len(columns) - columns.count(-1) == len(rows.keys() - {-1}):  # no expert has two
        each = by_row.to(like[0].dtype).unbind()
        sums: Any = [each[rows[c]] if c in rows else torch.zeros_like(each[0]) for c in own.columns]
    else:
        mine = weights.to(by_row.dtype)
        if own.columns != tuple(range(weights.shape[1])):
            mine = mine[:, list(own.columns)]
        sums = (mine.T @ by_row.flatten(1)).to(like[0].dtype).view(-1, *by_row.shape[1:]).unbind()
    return [
        found[: t.shape[0], : t.shape[1]].to(t.dtype).contiguous() if wanted else None
        for found, t, wanted in zip(sums, like, need, strict=True)
    ]
