"""How one pass is routed: mask, softmax, top-k, and forced rows put in their place.

Shapes: B batch, S sequence, E experts, n router outputs (E, plus one with a base route), K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dylora_moe.arguments import BASE

from .policies import Policy


@dataclass(frozen=True)
class Rows:
    """What is known of a pass before anything is decided.

    Attributes:
        batch, length: B and S of the pass.
        mask: `[B, S]` bool of the real tokens, or None if all are.
        columns: per row the forced column, -1 for the base, None for a routed row; None if all rows are routed.
    """

    batch: int
    length: int
    mask: Tensor | None = None
    columns: tuple[int | None, ...] | None = None

    @property
    def forced(self) -> bool:
        """Whether every row is forced."""
        return self.columns is not None and None not in self.columns

    def routed_mask(self, device: torch.device) -> Tensor | None:
        """`[B, S]` bool of the real tokens in routed rows, or None if all are: what losses and load count."""
        mask = None if self.mask is None else self.mask.to(device)
        if self.columns is None:
            return mask
        rows = torch.tensor([c is None for c in self.columns], device=device)[:, None].expand(-1, self.length)
        return rows if mask is None else rows & mask


@dataclass(frozen=True)
class Decision:
    """How one pass is routed.

    Attributes:
        rows: whom it is about.
        weights: `[B or 1, S or 1, E]` what the layers multiply by.
        active: `[B or 1, S or 1, K]` columns of the experts that may have weight, distinct; None if all may.
        logits: `[B, S, n]` router scores, −inf for experts that are not routed yet; None if nothing was scored.
        shares: `[B, S, n]` after the policy, the base route included.
    """

    rows: Rows
    weights: Tensor
    active: Tensor | None = None
    logits: Tensor | None = None
    shares: Tensor | None = None

    @property
    def all_weights(self) -> Tensor:
        """The weights as `[B, S, E]`."""
        return self.weights.expand(self.rows.batch, self.rows.length, -1)


def decide(scores: Tensor, rows: Rows, policy: Policy, num_experts: int) -> Decision:
    """Apply the policy to `scores [B or 1, S or 1, n]`; forced rows keep what they are forced to."""
    logits = policy.mask(scores)
    shares, kept = policy.shares(logits)
    weights = shares[..., :num_experts]
    if rows.columns is not None:
        forced = one_hot_weights(rows.columns, num_experts, weights.device)
        routed = torch.tensor([c is None for c in rows.columns], device=weights.device)[:, None, None]
        weights = torch.where(routed, weights, forced.to(weights))
    if kept is not None and (rows.columns is not None or shares.shape[-1] != num_experts):
        # a forced row's expert is among the best, and the base route is no expert: choose again from what they are left
        fewer = kept.shape[-1] < num_experts
        kept = weights.detach().topk(kept.shape[-1], dim=-1, sorted=False).indices if fewer else None
    batch, length = rows.batch, rows.length
    every = (logits.expand(batch, length, -1), shares.expand(batch, length, -1))
    return Decision(rows, weights, kept, *every)


def one_hot_weights(columns: Sequence[int | None], num_experts: int, device: torch.device | None = None) -> Tensor:
    """`[B, 1, E]` weights that give row b wholly to expert `columns[b]`, or to none where it is -1 or None."""
    weights = torch.zeros(len(columns), 1, num_experts, device=device)
    for row, column in enumerate(columns):
        if column is not None and column >= 0:
            weights[row, 0, column] = 1.0
    return weights


def largest(weights: Sequence[float], experts: Sequence[str]) -> str:
    """The expert with the largest of `weights [E]`, or `"base"` where what is left to the base alone is larger."""
    weight = max(weights)
    return BASE if 1 - sum(weights) > weight else experts[weights.index(weight)]
