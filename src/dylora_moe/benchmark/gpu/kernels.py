"""The Triton kernels by themselves: against float64, and against torch's own.

Shapes: T tokens, D in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dylora_moe.benchmark.timing import captured, compare, interleaved
from dylora_moe.mixing import kernels

from .setting import EXPERTS, Setting

NO_KERNELS = "the kernels are not available here: no triton, or no GPU"
TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-5}
"""Largest difference from float64, of the largest element: one rounding of the output and one of H, twice over."""


def layer_shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """D and O of every linear layer that occurs."""
    hidden, wide = sizes["hidden"], sizes["intermediate"]
    return {
        "q and o": (hidden, hidden), "k and v": (hidden, sizes["kv"]), "gate and up": (hidden, wide),
        "down": (wide, hidden),
    }  # fmt: skip


def random_layer(T: int, D: int, O: int, setting: Setting) -> dict[str, Tensor]:
    """Inputs of the kernels; sums have a variance of about one."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=setting.device) * scale).to(setting.dtype)

    rows = setting.sizes["rank"] * EXPERTS
    return {
        "x": normal(T, D), "y": normal(T, O),
        "A": normal(rows, D, scale=D**-0.5), "B": normal(O, rows, scale=rows**-0.5),
        "gates": torch.rand(T, rows, device=setting.device).to(setting.dtype), "Hw": normal(T, rows),
    }  # fmt: skip


CALLS: dict[str, tuple[Callable[[dict], Any], Callable[[dict], Any]]] = {
    "shrink": (
        lambda t: kernels.shrink(t["x"], t["A"], t["gates"])[1],
        lambda t: F.linear(t["x"], t["A"]) * t["gates"],
    ),
    "expand": (
        lambda t: kernels.expand_(t["y"], t["Hw"], t["B"]),
        lambda t: t["y"].addmm_(t["Hw"], t["B"].T),
    ),
}  # fmt: skip
"""Kernel → itself, and torch's best way to the same numbers."""


def cases(sizes: Mapping[str, int]) -> Iterator[tuple[str, str, int, int, int]]:
    """Kernel, layer, T, D and O of everything to check and to measure."""
    for layer, (D, O) in layer_shapes(sizes).items():
        for name in CALLS:
            for T in (1, sizes["prompt"]):
                yield name, layer, T, D, O


def checks(setting: Setting, deadline: float) -> dict[str, Any]:
    """Every kernel at every shape against float64, beside torch's own error."""
    if not setting.has_kernels:
        return {"skipped": NO_KERNELS}
    rows, tolerance = [], TOLERANCE[setting.dtype]
    for name, layer, T, D, O in cases(setting.sizes):
        tensors = random_layer(T, D, O, setting)
        expected = CALLS[name][1]({k: v.double() for k, v in tensors.items()})
        row = {"kernel": name, "layer": layer, "tokens": T}
        for way, call in zip(("kernel", "torch"), CALLS[name], strict=True):
            found = call({k: v.clone() for k, v in tensors.items()})
            row[f"error_of_{way}"] = float((found.double() - expected).abs().max() / expected.abs().max())
        row["passed"] = row["error_of_kernel"] <= tolerance
        rows.append(row)
    return {"tolerance": tolerance, "passed": all(row["passed"] for row in rows), "rows": rows}


def call_times(setting: Setting, deadline: float) -> dict[str, Any]:
    """Each kernel against torch, as a CUDA graph of calls on changing inputs, so that L2 does not hold the matrices."""
    if not setting.has_kernels:
        return {"skipped": NO_KERNELS}
    rows, sizes = [], setting.sizes
    for name, layer, T, D, O in cases(sizes):
        copies = min(sizes["calls"], max(2, 2**27 // (2 * EXPERTS * sizes["rank"] * (D + O))))
        inputs = [random_layer(T, D, O, setting) for _ in range(copies)]
        steps, without_graph = {}, None
        for way, call in zip(("kernel", "torch", "torch again"), (*CALLS[name], CALLS[name][1]), strict=True):
            turns = [inputs[i % copies] for i in range(sizes["calls"])]
            step, reason = captured(lambda call=call, turns=turns: [call(tensors) for tensors in turns], setting.device)
            steps[way], without_graph = step, reason or without_graph
        times = interleaved(steps, sizes["rounds"], device=setting.device, deadline=deadline)
        for way, row in compare(times, "torch").items():
            row["ms"] /= sizes["calls"]
            rows.append({"kernel": name, "layer": layer, "tokens": T, "way": way, **row})
            if without_graph:
                rows[-1]["without_graph"] = without_graph
    return {"rows": rows}
