"""Check and measure on a GPU: `dylora_moe/benchmark/gpu` says what.

benchmarks/gpu.sh                     # a GPU, at most ten minutes, one JSON file in benchmarks/results/
benchmarks/gpu.sh --tiny --out x.json # the same on small shapes, on a CPU if need be: tests the logic only
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dylora_moe.benchmark.gpu.phases import PHASES, describe, failed, run_apart, run_phase, summary
from dylora_moe.benchmark.gpu.setting import Setting
from dylora_moe.benchmark.machine import slug


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a test of the logic")
    parser.add_argument("--phase", choices=list(PHASES), help="this phase only")
    parser.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/gpu-DATE-DEVICE.json")
    args = parser.parse_args()
    setting = Setting.here(args.tiny)
    if setting.device.type == "cpu" and not args.tiny:
        parser.error("no GPU is visible to torch; --tiny runs small shapes on the CPU.")
    if args.phase and args.out:
        args.out.write_text(json.dumps(run_phase(args.phase, setting)))
        return
    where, results = describe(setting), dict[str, Any]()
    name = f"gpu-{where['date'][:10]}-{slug(where['device'])}.json"
    out = args.out or Path(__file__).parent / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *["--tiny"] * args.tiny]
    for phase, found in run_apart(command, [args.phase] if args.phase else list(PHASES)):
        results[phase] = found
        print(*summary(phase, found), sep="\n")
        out.write_text(json.dumps({"setting": where, **results}, indent=2) + "\n")  # a later phase may be the last
    print(f"wrote {out}")
    sys.exit(any(map(failed, results.values())))


if __name__ == "__main__":
    main()
