"""Tiles and splits of the kernels' launches."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.mixing import launch


@pytest.mark.parametrize("T", [1, 16, 17, 256, 257, 2048])
@pytest.mark.parametrize(("D", "R"), [(1, 1), (4096, 128), (14336, 1024), (300, 20)])
@pytest.mark.parametrize("bits", [16, 32])
def test_every_column_is_summed_once(T, D, R, bits):
    blocks = launch.shrink_blocks(T, D, R, bits)
    chunk = blocks.chunk(D)
    assert chunk % blocks.inner == 0
    assert chunk * blocks.split >= D
    assert min(blocks.tokens, blocks.columns, blocks.inner) >= 16  # what tl.dot takes
    tiles = -(-T // blocks.tokens) * -(-R // blocks.columns)
    assert blocks.split == 1 or tiles * blocks.split <= launch.PROGRAMS


@pytest.mark.parametrize("T", [1, 16, 17, 256, 257, 2048])
@pytest.mark.parametrize(("O", "R"), [(1, 1), (4096, 128), (14336, 1024), (300, 20)])
@pytest.mark.parametrize("bits", [16, 32])
def test_tiles_of_expand_are_what_a_dot_takes(T, O, R, bits):
    blocks = launch.expand_blocks(T, O, R, bits)
    sizes = (blocks.tokens, blocks.columns, blocks.inner)
    assert min(sizes) >= 16
    assert all(size.bit_count() == 1 for size in sizes)


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shrink got .*do not fit"):
        launch.shrink(torch.randn(2, 3), torch.randn(4, 5), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"expand got .*do not fit"):
        launch.expand(torch.randn(2, 3), torch.randn(2, 4), torch.randn(3, 5), torch.empty(2, 3))
