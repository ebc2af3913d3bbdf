"""Order, repetition and intervals."""

from __future__ import annotations

import random
import time
from contextlib import contextmanager

import torch

from dylora_moe.benchmark.timing import bootstrap, captured, compare, interleaved, orders, ratio


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


def counted(calls, keys="abc"):
    return {key: lambda key=key: calls.append(key) for key in keys}


def test_every_variant_runs_in_every_round_and_warmup_is_not_kept():
    calls = []
    times = interleaved(counted(calls), rounds=5, warmup=2)
    assert {key: len(values) for key, values in times.items()} == {"a": 5, "b": 5, "c": 5}
    assert [sorted(calls[i : i + 3]) for i in range(0, 21, 3)] == [["a", "b", "c"]] * 7
    calls.clear()
    interleaved(counted(calls), rounds=1, warmup=0, repeats=4)
    assert len(calls) == 3 * 5  # one more that is not timed


def test_the_number_of_calls_is_found_by_the_first_variant():
    calls = []
    interleaved({"slow": lambda: calls.append(time.sleep(0.01)), "other": lambda: None}, 1, 0, repeats=0)
    assert 1 + 4 + 1 + 2 <= len(calls) <= 1 + 4 + 1 + 4  # found by one and by four; one that is not timed and the timed


def test_the_context_of_a_variant_is_entered_before_each_timing_and_takes_none_of_it():
    calls = []

    @contextmanager
    def around(key):
        calls.append(f"enter {key}")
        time.sleep(0.05)
        yield
        calls.append(f"leave {key}")

    times = interleaved(counted(calls, "a"), rounds=1, warmup=1, around=around)
    assert calls == ["enter a", "a", "leave a"] * 2
    assert times["a"][0] < 0.05


def test_no_round_begins_after_the_deadline_once_three_are_timed():
    times = interleaved(counted([]), rounds=50, warmup=1, deadline=time.monotonic())
    assert {len(values) for values in times.values()} == {3}
    assert len(interleaved(counted([]), rounds=5, deadline=time.monotonic() + 600)["a"]) == 5


def test_progress_counts_warmup_too():
    told = []
    interleaved(counted([]), rounds=2, warmup=1, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_comparison_has_a_row_per_variant():
    rows = compare({"base": [1.0, 2.0, 4.0], "ours": [2.0, 4.0, 8.0]}, "base")
    assert rows["ours"] == {"ms": 4000, "ratio": 2, "ratio_low": 2, "ratio_high": 2, "rounds": 3}
    assert rows["base"]["ratio"] == 1


def test_without_a_gpu_nothing_is_captured():
    step = counted([])["a"]
    assert captured(step, torch.device("cpu")) == (step, "no GPU")
