"""Policies: from scores to shares, as pure functions and as the value that forward and trainer both apply.

A policy is added by a function in a file of its own and a row in `POLICIES`. Shapes: E router outputs (the experts,
and the base route as the last one if there is one), K top-k. Scores and shares are float32 `[..., E]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Shares(NamedTuple):
    """What a policy makes of some scores.

    Attributes:
        values: `[..., E]`, which sum to 1.
        kept: `[..., K]` the outputs that may have a share; None if all may.
    """

    values: Tensor
    kept: Tensor | None


def dense(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Softmax over all outputs: `[..., E]` weights that sum to 1."""
    return F.softmax(logits / temperature, dim=-1)


def top_k(logits: Tensor, k: int, temperature: float | Tensor = 1.0) -> Tensor:
    """Softmax over the `k` best logits and zero elsewhere (Shazeer et al., arXiv 1701.06538, eq. 3-5).

    Ties go to the lowest index, so that the choice depends on neither E nor the memory layout.
    """
    return softmax_of_best(logits, k, temperature).values


def softmax_of_best(logits: Tensor, k: int | None, temperature: float | Tensor) -> Shares:
    """`top_k` with the choice that it made; `dense` where k is None or all are kept."""
    if k is None or k >= logits.shape[-1]:
        return Shares(dense(logits, temperature), None)
    best = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :k]
    dropped = torch.ones_like(logits, dtype=torch.bool).scatter(-1, best, False)
    return Shares(dense(logits.masked_fill(dropped, float("-inf")), temperature), best)


POLICIES: dict[str, Callable[[Tensor, int | None, float | Tensor], tuple[Tensor, Tensor | None]]] = {
    "top_k": softmax_of_best
}
"""Name → `(logits, k, temperature)` → values and kept outputs, as in `Shares`; k is None where all are kept."""


@dataclass(frozen=True)
class Policy:
    """How scores become shares, for one pass: a value, made anew from the configuration whenever it is needed.

    Attributes:
        k: outputs kept per token; None for all.
        temperature: the logits are divided by it before the softmax.
        masked: columns of experts that are not routed yet.
        name: of `POLICIES`.
    """

    k: int | None = None
    temperature: float | Tensor = 1.0
    masked: tuple[int, ...] = ()
    name: str = "top_k"

    def mask(self, scores: Tensor) -> Tensor:
        """`scores [..., E]` with −inf for the experts that are not routed yet."""
        if not self.masked:
            return scores
        outputs = torch.arange(scores.shape[-1], device=scores.device)
        fresh = torch.isin(outputs, torch.tensor(self.masked, device=scores.device))
        return scores.masked_fill(fresh, float("-inf"))

    def shares(self, logits: Tensor) -> Shares:
        """The shares of all outputs for `logits [..., E]`, masked before (see `mask`) or here."""
        return Shares(*POLICIES[self.name](self.mask(logits), self.k, self.temperature))
