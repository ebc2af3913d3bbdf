"""The learning rate of the single LoRA that a mixture is compared with.

At alpha = 2r the best rate of a LoRA goes as 1/√r (measured: 2e-3 at r = 8, 1e-3 at 32). Two ranks that train at one
rate compare learning rates: here a single LoRA of rank 32 would train at twice its best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SWEEP = (0.5, 1.0, 2.0)
"""Multiples of the scaled rate that a sweep tries."""


@dataclass
class SingleRate:
    """The learning rate of a single LoRA, and why it is that.

    Attributes:
        rank: R, the single LoRA's.
        expert_rank: r, the mean of the experts'.
        experts: the learning rate that the experts are trained with.
        how: `scaled` by √(r/R), `given` by the recipe, or the best of a `sweep` on the held-out rows.
        chosen: the learning rate.
        tried: rate → mean of the metric over the domains.
    """

    rank: int
    expert_rank: float
    experts: float
    how: Literal["scaled", "given", "sweep"]
    chosen: float
    tried: dict[float, float] = field(default_factory=dict)

    @property
    def rates(self) -> list[float]:
        """The rates to train with."""
        return [self.chosen * factor for factor in SWEEP] if self.how == "sweep" else [self.chosen]

    def choose(self, measured: Mapping[float, float], higher_is_better: bool) -> None:
        """Note what each rate gave and take the best."""
        self.tried = dict(measured)
        best = max if higher_is_better else min
        self.chosen = best(self.tried, key=self.tried.__getitem__)

    @property
    def warning(self) -> str | None:
        """What to say where two ranks are compared at one rate."""
        if self.rank == self.expert_rank or not math.isclose(self.chosen, self.experts) or self.how == "sweep":
            return None
        return (
            f"a LoRA of rank {self.rank} and experts of rank {self.expert_rank:g} are compared at one learning rate "
            f"({self.chosen:g}), which favours one of them: at alpha = 2r the best rate goes as 1/√r. Leave "
            "eval.baseline_learning_rate out, or set it to sweep."
        )

    def __str__(self) -> str:
        tried = ", ".join(f"{rate:.3g}" for rate in self.tried or self.rates)
        why = {
            "scaled": f"{self.experts:g} × √({self.expert_rank:g}/{self.rank})",
            "given": "eval.baseline_learning_rate",
            "sweep": f"the best of {tried} on the held-out rows",
        }[self.how]
        return f"one LoRA of rank {self.rank}: learning rate {self.chosen:.3g} ({why})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `results.json`."""
        return {
            "rank": self.rank,
            "learning_rate": self.chosen,
            "how": self.how,
            "experts_learning_rate": self.experts,
            "tried": {f"{rate:g}": value for rate, value in self.tried.items()},
        }


def single_rate(asked: float | Literal["sweep"] | None, experts: float, rank: int, count: int) -> SingleRate:
    """The rate of a single LoRA.

    Args:
        asked: `eval.baseline_learning_rate`.
        experts: the learning rate that the experts are trained with.
        rank: of the single LoRA, the sum of the experts'.
        count: number of experts.
    """
    own = rank / count
    scaled = experts * math.sqrt(own / rank)
    if asked is None or asked == "sweep":
        return SingleRate(rank, own, experts, "scaled" if asked is None else "sweep", scaled)
    return SingleRate(rank, own, experts, "given", asked)
