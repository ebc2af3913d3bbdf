"""Measure where one form of the mixture overtakes another, and keep that for the library's choice.

    python benchmarks/crossovers.py                  # a few minutes on an idle machine; on a GPU: --device cuda
    python benchmarks/crossovers.py --dry-run        # print, write nothing

`dylora_moe/benchmark/crossovers.py` says what is measured; it is written to src/dylora_moe/mixing/crossovers.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from dylora_moe.benchmark.crossovers import ACTIVE, RANK, grid, regret, seconds, shapes
from dylora_moe.benchmark.machine import describe

FILE = Path(__file__).parents[1] / "src" / "dylora_moe" / "mixing" / "crossovers.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1024])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    console, times = Console(), {}
    for shape in shapes(args.widths):
        row = times[shape] = seconds(shape, args.device, getattr(torch, args.dtype), args.rounds)
        console.print(shape, {name: f"{1e6 * value:.0f} µs" for name, value in row.items() if value < math.inf})
    best = min(track(grid(), "Choosing"), key=lambda at: regret(at, times, args.device))
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
