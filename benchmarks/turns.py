"""Timing variants in turns, and what a step costs besides time; see `gpu.py`."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], Any]
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
GPU = torch.cuda.is_available()


def seconds(step: Step, calls: int) -> float:
    """Time of one call, from `calls` in a row; on a GPU between two events."""
    if not GPU:
        started = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - started) / calls
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(calls):
        step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000 / calls


def interleave(steps: dict[str, Step], rounds: int, calls: int, deadline: float, reset: Step) -> dict[str, list[float]]:
    """Times by name, one per round; every round has its own order, and ends early at the deadline."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for number in range(rounds + 2):  # the first two warm up
        taken = {}
        for name in order.sample(list(steps), len(steps)):
            reset()
            taken[name] = seconds(steps[name], calls)
        if number >= 2:
            for name, value in taken.items():
                times[name].append(value)
        if time.monotonic() > deadline and len(times[name]) >= 3:
            break
    return times


def compare(times: dict[str, list[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Median time of each, and the median ratio to `reference` with its bootstrap interval."""
    rows, draw = {}, random.Random(0)
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[reference], strict=True)]
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
        rows[name] = {
            "ms": statistics.median(values) * 1000,
            "ratio": statistics.median(ratios),
            "ratio_low": medians[50],
            "ratio_high": medians[-51],
            "rounds": len(values),
        }
    return rows


class Seen(TorchDispatchMode):
    """Counts the calls of our operators and the times that a tensor is read back to the host."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "dylora_moe":
            self.counts["kernel_calls"] += 1
        if function is torch.ops.aten._local_scalar_dense.default:
            self.counts["host_reads"] += 1
        return function(*args, **(kwargs or {}))


def look(model: Any, step: Step) -> dict[str, Any]:
    """What one step costs besides time: peak bytes above what was there, kernel calls, reads by the host."""
    with Seen() as seen:
        step()
    found = {"kernel_calls": seen.counts["kernel_calls"], "host_reads": seen.counts["host_reads"]}
    found["model_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    if GPU:
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        found["peak_bytes_of_step"] = torch.cuda.max_memory_allocated() - before
        found["peak_bytes"] = found["peak_bytes_of_step"] + found["model_bytes"]
    model.zero_grad()
    return found


def captured(step: Step) -> tuple[Step, str | None]:
    """`step` as a CUDA graph, or as it is with the reason why not."""
    if not GPU:
        return step, "no GPU"
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except FAILURES as error:
        return step, f"{type(error).__name__}: {error}"
    return graph.replay, None
