"""Triton code of the mixture's kernels; `kernels.py` launches it, and imports it only where triton is installed.

Every kernel accumulates in float32, takes any strides and masks ragged edges. Shapes: T tokens, D in, O out, R the sum
of the experts' ranks. `slice_t`, `slice_r`, … are the positions that a program owns; positions are int64, since T · O
may exceed what int32 counts.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def shrink_kernel(
    x, A, gates, H, Hw, partial, T, D, R, chunk,
    x_t, x_d, A_r, A_d, gates_t, gates_r,
    SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """H = x · Aᵀ and Hw = H ⊙ gates; with SPLIT > 1, program s sums only its `chunk` of D, into `partial [s, T, R]`."""
    slice_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    slice_r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    part = tl.program_id(2)
    in_t, in_r = slice_t[:, None] < T, slice_r[None, :] < R
    x_rows, A_rows = x + slice_t[:, None] * x_t, A + slice_r[None, :] * A_r
    sums = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    stop = tl.minimum((part + 1) * chunk, D)
    for start in range(part * chunk, stop, BLOCK_D):
        slice_d = start + tl.arange(0, BLOCK_D)
        x_tile = tl.load(x_rows + slice_d[None, :] * x_d, mask=in_t & (slice_d[None, :] < stop), other=0.0)
        A_tile = tl.load(A_rows + slice_d[:, None] * A_d, mask=in_r & (slice_d[:, None] < stop), other=0.0)
        sums = tl.dot(x_tile, A_tile, sums, input_precision="ieee")
    inside = in_t & in_r
    place = slice_t[:, None] * R + slice_r[None, :]
    if SPLIT > 1:
        tl.store(partial + part.to(tl.int64) * T * R + place, sums, mask=inside)
    else:
        gate = tl.load(gates + slice_t[:, None] * gates_t + slice_r[None, :] * gates_r, mask=inside, other=0.0)
        tl.store(H + place, sums.to(H.dtype.element_ty), mask=inside)
        tl.store(Hw + place, (sums * gate.to(tl.float32)).to(Hw.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def sum_parts_kernel(partial, gates, H, Hw, T, R, gates_t, gates_r, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """H = Σ_s partial[s] in the order of s, and Hw = H ⊙ gates."""
    place = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    size = T.to(tl.int64) * R
    inside = place < size
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(SPLIT):
        sums += tl.load(partial + part * size + place, mask=inside, other=0.0)
    gate = tl.load(gates + place // R * gates_t + place % R * gates_r, mask=inside, other=0.0)
    tl.store(H + place, sums.to(H.dtype.element_ty), mask=inside)
    tl.store(Hw + place, (sums * gate.to(tl.float32)).to(Hw.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def expand_kernel(
    y, Hw, B, out, T, O, R,
    y_t, y_o, Hw_t, Hw_r, B_o, B_r, out_t, out_o,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = y + Hw · Bᵀ; `out` may be `y`."""
    slice_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    slice_o = (tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    in_t, in_o = slice_t[:, None] < T, slice_o[None, :] < O
    sums = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        slice_r = start + tl.arange(0, BLOCK_R)
        Hw_tile = tl.load(
            Hw + slice_t[:, None] * Hw_t + slice_r[None, :] * Hw_r, mask=in_t & (slice_r[None, :] < R), other=0.0
        )
        B_tile = tl.load(
            B + slice_o[None, :] * B_o + slice_r[:, None] * B_r, mask=in_o & (slice_r[:, None] < R), other=0.0
        )
        sums = tl.dot(Hw_tile, B_tile, sums, input_precision="ieee")
    inside = in_t & in_o
    base = tl.load(y + slice_t[:, None] * y_t + slice_o[None, :] * y_o, mask=inside, other=0.0)
    sums += base.to(tl.float32)
    tl.store(out + slice_t[:, None] * out_t + slice_o[None, :] * out_o, sums.to(out.dtype.element_ty), mask=inside)
