"""Invariants 5 to 7: what must not matter to a token: its batch-mates, padding, later tokens, the order of experts.

In float64 throughout, norms and routers included.
"""

import functools

import pytest
import torch
from torch import Tensor, nn

from dylora_moe import DyLoraMoE
from rounding import EXACT
from tiny import (
    PLACEMENTS,
    VOCAB,
    assert_same_gradients,
    difference,
    every_architecture,
    every_combination,
    every_granularity,
    every_placement,
    gradients,
    left_padded,
    mixed_experts,
    positions,
    tiny_mixture,
    tokens,
)

pytestmark = pytest.mark.usefixtures("exact")


@functools.cache  # no call may change a mixture
def mixture(architecture: str, placement: str, **changes) -> DyLoraMoE:
    return fresh_mixture(architecture, placement, **changes)


def fresh_mixture(architecture: str, placement: str, **changes) -> DyLoraMoE:
    return tiny_mixture(architecture, **{"dtype": torch.float64, **PLACEMENTS[placement], **changes})


@every_granularity
@every_combination
def test_batch_mates_and_row_order(architecture, placement, granularity):
    model = mixture(architecture, placement, granularity=granularity)
    ids = tokens(4, 9)
    for train in (True, False):
        together = model.train(train)(ids)
        order = torch.tensor([2, 0, 3, 1])
        reordered = model(ids[order])
        assert difference(reordered.logits, together.logits[order]) <= EXACT
        assert difference(reordered.routing_weights, together.routing_weights[order]) <= EXACT
        for row in range(4):
            alone = model(ids[row : row + 1])
            assert difference(together.logits[row], alone.logits[0]) <= EXACT
            assert difference(together.routing_weights[row], alone.routing_weights[0]) <= EXACT


@every_granularity
@every_combination
def test_left_padding(architecture, placement, granularity):
    model = mixture(architecture, placement, granularity=granularity)
    rows = [tokens(1, 9, seed=1)[0], tokens(1, 4, seed=2)[0], tokens(1, 1, seed=3)[0]]
    ids, mask = left_padded(rows)
    for train in (True, False):
        out = model.train(train)(ids, attention_mask=mask, position_ids=positions(mask))
        for row, alone in enumerate(rows):
            expected = model(alone[None])
            own = slice(-len(alone), None)
            assert difference(out.logits[row, own], expected.logits[0]) <= EXACT
            assert difference(out.routing_weights[row, own], expected.routing_weights[0]) <= EXACT


@pytest.mark.parametrize("placement", ["middle", "below"])
@every_architecture
def test_forced_rows_do_not_touch_routed_ones(architecture, placement):
    model, ids = mixture(architecture, placement), tokens(3, 9)
    routed, mixed = model(ids), model(ids, experts=["red", None, "base"])
    assert difference(mixed.logits[1], routed.logits[1]) <= EXACT
    assert difference(mixed.logits[0], model(ids[:1], experts="red").logits[0]) <= EXACT
    assert difference(mixed.logits[2], model(ids[2:], experts="base").logits[0]) <= EXACT


@pytest.mark.parametrize("granularity", ["sequence", "prefix"])
def test_a_row_without_a_real_token_has_uniform_weights(granularity):
    model, ids = mixture("llama", "middle", granularity=granularity, top_k=3), tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[1] = 0
    out = model(ids, attention_mask=mask)
    assert difference(out.routing_weights[1], torch.full((5, 3), 1 / 3, dtype=torch.float64)) <= EXACT
    assert difference(out.routing_weights[0], model(ids[:1]).routing_weights[0]) <= EXACT


@pytest.mark.parametrize("granularity", ["token", pytest.param("prefix", marks=pytest.mark.slow)])
@every_combination
def test_routing_depends_on_earlier_tokens_only(architecture, placement, granularity):
    model, ids = mixture(architecture, placement, granularity=granularity), tokens(2, 9)
    for train in (True, False):
        expected = model.train(train)(ids)
        for t in (0, 3, 7):
            changed = ids.clone()
            changed[:, t + 1 :] = 2 + (ids[:, t + 1 :] + 5) % (VOCAB - 2)
            out = model(changed)
            upto = slice(None, t + 1)
            assert difference(out.routing_weights[:, upto], expected.routing_weights[:, upto]) <= EXACT
            assert difference(out.logits[:, upto], expected.logits[:, upto]) <= EXACT
            assert difference(out.routing_weights[:, t + 1], expected.routing_weights[:, t + 1]) > 1e-3


@every_placement
def test_completion_tokens_never_decide_their_own_routing(placement):
    model, ids = mixture("llama", placement, granularity="sequence"), tokens(2, 9)
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    changed = ids.clone()
    changed[:, 4:] = 2 + (ids[:, 4:] + 5) % (VOCAB - 2)
    first, second = model(ids, labels=labels), model(changed, labels=labels)
    assert difference(second.routing_weights, first.routing_weights) <= EXACT
    assert difference(model(changed).routing_weights, model(ids).routing_weights) > 1e-3


def permuted(model: DyLoraMoE, twin: DyLoraMoE) -> DyLoraMoE:
    """`twin` with the tensors of the experts of `model`, found by name, and the router's rows in its own order."""
    for name in model.expert_names:
        for ours, theirs in zip(twin.expert_tensors(name), model.expert_tensors(name), strict=True):
            assert ours.name == theirs.name
            ours.tensor.data.copy_(theirs.tensor.data)
    order = [model.expert_names.index(name) for name in twin.expert_names]
    rest = list(range(model.num_experts, model.router.num_outputs))  # the base route stays last
    twin.router.load_state_dict({"down": model.router.down.data, "up": model.router.up.data[[*order, *rest]]})
    return twin


@pytest.mark.parametrize("settings", [{}, {"route_to_base": True, "granularity": "sequence"}], ids=str)
@every_combination
def test_permuting_experts_permutes_names_only(architecture, placement, settings):
    order = ["blue", "red", "green"]
    model = fresh_mixture(architecture, placement, balance_coefficient=1.0, **settings)
    twin = permuted(
        model, fresh_mixture(architecture, placement, balance_coefficient=1.0, expert_names=order, **settings)
    )
    ids, columns = tokens(), [model.expert_names.index(name) for name in order]
    found, expected = twin(ids), model(ids)
    assert difference(found.logits, expected.logits) <= EXACT
    assert difference(found.routing_weights, expected.routing_weights[..., columns]) <= EXACT
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    found, expected = twin.train()(ids, labels=labels), model.train()(ids, labels=labels)
    assert difference(found.loss, expected.loss) <= EXACT
    found.loss.backward()
    expected.loss.backward()
    wanted = gradients(model)
    rows = [*columns, *range(model.num_experts, model.router.num_outputs)]
    wanted["router.up"] = wanted["router.up"][rows]
    assert_same_gradients(gradients(twin), wanted, 10 * EXACT)


def test_permuting_experts_that_differ_in_everything():
    experts = mixed_experts("llama")
    model = fresh_mixture("llama", "middle", experts=experts)
    twin = fresh_mixture("llama", "middle", experts={name: experts[name] for name in ("green", "blue", "red")})
    assert difference(permuted(model, twin)(tokens()).logits, model(tokens()).logits) <= EXACT


def test_ties_go_to_the_lowest_index():
    model = fresh_mixture("llama", "middle", top_k=1)
    nn.init.zeros_(model.router.up)
    weights: Tensor = model(tokens()).routing_weights
    assert torch.equal(weights, weights.new_tensor([1.0, 0.0, 0.0]).expand_as(weights))
