"""In which order vLLM keeps the rows of a matrix, read off the base's own weights.

Geometry says which rows of a matrix a rank computes. A model class of vLLM may store a fused matrix in another order
than the Hugging Face model does (Falcon's query_key_value), and B has to follow. Some columns of the weight, seen in
the file and again in the loaded linear, tell. Shapes: O rows in the file, o rows of this rank, c columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 8
"""c: enough to tell rows of real weights apart."""


def row_order(file: Tensor, loaded: Tensor, expected: Sequence[int]) -> list[int] | None:
    """Which row of the file each loaded row is.

    Args:
        file: `[O, c]`.
        loaded: `[o, c]`, of the same dtype.
        expected: `[o]` rows as the geometry says; right if the values agree.

    Returns:
        `expected` where that is right, else the rows by their values; None where a loaded row is none of the file's, or
        could be several.
    """
    if loaded.shape == (len(expected), file.shape[1]) and torch.equal(file[list(expected)], loaded):
        return list(expected)
    where: dict[tuple[float, ...], int | None] = {}
    for number, row in enumerate(file.tolist()):
        where[tuple(row)] = None if tuple(row) in where else number
    found = [where.get(tuple(row)) for row in loaded.tolist()]
    return None if any(row is None for row in found) else [row for row in found if row is not None]
