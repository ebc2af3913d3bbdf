"""Matrices one above the other: views where they can be, padded where they must."""

from __future__ import annotations

import torch

from dylora_moe.mixing.member import LayerExperts, Member
from dylora_moe.mixing.stacks import padded_rank, stack_A, stack_B, stacked


@torch.no_grad()
def test_matrices_side_by_side_are_not_copied(member):
    layer = member()
    for tensors, shape in ((layer.lora_A, (16, 64)), (layer.lora_B, (64, 16))):
        view = stacked(tensors, *shape, torch.float32)
        assert view.data_ptr() == tensors[0].data_ptr()
        assert torch.equal(view, torch.stack(list(tensors)))
        shuffled = [tensors[1], tensors[0], *tensors[2:]]
        assert torch.equal(stacked(shuffled, *shape, torch.float32), torch.stack(shuffled))


def test_smaller_ranks_are_filled_up_with_zeros():
    A, B = [torch.randn(r, 6) for r in (1, 5)], [torch.randn(7, r) for r in (1, 5)]
    layer = Member(LayerExperts((0, 1), (1, 5), (1.0, 1.0)), None, None, A, B)
    assert padded_rank(layer, torch.float32) == 8  # rows of 16 bytes
    found_A, (found_B,) = stack_A([layer], torch.float32), stack_B([layer], torch.float32)
    assert found_A.shape == (2, 8, 6)
    assert found_B.shape == (2, 7, 8)
    for i, rank in enumerate((1, 5)):
        assert torch.equal(found_A[i, :rank], A[i])
        assert torch.equal(found_B[i, :, :rank], B[i])
        assert not found_A[i, rank:].any()
        assert not found_B[i, :, rank:].any()


def test_the_rows_of_all_members_stand_together(member):
    one, other = member(experts=3), member(experts=3, rank=4)
    found = stack_A([one, other], torch.float32)
    assert torch.equal(found, torch.cat([torch.stack(one.lora_A), torch.stack(other.lora_A)], dim=1))
