"""Translate every kernel for real GPUs without having one; `test_triton_code.py` runs this file.

Prints the bytes of shared memory, and ends with an error if a kernel does not translate or does not fit.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dylora_moe.mixing import launch, triton_code

TARGETS = (80, "bf16", 16), (90, "bf16", 16), (90, "fp32", 32)
"""Compute capability, dtype and its bits."""
SHARED = 99 * 1024  # bytes that one program may have where there is least: compute capability 8.6 and 8.9
POINTERS = {"x", "A", "gates", "H", "Hw", "partial", "y", "B", "out"}


def translate(kernel: Any, capability: int, dtype: str, tiles: dict[str, int], **options: int) -> int:
    """Bytes of shared memory of `kernel` with contiguous inputs whose sizes are multiples of 16."""
    signature, constants, multiples = {}, dict(tiles), {}
    for position, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in tiles:
            signature[name] = "constexpr"
        elif name in POINTERS:
            kind = "fp32" if name == "partial" else dtype
            signature[name], multiples[position,] = f"*{kind}", [["tt.divisibility", 16]]
        elif name in {"x_d", "A_d", "Hw_r", "B_r", "y_o", "out_o", "gates_r"}:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if name in {"D", "O", "R", "chunk", "x_t", "A_r", "Hw_t", "B_o", "y_t", "out_t"}:
                multiples[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, multiples)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert done.asm["cubin"]
    return done.metadata.shared


def cases(bits: int) -> list[tuple[Any, dict[str, int], dict[str, int]]]:
    """Every kernel with the tiles that the table gives for decoding, short and long inputs of 8B-layer shapes."""
    found = []
    for T in (1, 64, 2048):
        b = launch.shrink_blocks(T, 4096, 128, bits)
        tiles = {"SPLIT": b.split, "BLOCK_T": b.tokens, "BLOCK_R": b.columns, "BLOCK_D": b.inner}
        found.append((triton_code.shrink_kernel, tiles, {"num_warps": b.warps, "num_stages": 3}))
        b = launch.expand_blocks(T, 14336, 128, bits)
        tiles = {"BLOCK_T": b.tokens, "BLOCK_O": b.columns, "BLOCK_R": b.inner}
        found.append((triton_code.expand_kernel, tiles, {"num_warps": b.warps}))
    b = launch.shrink_blocks(100_000, 4096, 128, bits)
    assert b.split == 1
    tiles = {"SPLIT": 1, "BLOCK_T": b.tokens, "BLOCK_R": b.columns, "BLOCK_D": b.inner}
    found.append((triton_code.shrink_kernel, tiles, {"num_warps": b.warps, "num_stages": 3}))
    found.append((triton_code.sum_parts_kernel, {"SPLIT": 16, "BLOCK": 256}, {}))
    return found


def main() -> None:
    for capability, dtype, bits in TARGETS:
        for kernel, tiles, options in cases(bits):
            shared = translate(kernel, capability, dtype, tiles, **options)
            print(f"sm_{capability} {dtype} {kernel.fn.__name__} {tiles} {options}: {shared} bytes shared")  # noqa: T201
            assert shared <= SHARED
    print("translated")  # noqa: T201


if __name__ == "__main__":
    main()
