"""Prefix granularity: each token by the mean of the scores of its row up to and including it.

Shapes: B batch, S sequence, n router outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def running_totals(scores: Tensor, real: Tensor | None, starts: Tensor | None, before: Tensor | None) -> Tensor:
    """Sums of the scores up to and including each position, and last how many tokens they are of: `[B, S, n + 1]`.

    In float64, where a device has it: what is added to a long sum in float32 is lost in its last digits, so that a
    sequence read in pieces would be routed otherwise than at once.

    Args:
        scores: `[B, S, n]`.
        real: `[B, S]` bool of the tokens that count; None for all.
        starts: `[B or 1, S]` bool, where another sequence begins in the row (padding begins none); None if nowhere.
        before: `[B, 1, n + 1]` totals of what precedes the first position; None for nothing.
    """
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    own = torch.cat([scores, torch.ones_like(scores[..., :1])], -1).to(wide)
    if real is not None:
        own = own.masked_fill(~real.unsqueeze(-1), 0)
    totals = own.cumsum(1)
    if starts is not None:
        starts = starts if real is None else starts & real
        positions = torch.arange(own.shape[1], device=own.device)
        latest = torch.where(starts, positions, -1).cummax(1).values.unsqueeze(-1)
        others = (totals - own).gather(1, latest.clamp(min=0).expand_as(totals))  # zero before the first start
        totals = totals - others
        before = None if before is None else before * (latest < 0)
    return totals if before is None else totals + before


def mean_of(totals: Tensor) -> Tensor:
    """The means `[B, S, n]` of `totals [B, S, n + 1]`; zeros where no token counts yet."""
    return totals[..., :-1] / totals[..., -1:].clamp(min=1)
