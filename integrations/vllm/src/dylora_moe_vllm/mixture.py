"""Everything of a mixture that is no part of the base, and the decision at layer k.

Shapes: T tokens, D hidden size, S slots of vLLM's LoRA, E experts, n router outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .in_force import InForce, Patterns
from .router import Router, routing_weights
from .selectors import forced
from .settings import Settings


class Mixture(nn.Module):
    """Router, patterns and what is in force; `decide` is called with what enters layer k.

    Args:
        settings: of the mixture.
        hidden_size: D.
        mean: what becomes of the scores `[T, n]` of single tokens before they decide; None for token granularity.
        selected: → the linear that selectors adapt, as it stands in the model now.
        recorded: how many tokens a step has at most, where the weights are recorded; else 0.

    Attributes:
        recorded: float32 `[recorded, E]`, the weights in force in this step, a row per token. The model itself writes
            it, since no Python runs where a step is replayed as a graph.
    """

    closed: Tensor
    recorded: Tensor

    def __init__(
        self,
        settings: Settings,
        hidden_size: int,
        mean: nn.Module | None,
        selected: Callable[[], Any],
        recorded: int = 0,
    ):
        super().__init__()
        self.settings, self.in_force = settings, InForce()
        self.router, self.patterns, self.mean = Router(settings, hidden_size), Patterns(), mean
        self._selected = selected
        closed = torch.zeros(settings.outputs, dtype=torch.bool)
        closed[list(settings.closed)] = True
        self.register_buffer("closed", closed, persistent=False)
        self._recording = recorded > 0
        rows = torch.zeros(recorded, len(settings.experts), dtype=torch.float32)
        self.register_buffer("recorded", rows, persistent=False)

    def decide(self, hidden: Tensor) -> None:
        """Put in force what the router, or a request's selector, decides for `hidden [..., D]`."""
        scores = self.router(hidden.reshape(-1, hidden.shape[-1]))
        if self.mean is not None:
            scores = self.mean(scores)
        weights = self._forced(routing_weights(scores, self.settings, self.closed))
        if self._recording:
            self.recorded[: weights.shape[0]].copy_(weights)
        self.in_force.factors = self.patterns(weights, hidden.dtype)

    def _forced(self, weights: Tensor) -> Tensor:
        linear = self._selected()
        if not hasattr(linear, "lora_a_stacked"):
            return weights  # vLLM runs without LoRA
        rows = linear.lora_a_stacked[0][:, 0, 0]  # [S, E]: of each slot the one matrix, of it the one row
        return forced(weights, rows, linear.punica_wrapper._token_lora_indices[: weights.shape[0]])
