"""Routing as pure functions: policies, losses, load, entropy.

Shapes: B batch, S sequence, E router outputs (the experts, and the base route as the last one if there is one),
K top-k. Logits and weights are float32 `[..., E]`; masks are bool over the leading dimensions, True for a token
that counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Softmax over all outputs: `[..., E]` weights that sum to 1."""
    return F.softmax(logits / temperature, dim=-1)


def top_k(logits: Tensor, k: int, temperature: float | Tensor = 1.0) -> Tensor:
    """Softmax over the `k` best logits and zero elsewhere (Shazeer et al., arXiv 1701.06538, eq. 3-5).

    Ties go to the lowest index, so that the choice depends on neither E nor the memory layout.
    """
    if k >= logits.shape[-1]:
        return dense(logits, temperature)
    best = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :k]
    dropped = torch.ones_like(logits, dtype=torch.bool).scatter(-1, best, False)
    return dense(logits.masked_fill(dropped, float("-inf")), temperature)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `values [..., E]` over all leading positions where `mask [...]` holds; zero if there is none."""
    if mask is None:
        return values.flatten(0, -2).mean(0)
    weight = mask.to(values.dtype).unsqueeze(-1)
    return (values * weight).flatten(0, -2).sum(0) / weight.sum().clamp(min=1)


def load(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of the real tokens that each output receives, `[E]`, differentiable."""
    return masked_mean(weights, mask)


def entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of each row of `weights [..., E]`, with 0 · log 0 = 0."""
    return torch.special.entr(weights).sum(-1)


Mean = Callable[[Tensor, Tensor | None], Tensor]
"""How a loss averages `values [..., E]` over the tokens of a mask; a trainer averages over all processes."""


def uniform_mse(logits: Tensor, weights: Tensor, mask: Tensor | None = None, mean: Mean = masked_mean) -> Tensor:
    """mean_e (load_e − 1/E)²: zero when every output receives the same load."""
    return (mean(weights, mask) - 1 / weights.shape[-1]).square().mean()


def switch(logits: Tensor, weights: Tensor, mask: Tensor | None = None, mean: Mean = masked_mean) -> Tensor:
    """E · Σ_e f_e · P_e: 1 at uniform, E at collapse (Switch Transformer, arXiv 2101.03961, eq. 4-6).

    f_e is the share of tokens whose best output is e, P_e the mean probability of e: equal to transformers'
    `load_balancing_loss_func` with `top_k=1`.
    """
    chosen = top_k(logits.detach(), 1)
    return logits.shape[-1] * (mean(chosen, mask) * mean(dense(logits), mask)).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None, mean: Mean = masked_mean) -> Tensor:
    """mean(logsumexp(logits)²), keeps the logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return mean(logits.logsumexp(-1).square().unsqueeze(-1), mask).squeeze(-1)


BALANCE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None, Mean], Tensor]] = {
    "uniform_mse": uniform_mse,
    "switch": switch,
}


def one_hot_weights(columns: list[int | None], num_experts: int, device: torch.device | None = None) -> Tensor:
    """`[B, 1, E]` weights that give row b wholly to expert `columns[b]`, or to none where it is None."""
    weights = torch.zeros(len(columns), 1, num_experts, device=device)
    for row, column in enumerate(columns):
        if column is not None:
            weights[row, 0, column] = 1.0
    return weights
