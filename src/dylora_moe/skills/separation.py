"""How far two skills are apart: Hotelling's two-sample T² over what it is when their rows are dealt out at random.

With the N = n + m kept rows of two skills, C their covariance around the mean of all, d the difference of the two means
and λ = SHRINKAGE · tr(C)/D,

    q = n m / N · dᵀ (C + λI)⁻¹ d        T² = q / (1 − q / (N − 1))

where the second step puts the covariance within the skills in the place of C (exactly so for λ = 0). Of all ways to
deal the rows out, q has the mean q₀ = tr((C + λI)⁻¹ C), and what is returned is T² / T²₀. With many rows T²₀ is D, so
that this is T² ÷ D; with fewer rows than D, T² ÷ D has no fixed meaning.

Shapes: D width of a state.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations

import torch
from torch import Tensor

from .skill import Skill

SHRINKAGE = 0.1
SAME = 2.0
"""Below it two skills are the same, as far as their rows tell."""


def nearest(skills: Mapping[str, Skill], names: Collection[str]) -> dict[str, tuple[str, float]]:
    """Each of `names` → the skill that is least apart from it, and how far; nothing if there is no other.

    Args:
        skills: by name; their kept rows are compared by what decides how they are routed.
        names: of some of them.
    """
    rows = {name: skill.views.deciding for name, skill in skills.items()}
    found: dict[str, tuple[str, float]] = {}
    for pair in combinations(rows, 2):
        if not set(pair) & set(names):
            continue
        value = separation(*(rows[name] for name in pair))
        for name, other in (pair, pair[::-1]):
            if name not in found or value < found[name][1]:
                found[name] = other, value
    return {name: found[name] for name in rows if name in found and name in names}


def separation(one: Tensor, other: Tensor) -> float:
    """T² / T²₀ of two groups of rows, float64 `[n, D]` and `[m, D]`; 0 if all rows are the same."""
    n, m = len(one), len(other)
    N, rows = n + m, torch.cat([one, other])
    rows = rows - rows.mean(0)
    gram = rows @ rows.T / (N - 1)  # of which C has the eigenvalues, and the others are 0
    shrunk = SHRINKAGE * gram.trace() / rows.shape[1]
    if not shrunk > 0:
        return 0.0
    inverse = torch.linalg.inv(gram + shrunk * torch.eye(N, dtype=gram.dtype))
    apart = torch.cat([gram.new_full((n,), 1 / n), gram.new_full((m,), -1 / m)])  # d is the sum of the rows by this
    q = n * m / N * (N - 1) * float(apart @ gram @ inverse @ apart)
    expected = N - float(shrunk * inverse.trace())
    return (q / (1 - q / (N - 1))) / (expected / (1 - expected / (N - 1)))
