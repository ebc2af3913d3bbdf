"""Evaluation metrics in which every token weighs the same, whatever the batches.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class TokenMeans:
    """Sums of loss and accuracy per example, gathered from all processes.

    Args:
        gather: joins a tensor `[B]` of every process and drops the rows that only fill up the last batch.
        names: of the domains, by index.
    """

    def __init__(self, gather: Callable[[Tensor], Any], names: Sequence[str]):
        self.gather, self.names = gather, names
        self.rows: list[Tensor] = []

    def add(self, log_probs: Tensor, is_top1: Tensor, label_mask: Tensor, domains: Tensor | None) -> Tensor:
        """Add a batch (`[B, S]` each; `log_probs` and `is_top1` are zero where `label_mask` is); returns its loss."""
        own = torch.full_like(label_mask[:, 0], -1, dtype=torch.long) if domains is None else domains[:, 0]
        columns = [-log_probs.double().sum(-1), is_top1.double().sum(-1), label_mask.double().sum(-1), own.double()]
        rows = self.gather(torch.stack(columns, 1)).cpu()
        self.rows.append(rows)
        return rows[:, 0].sum() / rows[:, 2].sum().clamp(min=1)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Mean loss and accuracy over the tokens of all examples, and mean loss over those of each domain."""
        rows = torch.cat(self.rows)
        nll, correct, count = rows[:, 0], rows[:, 1], rows[:, 2]
        result = {
            f"{prefix}_loss": float(nll.sum() / count.sum()),
            f"{prefix}_mean_token_accuracy": float(correct.sum() / count.sum()),
        }
        for index in rows[:, 3].long().unique().tolist():
            if index >= 0:
                inside = rows[:, 3] == index
                result[f"{prefix}_loss/{self.names[index]}"] = float(nll[inside].sum() / count[inside].sum())
        return result
