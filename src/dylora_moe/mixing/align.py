"""Bringing the routing weights of a batch to the leading shape of one layer's activations."""

from __future__ import annotations

import torch
from torch import Tensor


def align_weights(weights: Tensor, leading: torch.Size) -> Tensor:
    """View `weights [B, S or 1, E]` as `[*leading, E]`, or as something that broadcasts to it.

    Handles layers that see flattened tokens `[B·S]` (OPT), only the last positions (a language-model head while
    generating), rows repeated by beam search, and a batch of one that stands for all (position embeddings).

    Raises:
        ValueError: the layer sees tokens in an order that the weights do not describe.
    """
    rows, length = weights.shape[:2]
    if len(leading) == 1:  # flattened tokens
        tokens = leading[0]
        if tokens % rows == 0 and length in (1, tokens // rows):
            return weights.expand(rows, tokens // rows, -1).reshape(tokens, -1)
    elif len(leading) == 2:
        if leading[0] not in (rows, 1) and leading[0] % rows == 0:  # beams and returned sequences
            weights = weights.repeat_interleave(leading[0] // rows, dim=0)
        if leading[0] in (weights.shape[0], 1) or weights.shape[0] == 1:
            if length in (1, leading[1]):
                return weights
            if length > leading[1]:
                return weights[:, length - leading[1] :]
    raise ValueError(
        f"routing weights of shape {tuple(weights.shape)} do not fit a layer that sees activations of leading shape "
        f"{tuple(leading)}; layers that see a subset of the tokens cannot be routed: leave them out of target_modules."
    )
