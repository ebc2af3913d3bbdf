"""Specialists with a router in closed form beside joint training: held-out loss of four domains at equal rows.

    python benchmarks/quality/measure.py --data FOLDER

`FOLDER` holds a folder per domain of recipes/real.yaml with `train.jsonl` and `test.jsonl` (prompt, completion), which
take the place of the hub's. A cell, a way of training at a rate with a seed, is a JSON file in `results/`; a column of
it, a way of routing, is not measured again. Trained mixtures lie in `runs/quality`. Every method is run at three rates
with the first seed, and with the others at the best of them. `--table` puts the cells into docs/training.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from dylora_moe import DyLoraMoE
from dylora_moe.benchmark.marked import write_marked
from dylora_moe.data.examples import Example, fit_to_length
from dylora_moe.evaluation.held_out import by_domain, completion_loss
from dylora_moe.training.recipe.recipe import load_recipe
from dylora_moe.training.run.build import load_recipe_examples, load_tokenizer, loading_options
from dylora_moe.training.run.job import Job

ROOT = Path(__file__).parents[2]
RESULTS, RUNS = Path(__file__).parent / "results", Path("runs/quality")
PAGE = ROOT / "docs" / "training.md"
DOMAINS = ("gsm8k", "wikisql", "e2e_nlg", "pubmedqa")
RATES, SEEDS, STEPS = (1e-3, 2e-3, 4e-3), (0, 1, 2), 40
HELD_OUT = {"gsm8k": 64, "wikisql": 64, "e2e_nlg": 64, "pubmedqa": 200}
"""Rows by domain; the answers of the last are one to three tokens."""
LENGTH = 384
READ = 320
"""Rows that are looked at to find so many that are not too long."""
EXPECTED = 2e-3
"""The rate that is best as far as is known, and is measured first."""
METHODS = {
    "specialists": ["train.method=specialists", "mixture.router_type=closed_form", "train.domain_coefficient=0"],
    "joint": ["train.method=joint", "mixture.router_type=mlp", "train.domain_coefficient=0.1"],
}
DECIDES = {"specialists": "sequence top-1", "joint": "token top-2"}
"""The column that a method's best rate is chosen by: how it is meant to be used."""
COLUMNS: dict[str, dict[str, Any]] = {
    "oracle": {},
    **{
        f"{granularity} {name}": {"granularity": granularity, "top_k": top_k}
        for granularity in ("sequence", "prefix", "token")
        for name, top_k in {"top-1": 1, "top-2": 2, "dense": None}.items()
    },
}
OF_METHOD = {
    "specialists": ["oracle", "sequence top-1"],
    "joint": ["token top-2"],
}


def recipe_for(method: str, rate: float, seed: int, data: Path, held_out: bool) -> Any:
    """The recipe of a cell; without held-out data the run measures nothing itself."""
    overrides = [*METHODS[method], f"train.learning_rate={rate}", f"seed={seed}", f"train.max_steps={STEPS}"]
    overrides += [f"output={RUNS / f'{method}-{rate:g}-{seed}'}", f"eval.samples={READ}"]
    for name in DOMAINS:
        folder = (data / name).absolute()
        overrides.append(f"experts.{name}.data.train={folder / 'train.jsonl'}")
        if held_out:
            overrides.append(f"experts.{name}.data.test={folder / 'test.jsonl'}")
    return load_recipe(ROOT / "recipes" / "real.yaml", overrides)


def measure(mixture: DyLoraMoE, column: str, test: list[Example], tokenizer: Any) -> dict[str, dict]:
    """One column: nats per completion token by domain."""
    config = mixture.moe_config
    for key, value in COLUMNS[column].items():
        setattr(config, key, value)
    found = {}
    for domain, rows in by_domain(test).items():
        rows = rows[: HELD_OUT[domain]]
        force: dict[str, Any] = {"experts": domain} if column == "oracle" else {}
        found |= completion_loss(mixture, tokenizer, rows, batch_size=4, **force)
    return {domain: one.__dict__ for domain, one in found.items()}


def cells() -> Iterator[tuple[str, float, int]]:
    """What is to be measured, in this order."""
    for seed in SEEDS:
        for method in METHODS:
            yield method, EXPECTED, seed
    for rate in RATES:
        for method in METHODS:
            yield method, rate, SEEDS[0]
    for seed in SEEDS[1:]:
        for method in METHODS:
            yield method, best_rate(method), seed


def file_of(method: str, rate: float, seed: int) -> Path:
    """Where a cell is kept."""
    return RESULTS / f"{method}-{rate:g}-{seed}.json"


def read(method: str, rate: float, seed: int) -> dict:
    """What is known of a cell."""
    file = file_of(method, rate, seed)
    return json.loads(file.read_text()) if file.exists() else {}


def mean_of(cell: dict, column: str) -> float:
    """The mean over the domains."""
    return fmean(cell[column][name]["value"] for name in DOMAINS)


def best_rate(method: str) -> float:
    """The rate with the lowest held-out loss with the first seed."""
    known = [rate for rate in RATES if DECIDES[method] in read(method, rate, SEEDS[0])]
    return min(known, key=lambda rate: mean_of(read(method, rate, SEEDS[0]), DECIDES[method]))


def table() -> str:
    """Every method, rate and column: the mean over the seeds, each seed, and the interval over rows."""
    lines = ["| method | rate | routing | mean | seeds | over rows |", "| --- | ---: | --- | ---: | --- | ---: |"]
    for method, rate, column in product(METHODS, RATES, COLUMNS):
        measured = [cell for seed in SEEDS if column in (cell := read(method, rate, seed))]
        if not measured:
            continue
        means = [mean_of(cell, column) for cell in measured]
        widths = [
            sum((cell[column][name]["high"] - cell[column][name]["low"]) ** 2 for name in DOMAINS) ** 0.5 / 8
            for cell in measured
        ]
        spread = f", σ {stdev(means):.3f}" if len(means) > 1 else ""
        listed = " · ".join(f"{value:.3f}" for value in means)
        lines.append(
            f"| {method} | {rate:g} | {column} | {fmean(means):.3f} | {listed}{spread} | ± {fmean(widths):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder per domain")
    parser.add_argument("--columns", nargs="*", choices=list(COLUMNS), help="further ways of routing to measure")
    parser.add_argument("--table", action="store_true", help="write the cells that are there into docs/training.md")
    asked = parser.parse_args()
    if asked.table:
        write_marked(PAGE, "quality", table())
        return
    if asked.data is None:
        parser.error("--data is needed: the folder with the domains")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for method, rate, seed in cells():
        cell = read(method, rate, seed)
        wanted = [*OF_METHOD[method], *(asked.columns or [])]
        missing = [column for column in wanted if column not in cell]
        if not missing:
            continue
        recipe = recipe_for(method, rate, seed, asked.data, held_out=False)
        folder = Path(recipe.output)
        if not (folder / "results.json").exists():
            Job(recipe, Console(quiet=True)).run(resume=(folder / "recipe.yaml").exists())
        test = load_recipe_examples(recipe_for(method, rate, seed, asked.data, held_out=True))[1]
        tokenizer = load_tokenizer(recipe)
        test = fit_to_length(test, tokenizer, LENGTH, "drop", what="the held-out data")
        mixture = DyLoraMoE.from_pretrained(str(folder), **loading_options(recipe))
        for column in missing:
            cell[column] = measure(mixture, column, test, tokenizer)
            file_of(method, rate, seed).write_text(json.dumps(cell, indent=1) + "\n")
            print(f"{method} at {rate:g}, seed {seed}, {column}: {mean_of(cell, column):.4f}", flush=True)


if __name__ == "__main__":
    main()
