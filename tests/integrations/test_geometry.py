"""Every output of every rank is computed from the right row of B, and nothing twice but replicas."""

import pytest

from dylora_moe_vllm.geometry import Geometry


def ranks(size: int, **cut):
    return [Geometry(rank=rank, size=size, **cut) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_column_parallel_parts_side_by_side(size: int):
    for rank, geometry in enumerate(ranks(size, inputs=8, parts=(16, 32), replicas=(1, 1), cut="outputs")):
        assert geometry.own_inputs == slice(0, 8)
        gate, up = geometry.outputs_of(0), geometry.outputs_of(1)
        assert (gate.start, gate.stop, up.start, up.stop) == (0, 16 // size, 16 // size, 48 // size)
        assert geometry.rows_of(1) == slice(rank * 32 // size, (rank + 1) * 32 // size)
        whole = list(range(48))
        own_gate, own_up = whole[geometry.rows_of(0)], whole[16:][geometry.rows_of(1)]
        assert geometry.fused_rows() == own_gate + own_up


def test_key_value_heads_are_replicated_where_ranks_are_more():
    # 8 heads of 4, two of keys and values, four ranks: ranks 0 and 1 hold the first, 2 and 3 the second
    found = ranks(4, inputs=8, parts=(32, 8, 8), replicas=(1, 2, 2), cut="outputs")
    assert [geometry.rows_of(0) for geometry in found] == [slice(8 * r, 8 * r + 8) for r in range(4)]
    assert [geometry.rows_of(1) for geometry in found] == [slice(0, 4), slice(0, 4), slice(4, 8), slice(4, 8)]
    assert [geometry.outputs_of(2) for geometry in found] == [slice(12, 16)] * 4
    assert found[2].fused_rows() == [*range(16, 24), *range(36, 40), *range(44, 48)]


def test_row_parallel_cuts_inputs():
    found = ranks(2, inputs=8, parts=(6,), replicas=(1,), cut="inputs")
    assert [geometry.own_inputs for geometry in found] == [slice(0, 4), slice(4, 8)]
    assert [geometry.rows_of(0) for geometry in found] == [slice(0, 6)] * 2
    assert found[1].outputs_of(0) == slice(0, 6)


def test_replicated_is_whole():
    (_, second) = ranks(2, inputs=8, parts=(6,), replicas=(1,), cut="nothing")
    assert second.own_inputs == slice(0, 8)
    assert second.fused_rows() == list(range(6))
