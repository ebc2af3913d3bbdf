"""Launching the Triton kernels: tile sizes by shape, grids, and what has no element.

Shapes: T tokens, D in, O out, E experts, R rows of A (ΣR, or the rank of one expert), K experts per token.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PROGRAMS = 128  # about as many as a large GPU has multiprocessors (A100 108, H100 132)


class Blocks(NamedTuple):
    """Tile sizes of one launch, powers of two: tokens, rows or outputs, the summed dimension; and its split."""

    tokens: int
    columns: int
    inner: int
    split: int = 1
    warps: int = 4


def shrink_blocks(T: int, D: int, R: int, bits: int) -> Blocks:
    """Tiles of `shrink` by shape and bits of the dtype.

    Few tokens make few tiles: D is then split so that about `_PROGRAMS` programs read A, each at least 256 columns.

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
    split = _split(-(-T // tokens) * -(-R // columns), D)
    return Blocks(tokens, columns, min(inner, _power(D, 16, inner)), split, warps=8 if tokens * columns >= 8192 else 4)


def expand_blocks(T: int, O: int, R: int, bits: int) -> Blocks:
    """Tiles of `expand`: wide ones for many tokens; for a few, small enough to make about `_PROGRAMS` programs."""
    inner = _power(R, 16, 64 if bits == 16 else 32)
    if T <= 16:
        return Blocks(16, 32 if O > 2048 else 16, inner)
    if T <= 256:
        return Blocks(32, 64, inner)
    return Blocks(128, 128, inner, warps=8)


def gathered_blocks(rows: int, D: int, R: int) -> Blocks:
    """Tiles of `gathered_shrink`, one of `rows` = T·K at a time."""
    columns = _power(R, 1, 16)
    return Blocks(1, columns, min(256, _power(D, 16, 256)), _split(rows * -(-R // columns), D))


def _split(tiles: int, D: int) -> int:
    return max(1, min(_PROGRAMS // max(tiles, 1), -(-D // 256)))


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
    partial = _partial(x, blocks, T, R)
    grid = (-(-T // blocks.tokens), -(-R // blocks.columns), blocks.split)
    with _on(x):
        _code().shrink_kernel[grid](
            x, A, gates, H, Hw, partial, T, D, R, _chunk(D, blocks),
            *x.stride(), *A.stride(), *gates.stride(),
            SPLIT=blocks.split, BLOCK_T=blocks.tokens, BLOCK_R=blocks.columns, BLOCK_D=blocks.inner,
            num_warps=blocks.warps, num_stages=3,
        )  # fmt: skip
        if blocks.split > 1:
            _sum_parts(partial, gates.stride(), gates, H, Hw, T, R, blocks)
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


def gathered_shrink(x: Tensor, A: Tensor, indices: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    (T, D), (E, R, _), K = x.shape, A.shape, indices.shape[1]
    fit = A.shape == (E, R, D) and indices.shape == gates.shape == (T, K) and A.dtype == x.dtype
    _check(fit, "gathered_shrink", x, A, indices, gates)
    H, Hw = x.new_empty(T, K, R), x.new_empty(T, K, R)
    if T * K * R == 0 or D == 0:
        return H.zero_(), Hw.zero_()
    blocks = gathered_blocks(T * K, D, R)
    partial = _partial(x, blocks, T * K, R)
    with _on(x):
        _code().gathered_shrink_kernel[T * K, -(-R // blocks.columns), blocks.split](
            x, A, indices, gates, H, Hw, partial, T, D, R, K, _chunk(D, blocks),
            *x.stride(), *A.stride(), *indices.stride(), *gates.stride(),
            SPLIT=blocks.split, BLOCK_R=blocks.columns, BLOCK_D=blocks.inner,
        )  # fmt: skip
        if blocks.split > 1:
            _sum_parts(partial, (1, 0), gates.contiguous(), H, Hw, T * K, R, blocks)
    return H, Hw


def gathered_expand(y: Tensor, Hw: Tensor, B: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    (T, O), (_, K, R) = y.shape, Hw.shape
    fit = Hw.shape == (T, K, R) and B.shape[1:] == (R, O) and indices.shape == (T, K) and Hw.dtype == B.dtype
    _check(fit, "gathered_expand", y, Hw, B, indices)
    if T * O == 0 or K * R == 0:
        return out if out is y else out.copy_(y)
    columns = 32 if T * O <= 32 * _PROGRAMS else 128
    with _on(y):
        _code().gathered_expand_kernel[T, -(-O // columns)](
            y, Hw, B, indices, out, O, R, K,
            *y.stride(), *Hw.stride(), *B.stride(), *indices.stride(), *out.stride(),
            BLOCK_O=columns, BLOCK_R=_power(R, 1, 32),
        )  # fmt: skip
    return out


def _partial(x: Tensor, blocks: Blocks, rows: int, R: int) -> Tensor:
    return x.new_empty(blocks.split if blocks.split > 1 else 0, rows, R, dtype=torch.float32)


def _chunk(D: int, blocks: Blocks) -> int:
    """Columns of D that one part of the split sums: a multiple of the block."""
    return -(-D // (blocks.split * blocks.inner)) * blocks.inner


def _sum_parts(partial: Tensor, strides: Any, gates: Tensor, H: Tensor, Hw: Tensor, rows: int, R: int, blocks: Blocks):
    block = 256
    _code().sum_parts_kernel[(-(-rows * R // block),)](
        partial, gates, H, Hw, rows, R, *strides, SPLIT=blocks.split, BLOCK=block
    )


def _check(fit: bool, name: str, *tensors: Tensor) -> None:
    if not fit:
        got = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
        raise ValueError(f"{name} got {got}, which do not fit; see the shapes in its docstring.")
