"""How many held-out rows a router in closed form sends to the right expert, by how many texts it was taught with.

    python benchmarks/compose/measure.py --data FOLDER

`FOLDER` holds a folder per domain with `train.jsonl` and `test.jsonl` (prompt, completion). Every cell, a set of
domains, a number of texts and a draw of them, is a JSON file in `results/`, which is not measured again.
`--table` puts them into docs/lifelong.md. Beside the router: retrieval by the nearest centroid, the cosine between the
mean state of a prompt and that of the texts' prompts, at the same layer. Routing needs no adapter: the router reads the
bare base, whatever the experts are (`tests/test_teach.py`), so that no weights were trained for this.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe.base.embedded import EMBEDDED, resolve_base
from dylora_moe.base.placement import Placement
from dylora_moe.benchmark.marked import write_marked
from dylora_moe.skills.closed_form import SEQUENCE, TOKEN, Fit, fit
from dylora_moe.skills.features import RowStates, evaluating, states_of, window_of
from dylora_moe.skills.reading import read_rows
from dylora_moe.skills.skill import Skill

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "lifelong.md"
FOUR = ("gsm8k", "wikisql", "e2e_nlg", "pubmedqa")
THIRTEEN = (
    *FOUR,
    *("mbpp", "geoquery", "instruct_small", "commonsense/piqa", "commonsense/winogrande", "cl_long/agnews"),
    "cl_superni/task1290_xsum_summarization",
    "cl_superni/task1687_sentiment140_classification",
    "cl_superni/task1729_personachat_generate_next",
)
SETS = {"four": FOUR, "thirteen": THIRTEEN}
TEXTS = {"four": (1, 5, 20), "thirteen": (1, 5, 20)}
DRAWS = 3
MOST = max(max(counts) for counts in TEXTS.values())


@dataclass
class HeldOut:
    """A row that nothing was taught with: means of its states `[D]`, and its tokens' states `[S, D]` in float32."""

    prompt: Tensor
    completion: Tensor
    states: Tensor


class Domain:
    """The rows of one domain as the router reads them; a text is read when it is first asked for."""

    def __init__(self, folder: Path, held_out: int, read):
        self.read, self.texts = read, {}
        self.rows = [rows_of(folder / "train.jsonl", MOST, f"draw {draw}") for draw in range(DRAWS)]
        self.held_out = [_means(read(row)) for row in rows_of(folder / "test.jsonl", held_out, "held out")]

    def taught(self, draw: int, count: int) -> list[RowStates]:
        """The first `count` texts of a draw."""
        for number in range(count):
            if (draw, number) not in self.texts:
                self.texts[draw, number] = self.read(self.rows[draw][number])
        return [self.texts[draw, number] for number in range(count)]


def rows_of(file: Path, count: int, seed: str) -> list[dict]:
    """So many rows of a file, drawn by the seed."""
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return random.Random(seed).sample(rows, min(count, len(rows)))


def _means(row: RowStates) -> HeldOut:
    states = row.states.double()
    completion = states[~row.prompt] if (~row.prompt).any() else states
    return HeldOut(states[row.prompt].mean(0), completion.mean(0), row.states)


def cell(domains: dict[str, Domain], count: int, draw: int) -> dict:
    """One measurement: shares of held-out rows by domain, and the temperatures."""
    width = next(iter(domains.values())).held_out[0].states.shape[-1]
    taught = {name: domain.taught(draw, count) for name, domain in domains.items()}
    started = time.perf_counter()
    skills = {name: Skill.of(rows, width) for name, rows in taught.items()}
    router = fit(skills, scored=SEQUENCE)
    seconds = time.perf_counter() - started
    of_tokens = fit(skills, scored=TOKEN)
    centroids = torch.stack(
        [
            torch.stack([row.states[row.prompt].double().mean(0) for row in taught[name]]).mean(0)
            for name in router.names
        ]
    )

    def scores(x: Tensor, by: Fit = router) -> Tensor:
        return x.double() @ by.weight.T + by.bias

    found = {}
    for column, name in enumerate(router.names):
        rows = domains[name].held_out

        def share(choices: Sequence[Tensor], own: int = column) -> float:
            return mean(float((choice == own).double().mean()) for choice in choices)

        prefixes = [scores(row.states).cumsum(0) for row in rows]  # their mean has the same best
        found[name] = {
            "rows": len(rows),
            "prompts": share([scores(row.prompt).argmax(-1) for row in rows]),
            "completions": share([scores(row.completion).argmax(-1) for row in rows]),
            "tokens": share([scores(row.states, of_tokens).argmax(-1) for row in rows]),
            "prefixes": share([each.argmax(-1) for each in prefixes]),
            "centroid": share([torch.cosine_similarity(centroids, row.prompt, dim=-1).argmax() for row in rows]),
        }
    return {
        "seconds to fit": round(seconds, 3),
        "temperatures": {SEQUENCE: router.temperatures[SEQUENCE], TOKEN: of_tokens.temperatures[TOKEN]},
        "domains": found,
    }


def table(folder: Path) -> str:
    """Every set and number of texts, mean and range over the draws."""
    kinds = ("prompts", "completions", "prefixes", "tokens", "centroid")
    lines = [f"| domains | texts | draws | {' | '.join(kinds)} |", f"| --- | ---: | ---: |{' ---: |' * len(kinds)}"]
    for name, counts in TEXTS.items():
        for count in counts:
            cells = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}-{count:02}-*.json"))]
            if not cells:
                continue
            shown = []
            for kind in kinds:
                values = [mean(domain[kind] for domain in each["domains"].values()) for each in cells]
                shown.append(f"{mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
            lines.append(f"| {name} | {count} | {len(cells)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder per domain")
    parser.add_argument("--base", default=EMBEDDED)
    parser.add_argument("--held-out", type=int, default=40, help="held-out rows per domain")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the cells that are there into docs/lifelong.md")
    asked = parser.parse_args()
    if asked.table:
        write_marked(PAGE, "compose", table(asked.out))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    todo = {
        asked.out / f"{name}-{count:02}-{draw}.json": (SETS[name], count, draw)
        for draw in range(DRAWS)
        for name, counts in TEXTS.items()
        for count in counts
    }
    todo = {file: what for file, what in todo.items() if not file.exists()}
    if not todo:
        print("nothing to do; all cells are there.")
        return
    source = resolve_base(asked.base)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    placement = Placement.of(base)
    k, window = placement.num_layers // 4, window_of(base)

    def read(row: dict) -> RowStates:
        return states_of(base, placement, k, read_rows([row], tokenizer)[0], window)

    domains: dict[str, Domain] = {}
    with evaluating(base.modules()):
        for file, (names, count, draw) in todo.items():
            for name in names:
                if name not in domains:
                    domains[name] = Domain(asked.data / name, asked.held_out, read)
                    print(f"read the held-out rows of {name}", flush=True)
            result = cell({name: domains[name] for name in names}, count, draw)
            file.write_text(json.dumps({"base": asked.base, "layer": k, "texts": count, **result}, indent=1) + "\n")
            print(f"wrote {file.name}", flush=True)
    print(table(asked.out))


if __name__ == "__main__":
    main()
