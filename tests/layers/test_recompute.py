"""A recompute sees what was in force in its own forward; `tests/invariants/test_checkpointing.py` has whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dylora_moe.layers.in_force import Holder, InForce
from dylora_moe.layers.recompute import KeepRouting, checkpointable, give_back_checkpoints, keep_routing_in_checkpoints


class Block(nn.Module):
    def __init__(self, function: Any):
        super().__init__()
        self.gradient_checkpointing, self._gradient_checkpointing_func = True, function


def plain(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def test_the_recompute_sees_its_own_forward():
    holder, seen = Holder(InForce()), []
    keep = KeepRouting(plain, holder)

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(holder.now.names)
        return (x * x).sum()

    outputs = []
    for name in ("a", "b"):
        holder.put(InForce((name,), torch.ones(1, 1, 1)))
        outputs.append(keep(layer, torch.ones(2, requires_grad=True)))
    holder.rest()
    for y in outputs:
        y.backward()
    assert seen == [("a",), ("b",), ("a",), ("b",)]
    assert holder.now is holder.resting


def test_every_block_is_wrapped_once_and_given_back():
    import functools

    function = functools.partial(checkpoint, use_reentrant=False)
    block, holder = Block(function), Holder(InForce())
    for _ in range(2):
        keep_routing_in_checkpoints(checkpointable(block), holder)
    assert block._gradient_checkpointing_func.checkpoint is function
    give_back_checkpoints(block)
    assert block._gradient_checkpointing_func is function


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="would silently lose the gradient"):
        keep_routing_in_checkpoints([Block(checkpoint)], Holder(InForce()))
