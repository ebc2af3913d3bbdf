"""Invariant 10, without a trainer: padding enters no loss and no statistic.

The oracle averages the real tokens one by one, in float64 throughout.
"""

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dylora_moe.routing.losses import switch
from dylora_moe.routing.policies import dense
from rounding import EXACT
from tiny import (
    NAMES,
    PLACEMENTS,
    VOCAB,
    assert_same_gradients,
    difference,
    every_architecture,
    every_granularity,
    every_placement,
    gradients,
    left_padded,
    positions,
    tiny_mixture,
    tokens,
)

pytestmark = pytest.mark.usefixtures("exact")


def padded(side: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Three rows of 9, 4 and 2 tokens, padded on one side: ids and the inputs that go with them."""
    rows = [tokens(1, length, seed=length)[0] for length in (9, 4, 2)]
    if side == "left":
        ids, mask = left_padded(rows)
    else:
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = (ids != 0).long()
    return ids, {"attention_mask": mask, "position_ids": positions(mask), "labels": ids.masked_fill(mask == 0, -100)}


def naive_losses(config, logits: Tensor, mask: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """Auxiliary and balance loss from the real tokens, one by one."""
    real = [logits[b, s] for b in range(mask.shape[0]) for s in range(mask.shape[1]) if mask[b, s]]
    shares, chosen, squares = [], [], []
    for token in real:
        kept = token if k is None else token.masked_fill(token < token.sort().values[-k], -torch.inf)
        shares.append(kept.softmax(-1))
        chosen.append(torch.nn.functional.one_hot(token.argmax(), len(token)).float())
        squares.append(token.exp().sum().log() ** 2)
    count = len(real[0])
    balance = torch.tensor(0.0, dtype=torch.float64)
    if config.balance_loss == "switch":
        probabilities = torch.stack([token.softmax(-1) for token in real]).mean(0)
        balance = count * (torch.stack(chosen).mean(0) * probabilities).sum()
    elif config.balance_loss == "uniform_mse":
        balance = ((torch.stack(shares).mean(0) - 1 / count) ** 2).mean()
    aux = config.balance_coefficient * balance + config.z_loss_coefficient * torch.stack(squares).mean()
    return aux, balance


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "settings",
    [
        {"balance_loss": "uniform_mse"},
        {"balance_loss": "switch", "z_loss_coefficient": 0.1},
        {"balance_loss": "uniform_mse", "train_top_k": 2, "route_to_base": True},
        {"balance_loss": "none", "z_loss_coefficient": 0.5},
    ],
    ids=str,
)
def test_losses_are_means_over_real_tokens(settings, side):
    model = tiny_mixture("llama", torch.float64, balance_coefficient=2.0, **settings).train()
    ids, inputs = padded(side)
    out = model(ids, **inputs)
    k, mask = settings.get("train_top_k"), inputs["attention_mask"]
    aux, balance = naive_losses(model.moe_config, out.router_logits, mask, k)
    assert difference(out.aux_loss, aux) <= EXACT
    assert difference(out.balance_loss, balance) <= EXACT
    assert difference(out.loss, out.lm_loss + aux) <= EXACT
    parameters = list(model.router.parameters())
    found = torch.autograd.grad(out.aux_loss, parameters, retain_graph=True)
    for ours, expected in zip(found, torch.autograd.grad(aux, parameters), strict=True):
        assert expected.any()
        assert difference(ours, expected) <= EXACT


@pytest.mark.parametrize("side", ["left", "right"])
@every_architecture
def test_a_padded_row_is_the_row(architecture, side):
    model = tiny_mixture(architecture, torch.float64, balance_coefficient=3.0, z_loss_coefficient=0.1).train()
    row = tokens(1, 6)
    labels = row.clone()
    labels[:, 0] = -100  # which a padding token would predict
    expected = model(row, labels=labels)
    expected.loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    pad = (3, 0) if side == "left" else (0, 3)
    ids, mask = (torch.nn.functional.pad(t, pad) for t in (row, torch.ones_like(row)))
    labels = torch.nn.functional.pad(labels, pad, value=-100)
    out = model(ids, attention_mask=mask, position_ids=positions(mask), labels=labels)
    for name in ("loss", "lm_loss", "aux_loss", "balance_loss"):
        assert difference(out[name], expected[name]) <= EXACT, name
    out.loss.backward()
    assert_same_gradients(gradients(model), wanted, 10 * EXACT)


@every_granularity
@every_placement
def test_what_padding_holds_does_not_matter(placement, granularity):
    settings = {"granularity": granularity, "balance_coefficient": 3.0, **PLACEMENTS[placement]}
    model = tiny_mixture("llama", torch.float64, **settings).train()
    ids, inputs = padded("left")
    inputs["labels"][:, -1:], inputs["labels"][:, :-1] = ids[:, -1:], -100  # the rest is the prompt
    hidden = inputs["attention_mask"] == 0
    results = []
    for filler in (0, 7, VOCAB - 1):
        with model.trace() as trace:
            out = model(ids.masked_fill(hidden, filler), **inputs)
        results.append((out.loss, out.aux_loss, out.balance_loss, trace.load(), trace.entropy(), trace.table()))
    assert results[0] == results[1] == results[2]


@every_placement
def test_the_trace_counts_real_tokens(placement):
    model = tiny_mixture("llama", torch.float64, **PLACEMENTS[placement])
    ids, inputs = padded("left")
    with model.trace() as trace:
        out = model(ids, **inputs)
    weights = out.routing_weights[inputs["attention_mask"].bool()]
    assert [row["tokens"] for row in trace.table()] == [15] * 3
    for column, (name, share) in enumerate(trace.load().items()):
        assert name == NAMES[column]
        assert abs(share - float(weights[:, column].mean())) <= EXACT
    entropy = torch.special.entr(weights).sum(-1).mean()
    assert abs(trace.entropy() - float(entropy)) <= EXACT


def test_the_trace_of_a_padded_generation_counts_real_tokens():
    model = tiny_mixture("llama", torch.float64)
    ids, inputs = padded("left")
    with model.trace() as trace:
        model.generate(ids, attention_mask=inputs["attention_mask"], max_new_tokens=4, do_sample=False)
    assert [row["tokens"] for row in trace.table()] == [15 + 3 * 3] * 3


def test_forced_rows_enter_no_routing_loss():
    model = tiny_mixture("llama", torch.float64, balance_coefficient=2.0, z_loss_coefficient=0.1).train()
    ids, inputs = padded("left")
    out = model(ids, experts=["red", None, None], **inputs)
    mask = inputs["attention_mask"].clone()
    mask[0] = 0
    aux, balance = naive_losses(model.moe_config, out.router_logits.detach(), mask, None)
    assert difference(out.aux_loss, aux) <= EXACT
    assert difference(out.balance_loss, balance) <= EXACT
    assert model(ids, experts=["red", "base", "red"], **inputs).aux_loss is None


@every_granularity
def test_records_score_real_tokens_of_routed_rows(granularity):
    model = tiny_mixture("llama", torch.float64, granularity=granularity).train()
    ids, inputs = padded("left")
    inputs["labels"][:, :-1] = -100
    with model.recording() as records:
        out = model(ids, experts=[None, "red", None], **inputs)
    mask = inputs["attention_mask"].bool()
    mask[1] = False
    (record,) = records
    assert not record.hidden.requires_grad
    assert difference(record.score(model.router), out.router_logits[mask]) <= EXACT


def test_switch_is_the_loss_of_transformers():
    logits, mask = torch.randn(3, 7, 4, dtype=torch.float64), torch.tensor([[0] * 3 + [1] * 4, [1] * 7, [0] * 6 + [1]])
    expected = load_balancing_loss_func((logits.flatten(0, 1),), num_experts=4, top_k=1, attention_mask=mask)
    found = switch(logits, dense(logits), mask.bool())
    assert difference(found, expected) <= EXACT
    uniform, collapsed = torch.zeros(1, 8, 4).double(), torch.tensor([50.0, 0, 0, 0]).double().expand(1, 8, 4)
    assert difference(switch(uniform, dense(uniform)), torch.tensor(1.0)) <= EXACT
    assert difference(switch(collapsed, dense(collapsed)), torch.tensor(4.0)) <= EXACT
