"""Selectors: stock LoRA adapters that carry routing weights, so that a request's model name decides, not the router.

vLLM knows which adapter each token's request asked for, and keeps the prefix caches of adapters apart. A selector is of
rank 1, on a linear `[1, E]` that is never called; its A *is* the row of weights. Shapes: T tokens, S slots, E experts.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

SELECT = "dylora_select"
"""The linear that selectors adapt."""


def forced(weights: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Put the rows of selectors in the place of what the router decided.

    Args:
        weights: float32 `[T, E]`, of the router.
        rows: `[S, E]`, of the selectors in vLLM's slots.
        slots: integers `[T]`, each token's slot; negative where its request has no selector. Those of padding tokens
            may be any number.

    Returns:
        Float32 `[T, E]`.
    """
    chosen = rows.float().index_select(0, slots.clamp(0, rows.shape[0] - 1))
    return torch.where((slots >= 0).unsqueeze(-1), chosen, weights)


def selector_of(model: str, served: Collection[str], selectors: Collection[str]) -> str | None:
    """The selector that a request's model name stands for: `NAME:sql` is `sql`; None if it is nobody's.

    Args:
        model: of the request.
        served: the names under which the mixture is served.
        selectors: of the mixture.
    """
    name, colon, key = model.rpartition(":")
    return key if colon and name in served and key in selectors else None
