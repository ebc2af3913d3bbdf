"""Timing: variants interleaved in random order, compared round by round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .counts import runner_device
from .work import Runner

SHORTEST = 0.03  # seconds that one timing of a single layer takes at least
RESAMPLES = 2000


class Interval(NamedTuple):
    """A median and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The median of `values` with the 95 % percentile interval of the medians of resampled values."""
    generator = random.Random(seed)
    values = list(values)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(resamples))
    return Interval(statistics.median(values), medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1])


def ratio(times: Sequence[float], reference: Sequence[float], seed: int = 0) -> Interval:
    """How long `times` are over `reference`, both by round: the median of the rounds' ratios."""
    return bootstrap([a / b for a, b in zip(times, reference, strict=True)], seed)


def orders(keys: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """For every round the keys in a random order of its own, the same for the same seed."""
    generator = random.Random(seed)
    return [generator.sample(list(keys), len(keys)) for _ in range(rounds)]


def interleaved(
    runners: Sequence[Runner],
    rounds: int,
    warmup: int,
    seed: int,
    repeats: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one step, by variant and round.

    Args:
        runners: the variants.
        rounds, warmup: timed rounds, and those before them.
        seed: of the order.
        repeats: calls per timing, after one that is not timed; 1 times a single call; 0 finds a number by which the
            first variant takes at least 0.03 s.
        progress: is told (rounds done, all rounds).
    """
    by_key = {runner.key: runner for runner in runners}
    repeats = repeats or _repeats(runners[0])
    times: dict[str, list[float]] = {key: [] for key in by_key}
    for i, order in enumerate(orders(list(by_key), warmup + rounds, seed)):
        for key in order:
            seconds = timed(by_key[key], repeats)
            if i >= warmup:
                times[key].append(seconds)
        if progress is not None:
            progress(i + 1, warmup + rounds)
    return times


def timed(runner: Runner, repeats: int = 1) -> float:
    """Seconds of one step."""
    wait = torch.cuda.synchronize if runner_device(runner).type == "cuda" else _no_wait
    with runner.in_force():
        if repeats > 1:
            runner.step()
        wait()
        started = time.perf_counter()
        for _ in range(repeats):
            runner.step()
        wait()
        return (time.perf_counter() - started) / repeats


def _repeats(runner: Runner) -> int:
    timed(runner)
    return max(2, min(10_000, int(SHORTEST / timed(runner, 3)) + 1))


def _no_wait() -> None:
    pass
