"""Which token comes next. Shapes: V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 256
"""So many of the best tokens usually hold all of `top_p`; to sort the whole vocabulary takes longer than a pass."""

LEAST = 1e-30
"""A temperature that a float32 can be divided by: the best token is as good as sure."""


def sampled(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token drawn by `logits [V]` at `temperature` above 0, among the fewest whose probabilities sum to `top_p`."""
    logits = logits.float()
    shares = ((logits - logits.max()) / max(temperature, LEAST)).softmax(-1)
    if top_p == 1:
        return _drawn(shares, generator)
    best, ids = shares.topk(min(FEW, len(shares)))
    if best.sum() < top_p:
        best, ids = shares.sort(descending=True)
    before = best.cumsum(-1) - best
    return int(ids[_drawn(best.masked_fill(before >= top_p, 0), generator)])


def _drawn(shares: Tensor, generator: torch.Generator) -> int:
    """A place drawn by `shares [V]`, as by `torch.multinomial`, which would refuse what is no number."""
    noise = torch.empty_like(shares).exponential_(generator=generator)
    return int((shares / noise.clamp_(min=torch.finfo(noise.dtype).tiny)).argmax())


def log_probabilities(logits: Tensor, id: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """That of the token `id` by `logits [V]`, and the `count` likeliest tokens with theirs."""
    every = logits.float().log_softmax(-1)
    best, ids = every.topk(min(count, len(every)))
    return float(every[id]), list(zip(ids.tolist(), best.tolist(), strict=True))
