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

from .member import Member, compute_dtype, on_eager_cpu
from .sparse import aligned, gathers_in_place

FORMS = ("auto", "dense", "grouped", "gathered", "reference")


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


@cache
def crossovers(device: str) -> Crossovers:
    """The measured crossovers of a device type; those of the CPU where there are none."""
    table = json.loads(files("dylora_moe.mixing").joinpath("crossovers.json").read_text(encoding="utf-8"))
    return Crossovers(**table.get(device, table["cpu"])["crossovers"])


def choose(form: str, x: Tensor, members: Sequence[Member], num_experts: int, active: int | None) -> str:
    """The form for `x [T, D]`: what `form` asks for if it is exact here, else "dense".

    Args:
        form: one of `FORMS` but "reference".
        x: the input.
        members: the layers that it feeds.
        num_experts: E, the columns of the routing weights.
        active: K, if the weights are known to hold no more than so many entries per token that are not zero.
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
    at, tokens, ratio = crossovers(x.device.type), x.shape[0], num_experts / active
    if tokens * active * at.gathered_copies <= num_experts:
        return "gathered"
    if gathers_in_place(x):
        return "gathered" if ratio >= at.gathered_ratio and tokens >= at.gathered_tokens else "dense"
    return "grouped" if aligned(x, members) and ratio >= at.grouped_ratio and tokens >= at.grouped_tokens else "dense"
