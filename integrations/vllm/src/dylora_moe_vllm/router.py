"""Scores, and what they become: the router and the policy of a mixture, in float32.

Shapes: T tokens, D hidden size, H_r hidden size of the router, E experts, n router outputs (E, or E + 1 with a base
route as the last).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .settings import Settings


def _mlp(router: Any, state: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(state, router.down)), router.up)


def _linear(router: Any, state: Tensor) -> Tensor:
    return F.linear(state, router.up)


def _closed_form(router: Any, state: Tensor) -> Tensor:
    return F.linear(state, router.weight, router.bias)


SCORES: dict[str, Callable[[Any, Tensor], Tensor]] = {"mlp": _mlp, "linear": _linear, "closed_form": _closed_form}


def shapes(settings: Settings, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The router's parameters by name."""
    n, width = settings.outputs, settings.router_hidden_size
    if width is not None:
        return {"down": (width, hidden_size), "up": (n, width)}
    if settings.router_type == "linear":
        return {"up": (n, hidden_size)}
    return {"weight": (n, hidden_size), "bias": (n,)}


class Router(nn.Module):
    """`hidden [T, D]` of any float dtype → scores float32 `[T, n]`.

    Args:
        settings: of the mixture.
        hidden_size: D.
    """

    def __init__(self, settings: Settings, hidden_size: int):
        super().__init__()
        self._score = SCORES[settings.router_type]
        for name, shape in shapes(settings, hidden_size).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=False))

    def forward(self, hidden: Tensor) -> Tensor:
        return self._score(self, F.layer_norm(hidden.float(), hidden.shape[-1:]))


def routing_weights(scores: Tensor, settings: Settings, closed: Tensor) -> Tensor:
    """The experts' shares: softmax over the top-k best of the scores that are not closed.

    Ties go to the lowest index.

    Args:
        scores: float32 `[T, n]`.
        settings: of the mixture.
        closed: bool `[n]`, outputs that get no share.

    Returns:
        Float32 `[T, E]`; with a base route a row may sum to less than 1.
    """
    scores = (scores / settings.temperature).masked_fill(closed, float("-inf"))
    if settings.top_k < settings.outputs:
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., : settings.top_k]
        dropped = torch.ones_like(scores, dtype=torch.bool).scatter(-1, best, False)
        scores = scores.masked_fill(dropped, float("-inf"))
    return F.softmax(scores, dim=-1)[..., : len(settings.experts)]
