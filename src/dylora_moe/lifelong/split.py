"""How many skills some rows are of: groups that lie as far apart as two skills do.

Shapes: N rows, D width of a state.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from dylora_moe.skills.separation import separation

MOST = 5
"""Groups that are looked for."""
APART = 10.0
"""How far groups are apart at least, see `skills.separation`. K-means also finds groups in one skill: up to 7 apart in
12 domains of SmolLM2's, where 8 pairs and 8 triples of them were found with anything between 7 and 15."""
STARTS, ROUNDS = 8, 50


def proposal(rows: Tensor, fewest: int) -> Tensor:
    """Int64 `[N]`: the group of each row, 0 for all where they are of one skill; larger groups come first.

    Args:
        rows: float64 `[N, D]`, the mean states of the rows.
        fewest: rows of a group at least.
    """
    found = torch.zeros(len(rows), dtype=torch.long)
    for count in range(2, MOST + 1):
        groups = split(rows, count)
        sizes = torch.bincount(groups, minlength=count)
        parts = [rows[groups == group] for group in range(count)]
        if sizes.min() < fewest or min(separation(*pair) for pair in combinations(parts, 2)) < APART:
            continue
        found = groups
    return found


def split(rows: Tensor, count: int) -> Tensor:
    """Int64 `[N]` of `count` groups by k-means (Lloyd 1982), the best of several starts (k-means++, Arthur 2007)."""
    drawn, best, least = torch.Generator().manual_seed(0), torch.zeros(len(rows), dtype=torch.long), float("inf")
    for _ in range(STARTS if count > 1 else 0):
        centres = rows[torch.randint(len(rows), (1,), generator=drawn)]
        while len(centres) < count:
            distances = torch.cdist(rows, centres).square().min(1).values.clamp(min=1e-12)
            centres = torch.cat([centres, rows[torch.multinomial(distances, 1, generator=drawn)]])
        for _ in range(ROUNDS):
            distances, groups = torch.cdist(rows, centres).min(1)
            sums = torch.zeros_like(centres).index_add_(0, groups, rows)
            sizes = torch.bincount(groups, minlength=count)[:, None]
            centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        if float(distances.square().sum()) < least:
            least, best = float(distances.square().sum()), groups
    order = torch.bincount(best, minlength=count).argsort(descending=True, stable=True)
    return order.argsort()[best]
