"""The experts' matrices of a group of layers, one above the other and padded with zeros to one rank.

Shapes: D in, O out, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .member import Member, side_by_side


def stacked(tensors: Sequence[Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """`[E, rows, columns]` in `dtype`, padded with zeros; a view where the tensors lie side by side in memory."""
    if [t.shape for t in tensors].count(torch.Size((rows, columns))) == len(tensors):
        flat = side_by_side(tensors)
        stack = torch.stack(list(tensors)) if flat is None else flat.view(len(tensors), rows, columns)
    else:
        stack = torch.stack([F.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0])) for t in tensors])
    return stack.to(dtype)


def stack_A(members: Sequence[Member], dtype: torch.dtype) -> Tensor:
    """`[E, ΣR, D]`: for each expert the rows of all members, each padded to the member's largest rank."""
    parts = [stacked(m.lora_A, padded_rank(m, dtype), m.lora_A[0].shape[1], dtype) for m in members]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def stack_B(members: Sequence[Member], dtype: torch.dtype) -> list[Tensor]:
    """`[E, O, R]` of each member, padded to its largest rank."""
    return [stacked(m.lora_B, m.lora_B[0].shape[0], padded_rank(m, dtype), dtype) for m in members]


def padded_rank(member: Member, dtype: torch.dtype) -> int:
    """The member's largest rank, rounded up to rows of whole 16-byte blocks."""
    block = 16 // dtype.itemsize
    return -(-max(member.experts.ranks) // block) * block
