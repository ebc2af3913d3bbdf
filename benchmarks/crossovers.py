"""Measure where one form of the mixture overtakes another, and keep that for the library's choice.

    python benchmarks/crossovers.py                  # a few minutes on an idle machine; on a GPU: --device cuda
    python benchmarks/crossovers.py --dry-run        # print, write nothing

Every form computes the same layer for T tokens and E experts with the best two kept, without gradients, in random
order within each round. The crossovers written to src/dylora_moe/mixing/crossovers.json are those, of a grid, that
lose least time against always taking the fastest form: the mean of log(time chosen / time of the best).
"""

from __future__ import annotations

import argparse
import datetime
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
from torch import Tensor

from dylora_moe import routing
from dylora_moe.benchmark.machine import describe
from dylora_moe.mixing import dense_mixture, gathered_mixture, grouped_mixture
from dylora_moe.mixing.choice import Crossovers
from dylora_moe.mixing.member import LayerExperts, Member

FILE = Path(__file__).parents[1] / "src" / "dylora_moe" / "mixing" / "crossovers.json"
ACTIVE, RANK = 2, 16
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
EXPERTS = (4, 8, 16, 32, 64)
GRID = {
    "gathered_copies": (0.25, 0.5, 1, 2, 4, 8, 16, 64),
    "grouped_ratio": (2, 4, 8, 16, 32, 1000),
    "grouped_tokens": (1, 4, 8, 16, 32, 64, 128, 256),
}
Times = dict[tuple[int, int, int], dict[str, float]]


def forms(width: int, tokens: int, experts: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One call per form on the same tensors; few tokens find packed matrices, as within `generate`."""
    A = torch.randn(experts, RANK, width, device=device, dtype=dtype)
    B = torch.randn(experts, width, RANK, device=device, dtype=dtype)
    own = LayerExperts(tuple(range(experts)), (RANK,) * experts, (2.0,) * experts)
    weight = torch.randn(width, width, device=device, dtype=dtype)
    members = [Member(own, weight, None, list(A), list(B))]
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    weights: Tensor = routing.top_k(torch.randn(tokens, experts, device=device), ACTIVE)
    memos: dict[str, dict] = {name: {} for name in ("dense", "grouped", "gathered")}
    packed: dict[str, Any] = {name: {} if tokens <= 16 else None for name in memos}
    return {
        "dense": lambda: dense_mixture(x, weights, members, False, packed["dense"], memos["dense"]),
        "grouped": lambda: grouped_mixture(x, weights, members, ACTIVE, False, packed["grouped"], memos["grouped"]),
        "gathered": lambda: gathered_mixture(x, weights, members, ACTIVE, packed["gathered"], memos["gathered"]),
    }


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


def chosen(at: Crossovers, tokens: int, experts: int) -> str:
    """The rule of `mixing.choose`."""
    if tokens * ACTIVE * at.gathered_copies <= experts:
        return "gathered"
    return "grouped" if experts / ACTIVE >= at.grouped_ratio and tokens >= at.grouped_tokens else "dense"


def regret(at: Crossovers, times: Times) -> float:
    """Mean log of the time lost by the rule against the fastest form everywhere."""
    lost = [
        math.log(row[chosen(at, tokens, experts)] / min(row.values())) for (_, tokens, experts), row in times.items()
    ]
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
    with torch.no_grad():
        for shape in itertools.product(args.widths, TOKENS, EXPERTS):
            calls = forms(*shape, args.device, getattr(torch, args.dtype))
            if shape[1] > 32:
                del calls["gathered"]  # copies too much to be in question
            row = times[shape] = {"gathered": math.inf, **seconds(calls, args.rounds, args.device)}
            console.print(shape, {name: f"{1e6 * value:.0f} µs" for name, value in row.items() if value < math.inf})
    best = min((Crossovers(*values) for values in itertools.product(*GRID.values())), key=lambda at: regret(at, times))
    entry = {
        "crossovers": best._asdict(),
        "provenance": f"benchmarks/crossovers.py --device {args.device} --dtype {args.dtype}, {args.rounds} rounds, "
        f"widths {args.widths}, rank {RANK}, top-{ACTIVE}; {describe(args.device)['name']}; torch {torch.__version__}; "
        f"{datetime.date.today().isoformat()}; mean loss to the fastest {math.expm1(regret(best, times)):.1%}",
    }
    console.print(entry)
    if not args.dry_run:
        table = json.loads(FILE.read_text(encoding="utf-8")) | {args.device: entry}
        FILE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
