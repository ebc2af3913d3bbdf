"""Sums: against the two-pass formula, in any order and any pieces."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from dylora_moe.skills.sums import CHUNK, Sums, pack, unpack
from tiny import difference

WIDTH = 7
EXACT = 1e-12  # float64 throughout


def states(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated states far from zero, in float32 as the router reads them, and their weights."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(length, WIDTH, generator=made) @ torch.randn(WIDTH, WIDTH, generator=made) + 5
    return x, torch.rand(length, generator=made, dtype=torch.float64) + 0.1


def assert_same(found: Sums, expected: Sums) -> None:
    assert abs(found.weight - expected.weight) <= EXACT * expected.weight
    assert difference(found.mean, expected.mean) <= EXACT
    assert found.scatter is not None
    assert expected.scatter is not None
    assert difference(found.scatter, expected.scatter) <= EXACT


@pytest.mark.parametrize("length", [1, 50, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_sums_are_those_of_all_states_however_they_come_in(length):
    x, w = states(length)
    mean = (w[:, None] * x.double()).sum(0) / w.sum()
    centred = x.double() - mean
    scatter = (w[:, None] * centred).T @ centred
    expected = Sums(float(w.sum()), mean, pack(scatter))
    assert_same(Sums.of([(x, w)], WIDTH), expected)
    assert_same(Sums.of(zip(x.split(97), w.split(97), strict=True), WIDTH), expected)
    torch.testing.assert_close(Sums.of([(x, w)], WIDTH).covariance(), scatter / w.sum())


def test_every_order_of_merging_gives_the_same():
    pieces = [states(n, seed) for seed, n in enumerate((3, 200, 1, 40, 17))]
    parts = [Sums.of([piece], WIDTH) for piece in pieces]
    everything = Sums.of(pieces, WIDTH)
    for order in permutations(parts):
        total = Sums.none(WIDTH)
        for part in order:
            total = total + part
        assert_same(total, everything)
    assert_same((parts[0] + parts[1]) + (parts[2] + (parts[3] + parts[4])), everything)


def test_nothing_is_added_by_nothing():
    some = Sums.of([states(5)], WIDTH)
    assert some + Sums.none(WIDTH) is some
    assert Sums.none(WIDTH) + some is some
    assert Sums.of([], WIDTH).weight == 0


def test_pooled_sums_do_not_grow():
    pooled = Sums(5.0, torch.zeros(WIDTH, dtype=torch.float64), None)
    with pytest.raises(ValueError, match="cannot grow"):
        pooled + Sums.of([states(5)], WIDTH)
    with pytest.raises(ValueError, match="pooled"):
        pooled.covariance()


def test_packing_is_undone():
    matrix = torch.randn(6, 6)
    matrix = matrix + matrix.T
    assert pack(matrix).shape == (21,)
    assert torch.equal(unpack(pack(matrix), 6), matrix)
