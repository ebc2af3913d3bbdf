"""The states of a row: those that the router reads, whatever runs around them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.base.placement import Placement
from dylora_moe.passes.hooks import Call
from dylora_moe.skills.features import Row, evaluating, states_of, window_of
from families import FAMILIES, TARGETS, family_base
from tiny import ARCHITECTURES, LAYERS, PLACEMENTS, tiny_base, tiny_mixture, tokens

ONE_PASS_ONLY = ("recurrent_gemma", "rwkv")
"""Families whose state is no cache, so that nothing can run twice over it."""


def from_hidden_states(base, k, ids):
    """The same by transformers' own list of hidden states, whose last one is normed."""
    with torch.no_grad():
        states = base(input_ids=ids, output_hidden_states=True).hidden_states
    return F.layer_norm(states[k][0].float(), states[k].shape[-1:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("k", [0, 2, LAYERS])
def test_states_are_those_that_enter_the_layer(architecture, k):
    base = tiny_base(architecture).eval()
    ids = tokens(1, 9)
    found = states_of(base, Placement.of(base), k, Row(ids[0].tolist(), 4))
    assert torch.equal(found.states, from_hidden_states(base, k, ids)[:-1])
    assert found.prompt.tolist() == [True] * 4 + [False] * 4
    early = from_hidden_states(base, k // 2, ids)[:-1].double()
    assert torch.equal(found.early, early[:4].mean(0))
    assert torch.equal(states_of(base, Placement.of(base), k, Row(ids[0].tolist(), 0)).early, early.mean(0))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_experts_do_not_show_and_the_router_reads_the_same(placement):
    model = tiny_mixture(**PLACEMENTS[placement])
    base, ids, read = model.get_base_model(), tokens(1, 9), []
    with model.hooks.calling(Call(experts="base")):
        found = states_of(base, model.placement, model.router_layer_index, Row(ids[0].tolist(), 0))
    model.router.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        model(ids)
    expected = F.layer_norm(read[0][0], read[0].shape[-1:])[:-1]
    torch.testing.assert_close(found.states, expected)  # one pass in two forms


@pytest.mark.parametrize("form", [{"router_layer": 2}, {"router_layer": "last"}], ids=["one pass", "two passes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_reads_the_same_of_every_family(family, form):
    targets = TARGETS.get(family, ["c_attn"] if family == "gpt2" else ["q_proj"])
    config = MoELoraConfig(num_experts=2, r=2, target_modules=targets, **form)
    if form["router_layer"] == "last" and family in ONE_PASS_ONLY:
        with pytest.raises(ValueError, match="keeps its state in no transformers Cache"):
            DyLoraMoE(family_base(family), config)
        return
    model = DyLoraMoE(family_base(family), config).eval()
    ids, read = torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), []
    with evaluating(model.modules()), model.hooks.calling(Call(experts="base")):
        found = states_of(model.get_base_model(), model.placement, model.router_layer_index, Row(ids[0].tolist(), 0))
    model.router.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        model(ids)
    torch.testing.assert_close(found.states, F.layer_norm(read[0][0], read[0].shape[-1:])[:-1])


def test_long_rows_are_read_in_windows():
    base = tiny_base().eval()
    ids = tokens(1, 23)
    found = states_of(base, Placement.of(base), 2, Row(ids[0].tolist(), 7), window=10)
    expected = torch.cat([from_hidden_states(base, 2, part) for part in ids.split(10, 1)])
    assert torch.equal(found.states, expected[:-1])
    assert int(found.prompt.sum()) == 7
    assert window_of(base) == 64


def test_nothing_stays_behind():
    base = tiny_base().train()
    base.lm_head.eval()
    with evaluating(base.modules()):
        assert not any(module.training for module in base.modules())
        states = states_of(base, Placement.of(base), 2, Row([5, 6, 7], 0)).states
    assert not states.requires_grad
    assert base.training
    assert not base.lm_head.training
    assert not any(layer._forward_pre_hooks for layer in base.get_decoder().layers)


def test_a_key_tells_rows_apart():
    assert Row([1, 2], 1).key == Row((1, 2), 1).key
    assert len({Row([1, 2], 1).key, Row([1, 2], 0).key, Row([12], 1).key, Row([2, 1], 1).key}) == 4
