"""One value is in force at a time; it is replaced, restored, and comes back fresh in a recompute."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch

from dylora_moe.layers.in_force import Generation, Holder, InForce, RoutedLayers

NOTHING, BARE = InForce(), InForce(forced=())


def test_a_value_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NOTHING.names = ("a",)


def test_what_layers_have_to_do():
    assert not NOTHING.anything
    assert BARE.anything  # PEFT would add its active adapters up
    assert InForce(("a",), torch.ones(1, 1, 1)).anything


def test_again_leaves_out_what_was_kept_on_the_way():
    value = InForce(("a",), torch.ones(1, 1, 1), form="dense")
    value.memo["weights"] = 1
    value.waiting["q"] = (torch.ones(1), torch.ones(1))
    again = value.again()
    assert (again.names, again.weights, again.form) == (value.names, value.weights, "dense")
    assert again.memo == again.waiting == {}


def test_weights_and_columns_by_token():
    weights, active = torch.rand(2, 3, 4), torch.randint(4, (2, 1, 2))
    value = InForce(("a", "b", "c", "d"), weights, active)
    device = torch.device("cpu")
    assert torch.equal(value.weights_for(torch.Size((2, 3)), device), weights.flatten(0, 1))
    assert torch.equal(value.active_for(torch.Size((2, 3)), device), active.expand(2, 3, 2).flatten(0, 1))
    assert InForce(("a",), weights).active_for(torch.Size((2, 3)), device) is None


@pytest.mark.parametrize("resting", [NOTHING, BARE])
def test_a_holder_rests_on_what_it_was_made_with(resting):
    holder, mixed = Holder(resting), InForce(("a",), torch.ones(1, 1, 1))
    holder.put(mixed)
    with contextlib.suppress(KeyError), holder.restored(BARE, {}):
        assert holder.now is BARE
        assert holder.reached == {}
        raise KeyError
    assert holder.now is mixed
    assert holder.reached is None
    holder.rest()
    assert holder.now is resting


def test_memory_for_folding_is_not_copied():
    layers = RoutedLayers()
    layers.spare["q"] = torch.ones(3)
    assert copy.deepcopy(layers).spare == {}
    assert Generation().packed == Generation().folded == {}
