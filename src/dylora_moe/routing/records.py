"""What a trainer keeps of the router's passes, to score them again over a whole optimizer step.

Shapes: B batch, S sequence, D hidden, n router outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .granularity import Deciding, Granularity
from .router import Router


@dataclass(frozen=True)
class RouterRecord:
    """The frozen input of one scored pass.

    Attributes:
        hidden: `[B, S, D]`, detached.
        deciding: which tokens decided.
        mask: `[B, S]` bool of the tokens that count, or None for all.
        granularity: of the pass.
    """

    hidden: Tensor
    deciding: Deciding
    mask: Tensor | None
    granularity: Granularity

    def score(self, router: Router) -> Tensor:
        """Router scores `[tokens, n]` of the tokens that count."""
        scores = router.scores(self.hidden, self.granularity, self.deciding).scores
        scores = scores.expand(-1, self.hidden.shape[1], -1)
        return scores.flatten(0, 1) if self.mask is None else scores[self.mask]
