"""The figures that are to be reached, and the plans that measure them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dylora_moe.benchmark.kinds import KINDS
from dylora_moe.benchmark.targets import PLANS, TARGETS, is_plan, outcome


def test_targets_name_variants_of_their_plans():
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        settings = PLANS[target.plan]
        for key in filter(None, (target.of, target.against)):
            kind, _, size = key.partition("/")
            assert kind in settings.kinds, target.name
            assert KINDS[kind].per_experts == bool(size), target.name
            assert not size or int(size) in settings.experts, target.name
    assert {target.plan for target in TARGETS} | {"experts", "experts-prefill", "generation-peers"} == set(PLANS)


def test_plan_is_recognised_by_what_it_measures():
    training = PLANS["training"]
    assert is_plan(replace(training, plan=None, rounds=3, seed=5), "training")
    assert not is_plan(replace(training, batch=1), "training")
    assert not is_plan(replace(training, rounds=0), "training")


def test_counted_target(results):
    counted = results("saved")
    counted["rows"] = [
        {"key": "auto/8", "saved_in_layers": 106},
        {"key": "peft-same-dtype", "saved_in_layers": 100},
    ]
    target = next(t for t in TARGETS if t.name == "saved bytes, against one bf16 PEFT adapter")
    found = outcome(target, counted)
    assert (found.value, found.met) == (1.06, False)
    assert found.gap == pytest.approx(0.01 / 1.05)
