"""Measure where one form of the mixture overtakes another, and keep that for the library's choice.

    python benchmarks/crossovers.py                  # a few minutes on an idle machine; on a GPU: --device cuda
    python benchmarks/crossovers.py --dry-run        # print, write nothing

Every form computes the same layer for T tokens and E experts with the best two kept, in random order within each round:
forward alone, and with the backward pass. The crossovers written to src/dylora_moe/mixing/crossovers.json are those, of
a grid, that lose least time against always taking the fastest form: the mean of log(time chosen / time of the best).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from dylora_moe import routing
from dylora_moe.benchmark.machine import describe
from dylora_moe.mixing import dense_mixture, gathered_mixture, grouped_mixture
from dylora_moe.mixing.choice import Crossovers
from dylora_moe.mixing.member import LayerExperts, Member

FILE = Path(__file__).parents[1] / "src" / "dylora_moe" / "mixing" / "crossovers.json"
FORMS = ("dense", "grouped", "gathered")
ACTIVE, RANK = 2, 16
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
EXPERTS = (4, 8, 16, 32, 64)
RATIOS, LEAST_TOKENS = (2, 4, 8, 16, 32, 1000), (1, 4, 8, 16, 32, 64, 128, 256)
GRID = {
    "gathered_copies": (0.25, 0.5, 1, 2, 4, 8, 16, 64),
    "gathered_ratio": RATIOS,
    "gathered_tokens": LEAST_TOKENS,
    "grouped_ratio": RATIOS,
    "grouped_tokens": LEAST_TOKENS,
}
Shape = tuple[bool, int, int, int]  # whether with a backward pass, width, tokens, experts
Times = dict[Shape, dict[str, float]]


def forms(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One call per form on the same tensors.

    Without gradients they find what layers before them left for the pass, and few tokens packed matrices, as within
    `generate`.
    """
    backward, width, tokens, experts = shape
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    x, dy, A, B = make(tokens, width), make(tokens, width), make(experts, RANK, width), make(experts, width, RANK)
    own = LayerExperts(tuple(range(experts)), (RANK,) * experts, (2.0,) * experts)
    leaves = [t.requires_grad_(backward) for t in (x, *A.unbind(), *B.unbind())]
    members = [Member(own, make(width, width), None, leaves[1 : 1 + experts], leaves[1 + experts :])]
    weights: Tensor = routing.top_k(torch.randn(tokens, experts, device=device), ACTIVE)
    kept: dict[str, Any] = {name: None if backward or tokens > 16 else {} for name in FORMS}

    memos: dict[str, Any] = {name: None if backward else {} for name in FORMS}

    def call(form: str) -> None:
        memo = memos[form]
        if form == "dense":
            (y,) = dense_mixture(x, weights, members, False, kept[form], memo)
        else:
            mixture = gathered_mixture if form == "gathered" else grouped_mixture
            more = () if form == "gathered" else (False,)
            (y,) = mixture(x, weights, members, ACTIVE, *more, kept[form], memo)
        if backward:
            torch.autograd.grad(y, leaves, dy)

    return {form: functools.partial(call, form) for form in FORMS}


def seconds(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for turn in range(rounds + 2):  # two warm up
        for name in order.sample(list(calls), len(calls)):
            started = time.perf_counter()
            calls[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def chosen(at: Crossovers, shape: Shape, device: str) -> str:
    """The rule of `mixing.choose`."""
    backward, _, tokens, experts = shape
    if tokens * ACTIVE * at.gathered_copies <= experts:
        return "gathered"
    if device == "cpu" and not backward:
        pays = experts / ACTIVE >= at.gathered_ratio and tokens >= at.gathered_tokens
        return "gathered" if pays else "dense"
    return "grouped" if experts / ACTIVE >= at.grouped_ratio and tokens >= at.grouped_tokens else "dense"


def regret(at: Crossovers, times: Times, device: str) -> float:
    """Mean log of the time lost by the rule against the fastest form everywhere."""
    lost = [math.log(row[chosen(at, shape, device)] / min(row.values())) for shape, row in times.items()]
    return sum(lost) / len(lost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1024])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    console, times = Console(), Times()
    for shape in itertools.product((False, True), args.widths, TOKENS, EXPERTS):
        with torch.set_grad_enabled(shape[0]):
            calls = forms(shape, args.device, getattr(torch, args.dtype))
            if shape[2] > 32 and (shape[0] or args.device != "cpu"):
                del calls["gathered"]  # copies too much to be in question
            row = times[shape] = {"gathered": math.inf, **seconds(calls, args.rounds, args.device)}
        console.print(shape, {name: f"{1e6 * value:.0f} µs" for name, value in row.items() if value < math.inf})
    grid = [Crossovers(*values) for values in itertools.product(*GRID.values())]
    best = min(track(grid, "Choosing"), key=lambda at: regret(at, times, args.device))
    entry = {
        "crossovers": best._asdict(),
        "provenance": f"benchmarks/crossovers.py --device {args.device} --dtype {args.dtype}, {args.rounds} rounds, "
        f"widths {args.widths}, rank {RANK}, top-{ACTIVE}; {describe(args.device)['name']}; torch {torch.__version__}; "
        f"{datetime.date.today().isoformat()}; mean loss to the fastest "
        f"{math.expm1(regret(best, times, args.device)):.1%}",
    }
    console.print(entry)
    if not args.dry_run:
        table = json.loads(FILE.read_text(encoding="utf-8")) | {args.device: entry}
        FILE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
