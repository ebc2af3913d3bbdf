"""Which form computes a group of layers: decided by shapes alone, never by the values of a tensor.

The crossovers between the forms are measured by `benchmarks/crossovers.py`, which writes `crossovers.json` with where
and when; see there. Shapes: T tokens, E experts, K active experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

from .gathered import gathers_in_place
from .grouped import aligned
from .member import Member, compute_dtype, on_eager_cpu


class Crossovers(NamedTuple):
    """Where one form overtakes another on one kind of device.

    Attributes:
        gathered_copies: gathered pays while T · K · this ≤ E.
        gathered_ratio: where it copies nothing, also from this many experts per active one (E / K).
        gathered_tokens: and from this many tokens.
        grouped_ratio: elsewhere grouped pays from this many experts per active one.
        grouped_tokens: and from this many tokens.
    """

    gathered_copies: float
    gathered_ratio: float
    gathered_tokens: int
    grouped_ratio: float
    grouped_tokens: int

    def fastest(self, tokens: int, num_experts: int, active: int, in_place: bool) -> str:
        """The form for so many tokens, experts and active ones; `in_place`: gathered copies nothing."""
        if tokens * active * self.gathered_copies <= num_experts:
            return "gathered"
        ratio = num_experts / active
        if in_place:
            return "gathered" if ratio >= self.gathered_ratio and tokens >= self.gathered_tokens else "dense"
        return "grouped" if ratio >= self.grouped_ratio and tokens >= self.grouped_tokens else "dense"


@cache
def crossovers(device: str) -> Crossovers:
    """The measured crossovers of a device type; those of the CPU where there are none."""
    table = json.loads(files("dylora_moe.mixing").joinpath("crossovers.json").read_text(encoding="utf-8"))
    return Crossovers(**table.get(device, table["cpu"])["crossovers"])


def choose(
    form: str, x: Tensor, members: Sequence[Member], num_experts: int, active: int | None, tokens: int | None = None
) -> str:
    """The name of the form for `x [T, D]`: what `form` asks for if it is exact here, else "dense".

    Args:
        form: one of `FORM_NAMES` but "reference".
        x: the input.
        members: the layers that it feeds.
        num_experts: E, the columns of the routing weights.
        active: K, if the weights are known to hold no more than so many entries per token that are not zero.
        tokens: choose as if x had so many rows.
    """
    if form == "dense" or active is None or active >= num_experts:
        return "dense"
    every = tuple(range(num_experts))
    if any(m.experts.columns != every for m in members):
        return "dense"
    if form == "gathered":
        return "gathered"
    if not on_eager_cpu(x) and not (aligned(x, members) and compute_dtype(x) == torch.bfloat16):
        return "dense"  # all that torch's grouped_mm takes there
    if form == "grouped":
        return "grouped"
    rows = x.shape[0] if tokens is None else tokens
    fastest = crossovers(x.device.type).fastest(rows, num_experts, active, gathers_in_place(x))
    return "dense" if fastest == "grouped" and not aligned(x, members) else fastest


LEAST_TOKENS_PER_ROW = 16
"""From so many tokens per row on, a set of matrices for each row costs less than every expert for every row."""


def pays_by_row(tokens: int) -> bool:
    """Whether rows of so many tokens are computed each with its own expert only, rather than with all."""
    return tokens >= LEAST_TOKENS_PER_ROW
