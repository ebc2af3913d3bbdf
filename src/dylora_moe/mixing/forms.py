"""The forms of the mixture by name: a row here and a file of its own add one.

All are equal to `reference.py`. Shapes: T tokens, D in, O out, E experts, K active experts per token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from torch import Tensor

from .dense import dense_mixture
from .gathered import gathered_mixture
from .grouped import grouped_mixture
from .member import Member


class Form(Protocol):
    """A way to compute `x Wᵀ + b + Σ_e w_e s_e (x A_eᵀ) B_eᵀ` of layers fed by one input."""

    def __call__(
        self,
        x: Tensor,
        weights: Tensor,
        members: Sequence[Member],
        indices: Tensor | None = None,
        *,
        recompute: bool = False,
        packed: dict[Hashable, Any] | None = None,
        memo: dict[Hashable, Any] | None = None,
    ) -> list[Tensor]:
        """The output of every member, `[T, O]` each, in the dtype of the base GEMM.

        Args:
            x: `[T, D]`.
            weights: `[T, E]`, any float dtype; receives its gradient.
            members: the layers fed by x. Dropout is the first's: one mask for all.
            indices: `[T, K]` int64, the active experts of each token: distinct columns, every column whose weight is
                not zero among them. None if all may be active; then only the dense form serves.
            recompute: compute H again in the backward pass instead of keeping it.
            packed: keeps these members' matrices as this form needs them, for calls without gradients.
            memo: keeps what depends on weights and indices alone, for the layers of one pass.
        """
        ...


FORMS: dict[str, Form] = {"dense": dense_mixture, "grouped": grouped_mixture, "gathered": gathered_mixture}
"""What a layer can be computed by; `choose` names one of them."""

FORM_NAMES = ("auto", *FORMS, "reference")
"""What a configuration may ask for: a choice by shapes, a form, or the plain loop."""
