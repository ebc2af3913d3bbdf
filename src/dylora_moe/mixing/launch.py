"""Launching the Triton kernels: tile sizes by shape, grids, and what has no element.

Shapes: T tokens, D in, O out, R rows of A, the sum of the experts' ranks.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROGRAMS = 128  # about as many as a large GPU has multiprocessors (A100 108, H100 132)


class Blocks(NamedTuple):
    """Tile sizes of one launch, powers of two: tokens, rows or outputs, the summed dimension; and its split."""

    tokens: int
    columns: int
    inner: int
    split: int = 1
    warps: int = 4

    def chunk(self, D: int) -> int:
        """Columns of D that one part of the split sums: a multiple of `inner`."""
        return -(-D // (self.split * self.inner)) * self.inner


def shrink_blocks(T: int, D: int, R: int, bits: int) -> Blocks:
    """Tiles of `shrink` by shape and bits of the dtype.

    Few tokens make few tiles: D is then split so that about `PROGRAMS` programs read A, each at least 256 columns.

        tokens    tile T × R × D (16-bit)   why
        1-16      16 × 16 × 256             A is read once, by many programs
        17-256    32 × 64 × 64
        257-      64 × 128 × 64             one program holds all rows of 8 experts of rank 16
    """
    if T <= 16:
        tokens, columns, inner = 16, 16, 256
    elif T <= 256:
        tokens, columns, inner = 32, _power(R, 16, 64), 64
    else:
        tokens, columns, inner = 64, _power(R, 16, 128), 64
    if bits == 32:  # the same bytes of shared memory
        inner //= 2
    tiles = -(-T // tokens) * -(-R // columns)
    split = max(1, min(PROGRAMS // max(tiles, 1), -(-D // 256)))
    return Blocks(tokens, columns, min(inner, _power(D, 16, inner)), split, warps=8 if tokens * columns >= 8192 else 4)


def expand_blocks(T: int, O: int, R: int, bits: int) -> Blocks:
    """Tiles of `expand`: wide ones for many tokens; for a few, small enough to make about `PROGRAMS` programs."""
    inner = _power(R, 16, 64 if bits == 16 else 32)
    if T <= 16:
        return Blocks(16, 32 if O > 2048 else 16, inner)
    if T <= 256:
        return Blocks(32, 64, inner)
    return Blocks(128, 128, inner, warps=8)


def _power(size: int, low: int, high: int) -> int:
    """The power of two from `size` upwards, within `low` … `high`."""
    return min(high, max(low, 1 << (size - 1).bit_length()))


@functools.cache
def _code() -> Any:
    return importlib.import_module(".triton_code", __package__)


def _on(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def shrink(x: Tensor, A: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    (T, D), R = x.shape, A.shape[0]
    _check(A.shape == (R, D) and gates.shape == (T, R) and A.dtype == x.dtype, "shrink", x, A, gates)
    H, Hw = x.new_empty(T, R), x.new_empty(T, R)
    if T * R == 0 or D == 0:
        return H.zero_(), Hw.zero_()
    blocks = shrink_blocks(T, D, R, 8 * x.element_size())
    partial = x.new_empty(blocks.split if blocks.split > 1 else 0, T, R, dtype=torch.float32)
    grid = (-(-T // blocks.tokens), -(-R // blocks.columns), blocks.split)
    with _on(x):
        _code().shrink_kernel[grid](
            x, A, gates, H, Hw, partial, T, D, R, blocks.chunk(D),
            *x.stride(), *A.stride(), *gates.stride(),
            SPLIT=blocks.split, BLOCK_T=blocks.tokens, BLOCK_R=blocks.columns, BLOCK_D=blocks.inner,
            num_warps=blocks.warps, num_stages=3,
        )  # fmt: skip
        if blocks.split > 1:
            block = 256
            _code().sum_parts_kernel[(-(-T * R // block),)](
                partial, gates, H, Hw, T, R, *gates.stride(), SPLIT=blocks.split, BLOCK=block
            )
    return H, Hw


def expand(y: Tensor, Hw: Tensor, B: Tensor, out: Tensor) -> Tensor:
    (T, O), R = y.shape, Hw.shape[1]
    _check(Hw.shape == (T, R) and B.shape == (O, R) and Hw.dtype == B.dtype, "expand", y, Hw, B)
    if T * O == 0 or R == 0:
        return out if out is y else out.copy_(y)
    blocks = expand_blocks(T, O, R, 8 * Hw.element_size())
    with _on(y):
        _code().expand_kernel[-(-T // blocks.tokens), -(-O // blocks.columns)](
            y, Hw, B, out, T, O, R, *y.stride(), *Hw.stride(), *B.stride(), *out.stride(),
            BLOCK_T=blocks.tokens, BLOCK_O=blocks.columns, BLOCK_R=blocks.inner, num_warps=blocks.warps,
        )  # fmt: skip
    return out


def _check(fit: bool, name: str, *tensors: Tensor) -> None:
    if not fit:
        got = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
        raise ValueError(f"{name} got {got}, which do not fit; see the shapes in its docstring.")
