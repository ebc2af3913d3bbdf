"""Granularities: which tokens' scores decide the routing of a token.

A granularity is added by a function in a file of its own and a row in `GRANULARITIES`; forward, records and trainer all
go through it. Shapes: B batch, S sequence, n router outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .prefix import mean_of, running_totals


@dataclass(frozen=True)
class Deciding:
    """Which tokens of a pass, and of those before it, decide.

    Attributes:
        tokens: `[B, S]` bool; None for all.
        starts: `[B or 1, S]` bool, where another sequence begins in the same row; None if nowhere.
        before: `[B, 1, n + 1]` totals of the same rows' earlier passes; None if there were none.
    """

    tokens: Tensor | None = None
    starts: Tensor | None = None
    before: Tensor | None = None

    def to(self, device: torch.device) -> Deciding:
        """The same on a device."""
        return Deciding(
            *(None if part is None else part.to(device) for part in (self.tokens, self.starts, self.before))
        )

    def detached(self) -> Deciding:
        """The same without the graph of the earlier passes."""
        return self if self.before is None else replace(self, before=self.before.detach())


class Aggregated(NamedTuple):
    """What became of the scores of single tokens.

    Attributes:
        scores: those that decide, `[B, S or 1, n]`.
        totals: `[B, S, n + 1]` from which a later pass over the same rows goes on, where the granularity is cumulative.
    """

    scores: Tensor
    totals: Tensor | None = None


class Granularity(NamedTuple):
    """How the scores of single tokens become those that decide.

    Attributes:
        aggregate: `(scores [B, S, n], deciding)` → `Aggregated`.
        per_sequence: the prompt decides for the whole sequence: `deciding.tokens` are those that do, their outcome is
            held for the rest of a generation, and no later pass scores.
        cumulative: the tokens before decide with each token, so that a pass goes on from the totals of earlier ones.
        calibration: which of `router.CALIBRATIONS` such scores are.
    """

    aggregate: Callable[[Tensor, Deciding], Aggregated]
    per_sequence: bool = False
    cumulative: bool = False
    calibration: str = "token"


def every_token(scores: Tensor, deciding: Deciding) -> Aggregated:
    """Each token by its own score."""
    return Aggregated(scores)


def mean_of_prompt(scores: Tensor, deciding: Deciding) -> Aggregated:
    """Mean of `scores [B, S, n]` over the deciding tokens `[B, S]`: `[B, 1, n]`; zeros where there is none."""
    assert deciding.tokens is not None
    kept = deciding.tokens.unsqueeze(-1).to(scores.dtype)
    return Aggregated((scores * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1))


def mean_so_far(scores: Tensor, deciding: Deciding) -> Aggregated:
    """Mean of `scores [B, S, n]` over the deciding tokens up to and including each; zeros where there is none yet."""
    totals = running_totals(scores, deciding.tokens, deciding.starts, deciding.before)
    return Aggregated(mean_of(totals).to(scores.dtype), totals)


GRANULARITIES: dict[str, Granularity] = {
    "token": Granularity(every_token),
    "sequence": Granularity(mean_of_prompt, per_sequence=True, calibration="sequence"),
    "prefix": Granularity(mean_so_far, cumulative=True, calibration="sequence"),
}
