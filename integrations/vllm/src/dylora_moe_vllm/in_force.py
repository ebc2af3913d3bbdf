"""What was decided for the tokens of a step, between layer k that decides and the linears that apply it.

Shapes: T tokens, E experts, R rows (ranks of all experts of one linear side by side).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .settings import Carried


class Patterns(nn.Module):
    """Which expert each of R rows belongs to, and its scaling: one pattern per distinct kind of linear, numbered."""

    def __init__(self) -> None:
        super().__init__()
        self._known: list[tuple[Carried, ...]] = []

    def number(self, carried: Sequence[Carried]) -> int:
        """The number of the pattern of these experts."""
        key = tuple(carried)
        if key not in self._known:
            at = len(self._known)
            columns = [one.column for one in key for _ in range(one.rank)]
            scalings = [one.scaling for one in key for _ in range(one.rank)]
            self.register_buffer(f"columns_{at}", torch.tensor(columns), persistent=False)
            self.register_buffer(f"scalings_{at}", torch.tensor(scalings, dtype=torch.float32), persistent=False)
            self._known.append(key)
        return self._known.index(key)

    def forward(self, weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """`weights [T, E]` → for each pattern, `[T, R]` of `dtype`: weight times scaling of every row's expert."""
        return [
            (weights.index_select(1, getattr(self, f"columns_{at}")) * getattr(self, f"scalings_{at}")).to(dtype)
            for at in range(len(self._known))
        ]


class InForce:
    """What layer k decided for the tokens of this step; one per model, shared by layer k and all routed linears.

    Attributes:
        factors: of each pattern, `[T, R]`; none before layer k ran.
    """

    def __init__(self) -> None:
        self.factors: list[Tensor] = []
