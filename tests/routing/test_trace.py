"""Every number of a trace, computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from tiny import ARCHITECTURES, tiny_mixture, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


def real_rows(weights: Tensor, mask: Tensor = MASK) -> list[list[float]]:
    return [
        row
        for weights_row, mask_row in zip(weights.tolist(), mask.tolist(), strict=True)
        for row, real in zip(weights_row, mask_row, strict=True)
        if real
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("route_to_base", [True, False])
def test_numbers_over_the_real_tokens(training, route_to_base):
    model = tiny_mixture(route_to_base=route_to_base).train(training)
    with model.trace() as trace, torch.no_grad():
        output = model(tokens(), attention_mask=MASK)
    assert torch.equal(trace.weights, output.routing_weights)
    rows = real_rows(output.routing_weights)
    assert len(rows) == 15
    rows = [[*row, max(0.0, 1 - sum(row))] for row in rows]
    names = ["red", "green", "blue"] + ["base"] * route_to_base
    load = {name: sum(row[i] for row in rows) / 15 for i, name in enumerate(names)}
    assert trace.load() == pytest.approx(load, abs=1e-6)
    assert list(trace.load()) == names
    entropy = -sum(share * math.log(share) for row in rows for share in row if share > 1e-6) / 15
    assert trace.entropy() == pytest.approx(entropy, abs=1e-4)
    strongest = [max(range(len(row)), key=row.__getitem__) for row in rows]
    table = [
        {"expert": name, "load": load[name], "strongest": strongest.count(i) / 15, "tokens": 15}
        for i, name in enumerate(names)
    ]
    assert len(trace.table()) == len(table)
    for found, expected in zip(trace.table(), table, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    assert len({row["strongest"] for row in table}) > 1


@pytest.mark.parametrize(
    ("experts", "load"),
    [
        ("green", {"red": 0.0, "green": 1.0, "blue": 0.0}),
        ("base", {"red": 0.0, "green": 0.0, "blue": 0.0, "base": 1.0}),
        (["red", "base"], {"red": 6 / 15, "green": 0.0, "blue": 0.0, "base": 9 / 15}),
    ],
)
def test_forced_rows_are_recorded(experts, load):
    model = tiny_mixture()
    with model.trace() as trace:
        model(tokens(), attention_mask=MASK, experts=experts)
    assert trace.load() == pytest.approx(load)
    assert {row["expert"]: row["strongest"] for row in trace.table()} == pytest.approx(load)
    assert trace.entropy() == 0.0
    assert trace.weights.shape == (2, 9, 3)


def test_given_weights_are_recorded():
    model = tiny_mixture()
    with model.trace() as trace:
        model(tokens(), routing_weights=torch.tensor([0.5, 0.25, 0.0]))
    assert trace.load() == {"red": 0.5, "green": 0.25, "blue": 0.0, "base": 0.25}
    assert trace.entropy() == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4))


def test_mixed_batch_records_routed_and_forced_rows():
    model = tiny_mixture()
    with model.trace() as trace, torch.no_grad():
        output = model(tokens(), experts=["blue", None])
    assert trace.weights[0].tolist() == [[0.0, 0.0, 1.0]] * 9
    assert torch.equal(trace.weights[1], output.routing_weights[1])


def test_generation_is_recorded_pass_by_pass():
    model = tiny_mixture()
    with model.trace() as trace:
        model.generate(tokens(), attention_mask=MASK, max_new_tokens=4, do_sample=False)
    assert [tuple(weights.shape) for weights in trace.passes] == [(2, 9, 3), (2, 1, 3), (2, 1, 3), (2, 1, 3)]
    assert trace.weights.shape == (2, 12, 3)
    assert [row["tokens"] for row in trace.table()] == [15 + 2 * 3] * 3
    rows = real_rows(trace.weights, torch.cat([MASK, torch.ones(2, 3)], 1))
    assert trace.load() == pytest.approx({n: sum(r[i] for r in rows) / 21 for i, n in enumerate(model.expert_names)})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_reached_are_those_that_really_applied_a_routing(architecture):
    model = tiny_mixture(architecture, router_layer=2)
    with model.trace() as trace:
        model(tokens())
    assert sorted(trace.layers_reached) == sorted(layer.routing_name for layer in model.routed_layers)
    assert {model.placement.layer_of(name) for name in trace.layers_reached} == {2, 3}
    assert set(trace.reached.values()) == {1}
    with model.trace() as trace, model.disable_adapter():
        model(tokens())
    assert trace.layers_reached == []


def test_a_layer_without_the_forced_expert_is_not_reached():
    experts = {
        "low": LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]),
        "high": LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[3]),
    }
    model = tiny_mixture(experts=experts)
    for name, layers in (
        ("low", ["model.layers.1.self_attn.q_proj"]),
        ("high", ["model.layers.3.self_attn.v_proj"]),
        ("base", []),
    ):
        with model.trace() as trace:
            model(tokens(), experts=name)
        assert trace.layers_reached == layers
    with model.trace() as trace:
        model(tokens())
    assert len(trace.layers_reached) == 2


def test_a_recompute_counts_for_nothing():
    model = tiny_mixture().train()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    with model.trace() as trace:
        model(tokens(), labels=tokens()).loss.backward()
    assert len(trace.passes) == 1
    assert len(trace.reached) == 9
    assert set(trace.reached.values()) == {1}


def test_nothing_is_recorded_outside():
    model = tiny_mixture()
    with model.trace() as trace:
        model(tokens())
    model(tokens())
    assert len(trace.passes) == 1
    assert set(trace.reached.values()) == {1}
    assert model.holder.reached is None
    assert model.hooks.trace is None


def test_an_inner_trace_has_its_own_passes_and_the_outer_one_goes_on():
    model = tiny_mixture()
    with model.trace() as outer:
        model(tokens())
        with model.trace() as inner:
            model(tokens(batch=1))
        model(tokens())
    assert [len(inner.passes), len(outer.passes)] == [1, 2]


def test_a_trace_ends_with_its_block_also_after_an_error():
    model = tiny_mixture()
    with pytest.raises(RuntimeError, match="mine"), model.trace():
        raise RuntimeError("mine")
    assert model.holder.reached is None


def test_recorded_weights_are_copies():
    model = tiny_mixture().train()
    with model.trace() as trace:
        output = model(tokens())
    assert not trace.weights.requires_grad
    output.routing_weights.data.zero_()
    assert trace.weights.sum() > 0


def test_empty_and_uneven_traces_say_what_to_do():
    model = tiny_mixture()
    with model.trace() as trace:
        pass
    for read in (lambda: trace.weights, trace.load, trace.entropy, trace.table):
        with pytest.raises(ValueError, match=r"the trace is empty: call the model within"):
            read()
    with model.trace() as trace:
        model(tokens())
        model(tokens(batch=1))
    with pytest.raises(ValueError, match="different batch sizes; read them one by one from `passes`"):
        _ = trace.weights
    assert [w.shape[0] for w in trace.passes] == [2, 1]
    assert sum(trace.load().values()) == pytest.approx(1.0)


def test_only_padding_has_no_load():
    model = tiny_mixture()
    with model.trace() as trace:
        model(tokens(), attention_mask=torch.zeros_like(MASK))
    assert trace.load() == {"red": 0.0, "green": 0.0, "blue": 0.0}
    assert trace.entropy() == 0.0
    assert [row["strongest"] for row in trace.table()] == [0.0] * 3


# ---------------------------------------------------------------------- gradient_report
