"""Order, repetition and intervals."""

from __future__ import annotations

import random

import torch

from dylora_moe.benchmark.timing import bootstrap, interleaved, orders, ratio
from dylora_moe.benchmark.work import Runner


def test_orders_are_random_seeded_and_whole():
    keys = [*"abcdef"]
    found = orders(keys, 20, seed=1)
    assert found == orders(keys, 20, seed=1)
    assert found != orders(keys, 20, seed=2)
    assert all(sorted(order) == keys for order in found)
    assert len({tuple(order) for order in found}) > 15


def test_interval_holds_the_median_and_narrows_with_more_rounds():
    generator = random.Random(0)
    few = bootstrap([generator.gauss(1.5, 0.1) for _ in range(8)])
    many = bootstrap([generator.gauss(1.5, 0.1) for _ in range(200)])
    assert few.low <= few.median <= few.high
    assert many.low < 1.5 < many.high
    assert many.high - many.low < few.high - few.low
    assert bootstrap([2.0] * 5) == (2.0, 2.0, 2.0)


def test_ratio_is_taken_round_by_round():
    slow_machine = [1.0, 10.0, 2.0]  # that gets slower and faster, for both alike
    assert ratio([3 * t for t in slow_machine], slow_machine).median == 3


def test_every_variant_runs_in_every_round_and_warmup_is_not_kept():
    calls = []
    model = torch.nn.Linear(1, 1)
    runners = [Runner(key, key, None, model, lambda: torch.ones(1), lambda key=key: calls.append(key)) for key in "abc"]
    times = interleaved(runners, rounds=5, warmup=2, seed=0)
    assert {key: len(values) for key, values in times.items()} == {"a": 5, "b": 5, "c": 5}
    assert [sorted(calls[i : i + 3]) for i in range(0, 21, 3)] == [["a", "b", "c"]] * 7
    calls.clear()
    interleaved(runners, rounds=1, warmup=0, seed=0, repeats=4)
    assert len(calls) == 3 * 5  # one more that is not timed
