"""Whether a router in closed form tells the tasks apart while they are taught one after the other; nothing is trained.

    python benchmarks/lifelong/routing.py --data FOLDER

The router reads the bare base, whatever the experts are, so that more held-out rows can be routed than answered. For
the router of either kind, of single tokens and of means over a text: how many prompts go to the right task, once all
are taught, and when the task was just taught; and how many go elsewhere at the end than then. It writes
`results/routing.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe.base.embedded import EMBEDDED, resolve_base
from dylora_moe.base.placement import Placement
from dylora_moe.data.examples import Example
from dylora_moe.routing.router import CALIBRATIONS
from dylora_moe.skills.closed_form import Fit, fit
from dylora_moe.skills.features import evaluating, states_of, window_of
from dylora_moe.skills.reading import read_rows
from dylora_moe.skills.skill import RowViews, Skill
from tasks import read_tasks

HERE = Path(__file__).parent


class Reader:
    """The bare base, which reads rows as a mixture does."""

    def __init__(self, name: str):
        source = resolve_base(name)
        self.base, self.tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        self.placement, self.window = Placement.of(self.base), window_of(self.base)

    def states(self, rows: Sequence[Example]):
        """The states of each."""
        with evaluating(self.base.modules()):
            for row in read_rows(rows, self.tokenizer):
                yield states_of(self.base, self.placement, self.placement.num_layers // 4, row, self.window)

    def skill(self, rows: Sequence[Example]) -> Skill:
        """What is known of a task after these rows."""
        return Skill.of(self.states(rows), self.base.config.hidden_size)

    def prompts(self, rows: Sequence[Example]) -> Tensor:
        """Float64 `[R, D]`, by what each is routed."""
        return RowViews.of_each(self.states(rows)).deciding


def choices(router: Fit, prompts: Tensor) -> list[str]:
    """The task that each of `prompts [R, D]` goes to."""
    return [router.names[best] for best in (prompts @ router.weight.T + router.bias).argmax(-1).tolist()]


def measured(skills: dict[str, Skill], prompts: dict[str, Tensor], scored: str) -> dict:
    """The tasks taught in this order, by a router of one kind."""
    known: dict[str, Skill] = {}
    then: dict[str, list[str]] = {}
    for name, skill in skills.items():
        known[name] = skill
        then[name] = choices(fit(known, scored=scored), prompts[name])
    router = fit(known, scored=scored)
    now = {name: choices(router, rows) for name, rows in prompts.items()}

    def right(chosen: dict[str, list[str]]) -> dict[str, float]:
        return {name: fmean(choice == name for choice in rows) for name, rows in chosen.items()}

    moved = sum(a != b for name in now for a, b in zip(then[name], now[name], strict=True))
    return {
        "right": fmean(right(now).values()),
        "right when taught": fmean(right(then).values()),
        "moved since": moved / sum(map(len, now.values())),
        "by task": right(now),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cl_long")
    parser.add_argument("--base", default=EMBEDDED)
    parser.add_argument("--rows", type=int, nargs="*", default=[20, 200], help="rows taught of each task")
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--max-length", type=int, default=128)
    asked = parser.parse_args()
    reader = Reader(asked.base)
    kept = {"rows": max(asked.rows), "held_out": asked.held_out, "max_length": asked.max_length}
    tasks = read_tasks("long", 1, asked.data, reader.tokenizer, seed=0, **kept)
    prompts = {task.name: reader.prompts(task.test) for task in tasks}
    found = {}
    for rows in asked.rows:
        skills = {task.name: reader.skill(task.train[:rows]) for task in tasks}
        found[str(rows)] = {scored: measured(skills, prompts, scored) for scored in CALIBRATIONS}
        for scored, one in found[str(rows)].items():
            figures = ", ".join(f"{name} {value:.4f}" for name, value in one.items() if name != "by task")
            print(f"{rows} rows a task, by {scored}: {figures}", flush=True)
    (HERE / "results" / "routing.json").write_text(json.dumps({"settings": kept, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
