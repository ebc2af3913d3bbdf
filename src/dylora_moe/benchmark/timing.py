"""The one timing loop: variants interleaved in random order, compared round by round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

Step = Callable[[], Any]
SHORTEST = 0.03  # seconds that one timing takes at least where the number of calls is found
LEAST_ROUNDS = 3  # that are timed whatever the deadline
RESAMPLES = 2000
NO_GPU = "no GPU"
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
"""What a variant raises that does not run here, out of memory included."""


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


def compare(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Median time of each, and the median ratio to `reference` with its bootstrap interval."""
    rows = {}
    for name, values in times.items():
        found = ratio(values, times[reference])
        rows[name] = {
            "ms": statistics.median(values) * 1000,
            "ratio": found.median,
            "ratio_low": found.low,
            "ratio_high": found.high,
            "rounds": len(values),
        }
    return rows


def orders(keys: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """For every round the keys in a random order of its own, the same for the same seed."""
    generator = random.Random(seed)
    return [generator.sample(list(keys), len(keys)) for _ in range(rounds)]


def interleaved(
    steps: Mapping[str, Step],
    rounds: int,
    warmup: int = 2,
    *,
    seed: int = 0,
    repeats: int = 1,
    device: torch.device | str = "cpu",
    around: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    deadline: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one step, by variant and round.

    Args:
        steps: what each variant does.
        rounds, warmup: timed rounds, and those before them.
        seed: of the order.
        repeats: calls per timing, after one that is not timed; 1 times a single call; 0 finds a number by which the
            first variant takes at least 0.03 s.
        device: where the work is done; on a GPU its own events are read instead of the clock.
        around: makes the context in which a variant is timed; entering it (to reset what the last call left, to choose
            a form) takes none of its time.
        deadline: of `time.monotonic()`, after which no further round begins once 3 are timed.
        progress: is told (rounds done, all rounds).
    """
    device = torch.device(device)
    if not repeats:
        first = next(iter(steps))
        with around(first):
            seconds(steps[first], 1, device)
            repeats = max(2, min(10_000, int(SHORTEST / seconds(steps[first], 3, device)) + 1))
    times: dict[str, list[float]] = {key: [] for key in steps}
    for i, order in enumerate(orders(list(steps), warmup + rounds, seed)):
        if deadline is not None and i >= warmup + LEAST_ROUNDS and time.monotonic() > deadline:
            break
        for key in order:
            with around(key):
                taken = seconds(steps[key], repeats, device)
            if i >= warmup:
                times[key].append(taken)
        if progress is not None:
            progress(i + 1, warmup + rounds)
    return times


def seconds(step: Step, repeats: int, device: torch.device) -> float:
    """Seconds of one step, the mean of `repeats` in a row; of more than one after one that is not timed."""
    if repeats > 1:
        step()
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - started) / repeats
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record(stream)
    for _ in range(repeats):
        step()
    after.record(stream)
    after.synchronize()
    return before.elapsed_time(after) / 1000 / repeats


def captured(step: Step, device: torch.device) -> tuple[Step, str | None]:
    """`step` as a CUDA graph, or as it is with the reason why not."""
    if device.type != "cuda":
        return step, NO_GPU
    try:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except FAILURES as error:
        return step, f"{type(error).__name__}: {error}"
    return graph.replay, None
