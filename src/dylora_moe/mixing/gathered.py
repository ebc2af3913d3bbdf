"""The mixture of each token's K experts without sorting: what they need is gathered token by token.

For few tokens (decoding) the K experts' matrices of each token are copied together, and the pairs of token and expert
are rows of one matrix:

    H[t]  = A[experts of t] · x[t]               [K·R]
    y     = x Wᵀ + b + Σ_k (H ⊙ w · s) · Bᵀ      [T, O]

On a CPU without gradients nothing is copied, so that it serves many tokens too: H is a sampled product, those entries
of x · A_catᵀ that belong to a token's experts, and y a weighted sum of rows of B_catᵀ.

Experts of unequal rank are padded with zeros to the largest. Shapes: T tokens, D in, O out, R rank, E experts, K active
experts per token, M members.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .member import Member, compute_dtype, on_eager_cpu, pair_gates, remember
from .stacks import padded_rank, stacked


def gathered_mixture(
    x: Tensor,
    weights: Tensor,
    members: Sequence[Member],
    indices: Tensor | None = None,
    *,
    recompute: bool = False,
    packed: dict[Hashable, Any] | None = None,
    memo: dict[Hashable, Any] | None = None,
) -> list[Tensor]:
    """A `Form`; unless `gathers_in_place`, copies T·K of the A and B, so for few tokens.

    Every member carries the same experts, one per column and in their order. `recompute` changes nothing: with
    gradients torch keeps the copies, which outweigh H.
    """
    assert indices is not None
    dtype, dropout, (tokens, active) = compute_dtype(x), members[0].experts.dropout, indices.shape
    in_place = tokens > 1 and gathers_in_place(x)
    by_rows = packed is not None or (in_place and tokens * active >= weights.shape[1])  # transposed no more than copied
    A, Bs, scalings = remember(packed, ("gathered", dtype), lambda: _gatherable(members, dtype, by_rows))
    rank = A.shape[1]
    chosen = remember(
        None if torch.is_grad_enabled() else memo,
        ("chosen", tokens, dtype, rank, scalings),
        lambda: Chosen.of(weights, indices, members, rank, dtype),
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
    def of(cls, weights: Tensor, indices: Tensor, members: Sequence[Member], rank: int, dtype: torch.dtype) -> Chosen:
        """Those of `indices [T, K]`, with the gates that `weights [T, E]` give them."""
        (tokens, active), experts, device = indices.shape, weights.shape[1], weights.device
        first = torch.arange(len(members), device=device) * experts
        rows = indices.unsqueeze(-1) * rank + torch.arange(rank, device=device)
        kinds = members[:1] if len({m.experts.scalings for m in members}) == 1 else members
        gates = [pair_gates(weights, indices, m.experts.scaling_row(weights, dtype), dtype) for m in kinds]
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


def _gatherable(
    members: Sequence[Member], dtype: torch.dtype, by_rows: bool
) -> tuple[Tensor, list[Tensor], tuple[float | tuple[float, ...], ...]]:
    """The A of all members `[M·E, R, D]`, each member's B `[E, O, R]` or `by_rows` `[E·R, O]`, and its scalings.

    Scalings that are all the same stand as one number.
    """
    rank = max(padded_rank(m, dtype) for m in members)
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
