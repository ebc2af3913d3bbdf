"""What the router pays for its choices, as pure functions.

A balance loss is added by a function in a file of its own and a row in `BALANCE_LOSSES`. Shapes: E router outputs.
Logits and weights are float32 `[..., E]`; masks are bool over the leading dimensions, True for a token that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .policies import dense, top_k


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
"""Name → `(logits, shares, mask, mean)`."""


def router_losses(
    logits: Tensor,
    shares: Tensor,
    masked: Sequence[int],
    balance_loss: str,
    balance_coefficient: float,
    z_loss_coefficient: float,
    mask: Tensor | None = None,
    mean: Mean = masked_mean,
) -> tuple[Tensor, Tensor]:
    """The auxiliary loss (coefficients applied) and the raw balance loss of some tokens.

    Args:
        logits, shares: `[..., E]`, before and after the policy.
        masked: columns of experts that are not routed yet; they have no part in the balance.
        balance_loss: of `BALANCE_LOSSES`, or `"none"`.
        balance_coefficient, z_loss_coefficient: weights of the two.
        mask: bool over the leading dimensions, True for tokens that count; default all.
        mean: how to average over tokens.
    """
    if masked:
        kept = torch.tensor([i for i in range(logits.shape[-1]) if i not in set(masked)], device=logits.device)
        logits, shares = logits.index_select(-1, kept), shares.index_select(-1, kept)
    balance = logits.new_zeros(())
    if balance_loss != "none":
        balance = BALANCE_LOSSES[balance_loss](logits, shares, mask, mean)
    total = balance_coefficient * balance
    if z_loss_coefficient:
        total = total + z_loss_coefficient * z_loss(logits, mask, mean)
    return total, balance
