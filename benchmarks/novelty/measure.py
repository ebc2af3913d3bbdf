"""How surely new kinds of text are told from those that a mixture was taught, on clearly different domains.

    python benchmarks/novelty/measure.py --data FOLDER

`FOLDER` holds a folder per domain with `train.jsonl` and `test.jsonl` (prompt, completion). Every cell is a form of the
texts, as they are or with the instruction that all prompts of a domain share taken off, a number of rows per skill, and
what is left out: each domain in turn is new and the others are known (`others`), or one is known and the others new,
beside the background (`first`) or without it (`alone`). It is a JSON file in `results/`, which is not measured again.
`--table` puts them into docs/lifelong.md. A text is read once; the views of it are kept in `--views`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe.base.embedded import EMBEDDED, resolve_base
from dylora_moe.base.placement import Placement
from dylora_moe.benchmark.marked import write_marked
from dylora_moe.skills.background import background_texts
from dylora_moe.skills.features import evaluating, states_of, window_of
from dylora_moe.skills.novelty import NEW, RELATED, TOO_SHORT, Detector, Novelty
from dylora_moe.skills.reading import read_rows
from dylora_moe.skills.skill import RowViews, Skill
from dylora_moe.skills.sums import Sums

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "lifelong.md"
DOMAINS = (
    *("gsm8k", "wikisql", "e2e_nlg", "pubmedqa", "mbpp", "geoquery", "instruct_small"),
    *("commonsense/piqa", "commonsense/winogrande", "cl_long/agnews"),
    "cl_superni/task1290_xsum_summarization",
    "cl_superni/task1687_sentiment140_classification",
    "cl_superni/task1729_personachat_generate_next",
)
FIT, HELD_OUT, BATCH, BATCHES = 80, 40, 16, 5
CELLS = [
    *(("whole", rows, "others") for rows in (80, 40)),
    ("stripped", 80, "others"),
    ("whole", 80, "first"),
    ("whole", 80, "alone"),
]
BROAD = "instruct_small"
"""A mixture of instructions of every kind; what is known without it stands beside what is known with it."""


# ---------------------------------------------------------------------- reading


def shared(texts: Sequence[str]) -> str:
    """The words that all texts begin with."""
    first, last = min(texts), max(texts)
    length = next((n for n, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[: max(first.rfind(" ", 0, length), first.rfind("\n", 0, length)) + 1]


def rows_of(folder: Path, form: str) -> tuple[list[dict], list[dict]]:
    """Rows to teach, and held-out ones."""
    train, test = (
        [json.loads(line) for line in (folder / name).open(encoding="utf-8")] for name in ("train.jsonl", "test.jsonl")
    )
    prompts = [row["prompt"] for row in train] if form == "stripped" else ["", "-"]
    start, end = shared(prompts), shared([prompt[::-1] for prompt in prompts])[::-1]

    def plain(row: dict) -> dict:
        bare = row["prompt"].removeprefix(start).removesuffix(end)
        return {"prompt": bare.strip() or row["prompt"], "completion": row["completion"]}

    taught, held_out = random.Random("fit").sample(train, FIT), random.Random("held out").sample(test, HELD_OUT)
    return [plain(row) for row in taught], [plain(row) for row in held_out]


class Views:
    """The views of rows, read when they are first asked for and kept in a folder."""

    def __init__(self, folder: Path, base: str):
        self.folder, self.base = folder, base
        self._read: Callable[[list[dict]], RowViews] | None = None

    def of(self, name: str, rows: Callable[[], list[dict]]) -> RowViews:
        """Those of `rows`, kept under a name."""
        file = self.folder / f"{name.replace('/', '-')}.safetensors"
        if not file.exists():
            self._read = self._read or _reader(self.base)
            views = self._read(rows())
            save_file({"keys": views.keys, "counts": views.counts, "states": views.states}, file)
            print(f"read {name}", flush=True)
        return RowViews(**load_file(file))


def _reader(name: str) -> Callable[[list[dict]], RowViews]:
    source = resolve_base(name)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    placement = Placement.of(base)
    k, window = placement.num_layers // 4, window_of(base)

    def read(rows: list[dict]) -> RowViews:
        with evaluating(base.modules()):
            return RowViews.of_each(states_of(base, placement, k, row, window) for row in read_rows(rows, tokenizer))

    return read


# ---------------------------------------------------------------------- measuring


def skill(views: RowViews, rows: int) -> Skill:
    """What novelty needs to know of a skill: some of its rows."""
    kept = part(views, torch.arange(min(rows, len(views.keys))))
    sums = Sums.none(views.states.shape[-1])
    return Skill(sums, kept.deciding.mean(0), len(kept.keys), int(kept.counts.sum()), kept)


def part(views: RowViews, rows: Tensor) -> RowViews:
    """Some rows."""
    return RowViews(views.keys[rows], views.counts[rows], views.states[rows])


def together(several: Iterable[RowViews]) -> RowViews:
    """All rows."""
    found = list(several)
    return RowViews(*(torch.cat([getattr(one, key) for one in found]) for key in ("keys", "counts", "states")))


def auroc(new: Sequence[Novelty], known: Sequence[Novelty]) -> float:
    """How often a new one scores higher than a known one."""
    high, low = torch.tensor([one.score for one in new]), torch.tensor([one.score for one in known])
    above = (high[:, None] > low).double() + (high[:, None] == low).double() / 2
    return float(above.mean())


def share(found: Sequence[Novelty], answer: str) -> float:
    """How often it was said."""
    return mean(one.answer == answer for one in found)


def compared(detector: Detector, known: Sequence[RowViews], new: Sequence[RowViews], false_alarm: float) -> dict:
    """Rows and batches of known domains against those of new ones."""

    def batches(views: RowViews, seed: str) -> list[Novelty]:
        drawn = random.Random(seed)
        picked = [drawn.sample(range(len(views.keys)), min(BATCH, len(views.keys))) for _ in range(BATCHES)]
        return [detector.of_batch(part(views, torch.tensor(rows)), false_alarm) for rows in picked]

    old, fresh = (detector.of_rows(together(views), false_alarm) for views in (known, new))
    old_batches, fresh_batches = (
        [one for n, each in enumerate(views) for one in batches(each, f"batch {n}")] for views in (known, new)
    )
    return {
        "known rows": len(old),
        "auroc": auroc(fresh, old),
        "false alarms": share(old, NEW),
        "found": share(fresh, NEW),
        "found or related": share(fresh, NEW) + share(fresh, RELATED),
        "known too short": share(old, TOO_SHORT),
        "new too short": share(fresh, TOO_SHORT),
        "batch auroc": auroc(fresh_batches, old_batches),
        "batch false alarms": share(old_batches, NEW),
        "batches found": share(fresh_batches, NEW),
        "batches found or related": share(fresh_batches, NEW) + share(fresh_batches, RELATED),
        "batch alarms or related": share(old_batches, NEW) + share(old_batches, RELATED),
    }


def cell(fit: dict[str, RowViews], held_out: dict[str, RowViews], background: RowViews, rows: int, left: str) -> dict:
    """One measurement: domain → what was found where it was new, or the only one known."""
    skills, found = {name: skill(views, rows) for name, views in fit.items()}, {}
    for name in skills:
        others = [other for other in skills if other != name]
        if left == "others":
            detector = Detector({other: skills[other] for other in others}, background)
            found[name] = compared(detector, [held_out[other] for other in others], [held_out[name]], 0.01)
            narrow = [other for other in others if other != BROAD]
            detector = Detector({other: skills[other] for other in narrow}, background)
            known = [held_out[other] for other in narrow]
            found[name]["without the broad one"] = compared(detector, known, [held_out[name]], 0.01)
        else:
            beside = background if left == "first" else RowViews.none(background.states.shape[-1])
            detector = Detector({name: skills[name]}, beside)
            found[name] = compared(detector, [held_out[name]], [held_out[other] for other in others], 0.05)
    return {"false alarm asked": 0.01 if left == "others" else 0.05, "domains": found}


# ---------------------------------------------------------------------- showing


def table(folder: Path) -> str:
    """Every cell: mean, and in brackets the worst."""
    lines = [
        "| texts | rows | known | asked | AUROC | false alarms | found | or related "
        "| batch: AUROC | false alarms | found | or related |",
        f"| --- | ---: | --- | ---: |{' ---: |' * 8}",
    ]
    titles = {"others": "twelve others", "first": "one", "alone": "one, no background"}
    for form, rows, left in CELLS:
        file = folder / f"{form}-{rows:02}-{left}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        domains = list(result["domains"].values())
        kinds = [(titles[left], domains)]
        if left == "others":
            kinds.append((f"those but {BROAD}", [one["without the broad one"] for one in domains]))
        for known, cells in kinds:
            shown = []
            for key, worst in (
                *(("auroc", min), ("false alarms", max), ("found", min), ("found or related", min)),
                *(("batch auroc", min), ("batch false alarms", max)),
                *(("batches found", min), ("batches found or related", min)),
            ):
                values = [one[key] for one in cells]
                shown.append(f"{mean(values):.3f} ({worst(values):.3f})")
            lines.append(f"| {form} | {rows} | {known} | {result['false alarm asked']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder per domain")
    parser.add_argument("--base", default=EMBEDDED)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--views", type=Path, default=Path(tempfile.gettempdir()) / "novelty-views")
    parser.add_argument("--table", action="store_true", help="write the cells that are there into docs/lifelong.md")
    asked = parser.parse_args()
    if asked.table:
        write_marked(PAGE, "novelty", table(asked.out))
        return
    for folder in (asked.out, asked.views):
        folder.mkdir(parents=True, exist_ok=True)
    todo = {asked.out / f"{form}-{rows:02}-{left}.json": (form, rows, left) for form, rows, left in CELLS}
    todo = {file: what for file, what in todo.items() if not file.exists()}
    views = Views(asked.views, asked.base)
    for file, (form, rows, left) in todo.items():
        fit, held_out = (
            {
                name: views.of(
                    f"{form} {half} {name}", lambda n=n, name=name, form=form: rows_of(asked.data / name, form)[n]
                )
                for name in DOMAINS
            }
            for n, half in enumerate(("fit", "test"))
        )
        background = views.of("background", background_texts)
        result = cell(fit, held_out, background, rows, left)
        file.write_text(json.dumps({"base": asked.base, "rows": rows, **result}, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {file.name}", flush=True)
    print(table(asked.out))


if __name__ == "__main__":
    main()
