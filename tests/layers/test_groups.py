"""Layers fed by one input are computed together, by name and width, and checked by identity at every call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dylora_moe import DyLoraMoE
from dylora_moe.layers.groups import group_of, rows_of, siblings_of
from dylora_moe.layers.in_force import InForce
from tiny import NAMES, difference, tiny_mixture


def layers(**widths: int) -> dict[str, Any]:
    return {f"block.{name}": SimpleNamespace(in_features=width) for name, width in widths.items()}


def test_siblings_have_one_parent_names_that_go_together_and_one_width():
    found = siblings_of("block.q_proj", layers(q_proj=8, v_proj=8, k_proj=8, o_proj=8))
    assert found == ("block.q_proj", "block.k_proj", "block.v_proj")
    assert siblings_of("block.o_proj", layers(q_proj=8, o_proj=8)) == ()
    # RWKV's feed-forward: key is D → F, value is F → D
    assert siblings_of("block.key", layers(key=8, value=32, query=8)) == ("block.query", "block.key")


@pytest.fixture
def model() -> DyLoraMoE:
    return tiny_mixture("llama", target_modules=["q_proj", "k_proj", "v_proj"]).double()


def test_the_outputs_of_the_others_wait_for_their_calls(model):
    q, k, v = (layer for layer in model.routed_layers[:3])
    x, weights = torch.randn(2, 5, q.in_features).double(), torch.rand(2, 5, 3).double()
    now = InForce(NAMES, weights)
    model.holder.put(now)
    first = q(x)
    assert set(now.waiting) == {k.routing_name, v.routing_name}
    together = [first, k(x), v(x)]
    assert now.waiting == {}
    for layer, y in zip((q, k, v), together, strict=True):
        model.holder.put(InForce(NAMES, weights, form="reference"))
        assert difference(y, layer(x)) <= 1e-12


def test_another_input_is_computed_by_itself(model):
    q, k = model.routed_layers[:2]
    x, other = (torch.randn(2, 5, q.in_features).double() for _ in range(2))
    weights = torch.rand(2, 5, 3).double()
    model.holder.put(InForce(NAMES, weights))
    q(x)
    found = k(other)
    model.holder.put(InForce(NAMES, weights, form="reference"))
    assert difference(found, k(other)) <= 1e-12


def test_only_the_loop_serves_a_merged_layer(model):
    layer = model.routed_layers[0]
    assert group_of(layer, NAMES, model.holder.layers) is not None
    layer.merge(adapter_names=["red"])
    assert group_of(layer, NAMES, model.holder.layers) is None


def test_rows_serve_layers_that_see_their_tokens_in_order():
    now = InForce(NAMES, torch.eye(3)[:2, None], rows=(0, 1))
    for leading in ((2, 20), (4, 20), (40,)):  # as they are, two beams each, flattened
        assert rows_of(now, torch.Size(leading)) == (0, 1)
    for leading in ((1, 20), (41,), (2, 2, 20), (2, 3)):  # of one for all, of others, too few
        assert rows_of(now, torch.Size(leading)) is None
    assert rows_of(InForce(NAMES, now.weights, rows=(0, 1), form="dense"), torch.Size((2, 20))) is None
    assert rows_of(InForce(NAMES, now.weights), torch.Size((2, 20))) is None
