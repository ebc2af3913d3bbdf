"""Put the results of the demo into README.md, between its markers.

make demo && python benchmarks/readme_table.py runs/skills/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dylora_moe.benchmark.marked import write_marked

README = Path(__file__).parents[1] / "README.md"
COLUMNS = {"base": "base", "single": "one LoRA, same total rank", "mixture": "dense", "top2": "top-2", "top1": "top-1"}


def section(results: dict) -> str:
    """The Markdown of one run's held-out results and loads."""
    columns = [key for key in COLUMNS if results.get(key)]
    skills = list(results["base"])
    lines = [
        f"On two CPU cores it took {results['seconds'] / 60:.1f} minutes, conversion of the base, training and all "
        "measurements included. Held-out exact match, and where the tokens of each skill went:",
        "",
        "| skill | " + " | ".join(COLUMNS[key] for key in columns) + " | load of its own expert |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for skill in skills:
        values = " | ".join(f"{results[key][skill]:.0%}" for key in columns)
        lines.append(f"| {skill} | {values} | {results['load'][skill][skill]:.0%} |")
    return "\n".join(lines)


def main(file: str) -> None:
    write_marked(README, "results", section(json.loads(Path(file).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main(sys.argv[1])
