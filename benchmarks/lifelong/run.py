"""Continual learning: one task after the other, by a mixture that grows and by one adapter in several ways.

    python benchmarks/lifelong/run.py --data FOLDER

`FOLDER` holds `cl_long` (O-LoRA's tasks) and `cl_superni` (SAPT's), a folder per task with `train.jsonl` and
`test.jsonl` (prompt, completion). Every stage of every method is a JSON file in `results/`, which is not measured
again; the weights in between stand in `results/work/`, which git ignores, so that a run that was cut off goes on.
`--table` writes the cells that are there into docs/lifelong.md, `--figure FILE` draws the forgetting matrices.

A task is `--rows` rows, `--steps` steps of `--batch` rows, and `--held-out` rows to score: by the likeliest label where
a task has at most twenty, else by ROUGE-L of a greedy answer. Prompts longer than about `--max-length` tokens lose
their middle. The learning rates of the methods with one adapter and of O-LoRA are the best of three on the first task.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from cells import Course
from dylora_moe.base.embedded import EMBEDDED, resolve_base
from dylora_moe.benchmark.marked import write_marked
from methods import METHODS, Budget
from summary import course_name, figure, table
from tasks import ORDERS, read_tasks

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "lifelong.md"


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cl_long and cl_superni")
    parser.add_argument("--suite", default="long", choices=list(ORDERS))
    parser.add_argument("--order", type=int, default=1)
    parser.add_argument("--methods", default=",".join(METHODS), help="default %(default)s")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--base", default=EMBEDDED)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--matrix", action="store_true", help="score all tasks so far after every stage")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--table", action="store_true", help="write the cells that are there into docs/lifelong.md")
    parser.add_argument("--figure", type=Path, help="draw the cells that are there into this file")
    asked = parser.parse_args()
    seeds, methods = [int(seed) for seed in asked.seeds.split(",")], asked.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}")
    if asked.table:
        write_marked(PAGE, "lifelong", table(asked.out, asked.suite, asked.order, seeds))
    if asked.figure:
        figure(asked.out, asked.suite, asked.order, seeds[0]).savefig(asked.figure)
    if asked.table or asked.figure:
        return
    base = resolve_base(asked.base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    kept = {"rows": asked.rows, "held_out": asked.held_out, "max_length": asked.max_length}
    for seed in seeds:
        try:
            tasks = read_tasks(asked.suite, asked.order, asked.data, tokenizer, seed=seed, **kept)
        except ValueError as error:
            parser.error(str(error))
        budget = Budget(steps=asked.steps, batch=asked.batch, seed=seed)
        name = course_name(asked.suite, asked.order, seed)
        noted = {"base": asked.base, **kept, **vars(budget)}
        course = Course(name, tasks, base, tokenizer, budget, asked.out, asked.out / "work", noted, asked.matrix)
        for method in methods:
            course.run(method)
    print(table(asked.out, asked.suite, asked.order, seeds))


if __name__ == "__main__":
    main()
