"""Where one form of the mixture overtakes another, for the library's choice (`mixing/crossovers.json`).

Every form computes the same layer for T tokens and E experts with two kept, in random order within each round: forward
alone, and with the backward pass. The crossovers that are kept are those, of a grid, that lose least time against
always taking the fastest form: the mean of log(time chosen / time of the best).
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from dylora_moe.mixing import FORMS
from dylora_moe.mixing.choice import Crossovers
from dylora_moe.mixing.member import LayerExperts, Member

from .timing import Step, interleaved

ACTIVE, RANK = 2, 16
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
EXPERTS = (4, 8, 16, 32, 64)
RATIOS, LEAST_TOKENS = (2, 4, 8, 16, 32, 1000), (1, 4, 8, 16, 32, 64, 128, 256)
GRID = {
    "gathered_copies": (0.25, 0.5, 1, 2, 4, 8, 16, 64),
    "gathered_ratio": RATIOS,
    "gathered_tokens": LEAST_TOKENS,
    "grouped_ratio": RATIOS,
    "grouped_tokens": LEAST_TOKENS,
}


class Shape(NamedTuple):
    """One layer to measure: whether with a backward pass, its width, T and E."""

    backward: bool
    width: int
    tokens: int
    experts: int


Times = Mapping[Shape, Mapping[str, float]]
"""Seconds by form, infinite where it is out of the question."""


def shapes(widths: Iterable[int]) -> list[Shape]:
    """All that is measured, for layers of these widths."""
    return [Shape(*sizes) for sizes in itertools.product((False, True), widths, TOKENS, EXPERTS)]


def seconds(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median seconds of every form."""
    with torch.set_grad_enabled(shape.backward):
        steps = calls(shape, device, dtype)
        if shape.tokens > 32 and (shape.backward or device != "cpu"):
            del steps["gathered"]  # copies too much to be in question
        times = interleaved(steps, rounds, device=device)
    return dict.fromkeys(FORMS, math.inf) | {form: statistics.median(values) for form, values in times.items()}


def calls(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Step]:
    """One call per form on the same tensors.

    Without gradients they find what layers before them left for the pass, and few tokens packed matrices, as within
    `generate`.
    """
    backward, width, tokens, experts = shape
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    x, dy, A, B = make(tokens, width), make(tokens, width), make(experts, RANK, width), make(experts, width, RANK)
    own = LayerExperts(tuple(range(experts)), (RANK,) * experts, (2.0,) * experts)
    leaves = [t.requires_grad_(backward) for t in (x, *A.unbind(), *B.unbind())]
    members = [Member(own, make(width, width), None, leaves[1 : 1 + experts], leaves[1 + experts :])]
    values, indices = torch.randn(tokens, experts, device=device).topk(ACTIVE)
    weights = torch.zeros(tokens, experts, device=device).scatter(1, indices, values.softmax(-1))
    packed: dict[str, Any] = {form: None if backward or tokens > 16 else {} for form in FORMS}
    memos: dict[str, Any] = {form: None if backward else {} for form in FORMS}

    def call(form: str) -> None:
        (y,) = FORMS[form](x, weights, members, indices, packed=packed[form], memo=memos[form])
        if backward:
            torch.autograd.grad(y, leaves, dy)

    return {form: functools.partial(call, form) for form in FORMS}


def regret(at: Crossovers, times: Times, device: str) -> float:
    """Mean log of the time lost by the rule against the fastest form everywhere."""
    lost = []
    for (backward, _, tokens, experts), row in times.items():
        chosen = at.fastest(tokens, experts, ACTIVE, in_place=device == "cpu" and not backward)
        lost.append(math.log(row[chosen] / min(row.values())))
    return sum(lost) / len(lost)


def grid() -> list[Crossovers]:
    """The crossovers in question."""
    return [Crossovers(*values) for values in itertools.product(*GRID.values())]
