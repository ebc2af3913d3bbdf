"""The mixture in two GEMMs around the base's own, for any number of experts and mixed ranks.

    H  = x · A_catᵀ                    [T, ΣR]
    Hw = H ⊙ (w · s)[expert_of_row]    [T, ΣR]
    y  = x Wᵀ + b + Hw · B_catᵀ        [T, O]

Shapes: T tokens, D in, O out, R rank of one expert, ΣR the sum of the ranks, E experts. The backward pass is written
out so that only x (which the base's other branches share), H and w are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class DenseMixture(NamedTuple):
    """What the two GEMMs need to know about the experts of one layer; plain values, no tensors.

    Attributes:
        columns: for each expert of the layer, its column in the weights.
        ranks: its rank.
        scalings: its scaling (alpha/r or alpha/√r).
        dropout: the probability p that all of them share.
        seed: of the dropout mask; the backward pass draws the same mask again instead of keeping it.
    """

    columns: tuple[int, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout: float = 0.0
    seed: int = 0

    def gates(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """`(w · s)[expert_of_row]`: one gate per row of A_cat, `[T, ΣR]`."""
        weights = weights.to(torch.promote_types(weights.dtype, dtype))
        gates = self._of_experts(weights) * self._scaling_row(weights)
        if len(set(self.ranks)) == 1:
            gates = gates.unsqueeze(-1).expand(*gates.shape, self.ranks[0]).flatten(-2)
        else:
            ranks = torch.tensor(self.ranks, device=weights.device)
            gates = gates.repeat_interleave(ranks, dim=-1, output_size=sum(self.ranks))
        return gates.to(dtype)

    def weights_grad(self, per_row: Tensor, weights: Tensor) -> Tensor:
        """Sum `per_row [T, ΣR]` over the rows of each expert: the gradient of `weights [T, E]`."""
        dtype = torch.promote_types(weights.dtype, per_row.dtype)
        if len(set(self.ranks)) == 1:
            sums = per_row.unflatten(-1, (len(self.ranks), self.ranks[0])).sum(-1, dtype=dtype)
        else:
            sums = torch.stack([part.sum(-1, dtype=dtype) for part in per_row.split(self.ranks, dim=-1)], dim=-1)
        sums = (sums * self._scaling_row(sums)).to(weights.dtype)
        if self.columns == tuple(range(weights.shape[-1])):
            return sums
        return torch.zeros_like(weights).index_copy_(-1, _index(self.columns, weights), sums)

    def _of_experts(self, weights: Tensor) -> Tensor:
        if self.columns == tuple(range(weights.shape[-1])):
            return weights
        return weights.index_select(-1, _index(self.columns, weights))

    def _scaling_row(self, weights: Tensor) -> Tensor | float:
        if len(set(self.scalings)) == 1:
            return self.scalings[0]
        return torch.tensor(self.scalings, dtype=weights.dtype, device=weights.device)


def dense_mixture(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weights: Tensor,
    mixture: DenseMixture,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
) -> Tensor:
    """`x Wᵀ + b + Σ_e w_e s_e (x A_eᵀ) B_eᵀ`, or only the sum if `weight` is None.

    Args:
        x: `[T, D]`.
        weight, bias: the frozen base's `[O, D]` and `[O]`.
        weights: `[T, E]`, any float dtype; receives its gradient.
        mixture: which column, rank and scaling belongs to which pair of matrices.
        lora_A, lora_B: one `[R_e, D]` and `[O, R_e]` per expert, cast to the dtype of the computation.
    """
    dtype = compute_dtype(x)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        xd = F.dropout(x, mixture.dropout) if mixture.dropout else x
        A, B = pack(lora_A, lora_B, dtype)
        return expand(x, weight, bias, F.linear(xd.to(dtype), A) * mixture.gates(weights, dtype), B)
    if mixture.dropout:
        mixture = mixture._replace(seed=int(torch.randint(2**62, ())))
    return _DenseMixture.apply(x, weight, bias, weights, mixture, *lora_A, *lora_B)


def expand(x: Tensor, weight: Tensor | None, bias: Tensor | None, gated: Tensor, B: Tensor) -> Tensor:
    """Base GEMM (if any) plus `gated [T, ΣR] · Bᵀ`, accumulated into one output."""
    if weight is None:
        return gated @ B.T
    y = F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return y + gated @ B.T
    return y.addmm_(gated, B.T)


def pack(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`A_cat [ΣR, D]` and `B_cat [O, ΣR]` in `dtype`."""
    A = lora_A[0] if len(lora_A) == 1 else torch.cat(list(lora_A))
    B = lora_B[0] if len(lora_B) == 1 else torch.cat(list(lora_B), dim=1)
    return A.to(dtype), B.to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype the base GEMM runs in: autocast's if it is on, else that of `x`.

    The small matrices are cast to it. PEFT casts x to the adapters' dtype instead, which keeps a float32 copy of x
    per layer over a bf16 base.
    """
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def dropout_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """The inverted-dropout mask of `seed`: 0 or 1/(1-p), in the shape, dtype and device of `x`."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


class _DenseMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, weights, mixture: DenseMixture, *factors):
        dtype = compute_dtype(x)
        A, B = pack(factors[: len(mixture.ranks)], factors[len(mixture.ranks) :], dtype)
        xd = x * dropout_mask(x, mixture.dropout, mixture.seed) if mixture.dropout else x
        H = F.linear(xd.to(dtype), A)
        ctx.mixture, ctx.dtype = mixture, dtype
        ctx.save_for_backward(x, H, weights, weight, *factors)
        return expand(x, weight, bias, H * mixture.gates(weights, dtype), B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs):
        x, H, weights, weight, *factors = ctx.saved_tensors
        mixture: DenseMixture = ctx.mixture
        count = len(mixture.ranks)
        need_x, _, _, need_w, _, *need_factors = ctx.needs_input_grad
        dy = grad_outputs[0].to(ctx.dtype)
        A, B = pack(factors[:count], factors[count:], ctx.dtype)
        gates = mixture.gates(weights, ctx.dtype)
        dA, dB = [None] * count, [None] * count
        dx = dweights = None
        if any(need_factors[count:]):
            dB = _split(dy.T @ (H * gates), mixture.ranks, 1, factors[count:], need_factors[count:])
        need_A = any(need_factors[:count])
        if need_x or need_w or need_A:
            dHw = dy @ B
            if need_w:
                dweights = mixture.weights_grad(dHw * H, weights)
            dH = dHw.mul_(gates)
            mask = dropout_mask(x, mixture.dropout, mixture.seed) if mixture.dropout else None
            if need_A:
                xd = (x if mask is None else x * mask).to(ctx.dtype)
                dA = _split(dH.T @ xd, mixture.ranks, 0, factors[:count], need_factors[:count])
            if need_x:
                if mask is None and weight is not None:
                    dx = (dy @ weight.to(ctx.dtype)).addmm_(dH, A).to(x.dtype)
                else:
                    dx = (dH @ A).to(x.dtype)
                    if mask is not None:
                        dx.mul_(mask)
                    if weight is not None:
                        dx += dy @ weight.to(ctx.dtype)
        return dx, None, None, dweights, None, *dA, *dB


def _split(grad: Tensor, ranks: tuple[int, ...], dim: int, like: Sequence[Tensor], need: Sequence[bool]) -> list:
    parts = grad.split(ranks, dim)
    return [p.to(t.dtype) if wanted else None for p, t, wanted in zip(parts, like, need, strict=True)]


def _index(columns: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(columns, device=like.device)
