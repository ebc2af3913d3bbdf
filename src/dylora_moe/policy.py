"""How scores become weights, and what the router pays for them, by the mixture's configuration.

Shapes: E experts, n router outputs (E, plus one with a base route).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import routing
from .experts import NEW

if TYPE_CHECKING:
    from .model import DyLoraMoE


class Policy:
    """Mix-in of `DyLoraMoE`."""

    def _new_columns(self: DyLoraMoE) -> list[int]:  # type: ignore[misc]
        return [i for i, state in enumerate(self.expert_states.values()) if state == NEW]

    def auxiliary_losses(
        self: DyLoraMoE,  # type: ignore[misc]
        logits: Tensor,
        mask: Tensor | None = None,
        mean: routing.Mean = routing.masked_mean,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The auxiliary loss (coefficients applied) and the raw balance loss of some tokens.

        Args:
            logits: `[..., n]` router scores.
            mask: bool over the leading dimensions, True for tokens that count; default all.
            mean: how to average over tokens; a trainer passes one that spans its processes.
            shares: the policy's `[..., n]` weights, if they are known already.
        """
        config = self.moe_config
        if shares is None:
            shares = self._policy(logits)
        fresh = set(self._new_columns())
        if fresh:
            kept = torch.tensor([i for i in range(logits.shape[-1]) if i not in fresh], device=logits.device)
            logits, shares = logits.index_select(-1, kept), shares.index_select(-1, kept)
        balance = logits.new_zeros(())
        if config.balance_loss != "none":
            balance = routing.BALANCE_LOSSES[config.balance_loss](logits, shares, mask, mean)
        aux = config.balance_coefficient * balance
        if config.z_loss_coefficient:
            aux = aux + config.z_loss_coefficient * routing.z_loss(logits, mask, mean)
        return aux, balance

    def _active_experts(self: DyLoraMoE) -> int | None:  # type: ignore[misc]
        """How many outputs the policy keeps per token; None for all."""
        config = self.moe_config
        return config.train_top_k if self.training else (2 if config.top_k is None else config.top_k)

    def _policy(self: DyLoraMoE, logits: Tensor) -> Tensor:  # type: ignore[misc]
        """Weights of all router outputs: dense in training unless `train_top_k`, the best `top_k` in evaluation."""
        k, config = self._active_experts(), self.moe_config
        temperature = config.temperature_tensor if torch.compiler.is_compiling() else config.temperature
        return routing.dense(logits, temperature) if k is None else routing.top_k(logits, k, temperature)
