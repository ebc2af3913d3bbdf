"""Granularities: which tokens' scores decide the routing of a token.

A granularity is added by a function in a file of its own and a row in `GRANULARITIES`; forward, records and trainer all
go through it. Shapes: B batch, S sequence, n router outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Granularity(NamedTuple):
    """How the scores of single tokens become those that decide.

    Attributes:
        aggregate: `(scores [B, S, n], deciding)` → the scores that decide, `[B, S or 1, n]`.
        per_sequence: the prompt decides for the whole sequence: `deciding [B, S]` bool are the tokens that do, their
            outcome is held for the rest of a generation, and no later pass scores.
        calibration: which of `router.CALIBRATIONS` such scores are.
    """

    aggregate: Callable[[Tensor, Tensor | None], Tensor]
    per_sequence: bool = False
    calibration: str = "token"


def every_token(scores: Tensor, deciding: Tensor | None) -> Tensor:
    """Each token by its own score."""
    return scores


def mean_of_prompt(scores: Tensor, deciding: Tensor | None) -> Tensor:
    """Mean of `scores [B, S, n]` over the deciding tokens `[B, S]`: `[B, 1, n]`; zeros where there is none."""
    assert deciding is not None
    kept = deciding.unsqueeze(-1).to(scores.dtype)
    return (scores * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)


GRANULARITIES: dict[str, Granularity] = {
    "token": Granularity(every_token),
    "sequence": Granularity(mean_of_prompt, per_sequence=True, calibration="sequence"),
}
