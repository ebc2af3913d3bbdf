"""Batches whose tokens know their domain.

Shapes: B batch, S sequence; a padding-free batch is one row, B = 1.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from dylora_moe.routing.records import RouterRecord

DOMAIN = "domain"


class DomainCollator:
    """Wraps a collator: examples' `domain` names become one tensor `[B, S]` of expert indices, -1 for padding.

    Raises:
        ValueError: a domain that is no expert.
    """

    def __init__(self, collator: Any, names: list[str]):
        self.collator, self.names = collator, names

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [dict(example) for example in examples]
        domains = [example.pop(DOMAIN, None) for example in examples]
        unknown = sorted({str(domain) for domain in domains if domain not in self.names})
        if unknown:
            raise ValueError(f"domain {', '.join(unknown)} is no expert; the experts are {', '.join(self.names)}.")
        batch = self.collator(examples)
        lengths = [len(example["input_ids"]) for example in examples]
        rows = [torch.full((n,), self.names.index(domain)) for n, domain in zip(lengths, domains, strict=True)]
        ids = batch["input_ids"]
        batch[DOMAIN] = torch.full_like(ids, -1)
        for row, values in enumerate(rows if len(ids) == len(rows) else [torch.cat(rows)]):
            batch[DOMAIN][row, : len(values)] = values
        return batch


def padded(collator: Any) -> Any:
    """A copy of a collator that pads rows where the original flattens them into one."""
    copied = copy.copy(collator)
    if isinstance(copied, DomainCollator):
        copied.collator = padded(copied.collator)
    elif getattr(copied, "padding_free", False):
        copied.padding_free = False
    return copied


def per_token(record: RouterRecord, domains: Tensor) -> Tensor:
    """The domains `[B, S]` of the tokens that count in a record, `[tokens]`."""
    domains = domains.to(record.hidden.device)
    return domains.flatten() if record.mask is None else domains[record.mask]
