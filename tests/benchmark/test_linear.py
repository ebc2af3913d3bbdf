"""One linear layer as the work of a run; `test_work.py` compares its variants."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.benchmark.linear import routing_state


@pytest.mark.parametrize(("work", "tokens"), [("linear", 24), ("linear-train", 24), ("linear-token", 1)])
def test_the_layer_sees_the_tokens_of_the_work(variants, work, tokens):
    _, models, runners, _ = variants(work=work, variants=("base", "auto"))
    width = models.base.config.hidden_size
    for runner in runners.values():
        with runner.in_force():
            assert runner.forward().shape.numel() == tokens * width


def test_nothing_of_the_routing_stays_in_force(variants):
    _, _, runners, _ = variants(work="linear-token", variants=("base", "auto"))
    holder = runners["auto/4"].model.holder
    with runners["auto/4"].in_force():
        assert holder.now.weights is not None
        runners["auto/4"].step()
    assert holder.now is holder.resting
    assert holder.generation is None


def test_the_weights_of_the_state_are_a_leaf_with_a_gradient_where_it_trains(variants):
    _, _, runners, _ = variants(work="linear-train", variants=("base", "auto"))
    model, ids = runners["auto/4"].model, torch.arange(6).view(1, 6)
    layer = runners["auto/4"].layers[0]
    weights = routing_state(model, layer, ids, "auto").weights
    assert weights.requires_grad
    assert weights.is_leaf
