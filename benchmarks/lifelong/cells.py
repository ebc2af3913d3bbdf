"""One run of one method as cells: a JSON file per stage, which is not measured again, and the weights in between."""

from __future__ import annotations

import json
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from methods import METHODS, Base, Budget, Method, Ours, rate_loss
from scoring import score
from tasks import Task


@dataclass(frozen=True)
class Course:
    """Some tasks in an order, learnt by whichever method.

    Attributes:
        name: how its cells' names begin: suite, order and seed.
        tasks: in the order of learning.
        base: folder or hub id.
        tokenizer: of the base.
        budget: of every method.
        results: folder of the cells.
        work: folder of weights, which are deleted once the next stage's are there.
        noted: what every cell says of its settings; a cell that says something else is refused.
        matrix: evaluate every task after every stage, not only the ones that the averages need.
    """

    name: str
    tasks: list[Task]
    base: str
    tokenizer: PreTrainedTokenizerBase
    budget: Budget
    results: Path
    work: Path
    noted: dict[str, Any]
    matrix: bool = False

    def run(self, method: str) -> None:
        """Measure what is not there yet of a method."""
        files = [self.results / f"{self.name}-{method}-{stage:02}.json" for stage in self.stages(method)]
        missing = [stage for stage, file in enumerate(files) if self.read(file) is None]
        if not missing:
            return
        kind = METHODS[method]
        at_work = kind(self.base, self.tokenizer, self.tasks, self.budget, self.rate(kind))
        folder = self.work / f"{self.name}-{method}-{zlib.crc32(json.dumps(self.noted).encode()):08x}"
        kept = [stage for stage in range(missing[0] + 1) if (folder / f"{stage:02}").exists()]
        learnt = kept[-1] if kept else -1
        if kept:
            at_work.take_up(folder / f"{learnt:02}")
        for stage, file in enumerate(files):
            seconds = None
            if stage > learnt:
                started = time.perf_counter()
                at_work.learn(stage)
                seconds = round(time.perf_counter() - started, 1)
                at_work.keep(folder / f"{stage:02}")
                if stage:
                    shutil.rmtree(folder / f"{stage - 1:02}", ignore_errors=True)
                    (folder / f"{stage - 1:02}.pt").unlink(missing_ok=True)
            if stage >= learnt and self.read(file) is None:
                found = self.measure(at_work, stage)
                self.write(file, {"method": method, "stage": stage, "rate": at_work.rate, "seconds": seconds, **found})

    def stages(self, method: str) -> range:
        """The stages of a method, one if it does not learn."""
        return range(1 if METHODS[method] is Base else len(self.tasks))

    def measure(self, method: Method, stage: int) -> dict[str, Any]:
        """The scores after a stage: of the task just learnt, of the next one, and after the last stage of all."""
        last = stage == len(self.tasks) - 1
        if last or isinstance(method, Base):
            tasks = self.tasks
        elif not method.sequential:
            tasks = []
        else:
            tasks = self.tasks[0 if self.matrix else stage : stage + 2]
        found: dict[str, Any] = {"scores": {}}
        for task in tasks:
            found["scores"][task.name] = score(method.model, task, self.tokenizer, **method.force)
        if isinstance(method, Ours):
            own = self.tasks if last else [self.tasks[stage]]
            found["oracle"] = {task.name: score(method.model, task, self.tokenizer, experts=task.name) for task in own}
            found["novelty"] = None if last else self.novelty(method, stage)
        return found

    def novelty(self, method: Method, stage: int) -> dict[str, Any] | None:
        """What the mixture answers of held-out rows of the task just learnt (known) and of the next one (new)."""
        if not hasattr(method.model, "novelty"):
            return None
        found = {}
        for kind, task in (("known", self.tasks[stage]), ("new", self.tasks[stage + 1])):
            rows = [{"prompt": row.prompt, "completion": row.completion} for row in task.test]
            answers = method.model.novelty(rows)
            found[kind] = {"score": [one.score for one in answers], "answer": [one.answer for one in answers]}
        return found

    def rate(self, kind: type[Method]) -> float:
        """The learning rate of a method: the budget's, or the best of three for its rank on the first task."""
        if kind.swept is None:
            return self.budget.rate
        rank = getattr(self.budget, kind.swept)
        losses = {}
        for rate in self.budget.rates(rank):
            file = self.results / f"{self.name}-rate-r{rank}-{rate:.2g}.json"
            cell = self.read(file)
            if cell is None:
                loss = rate_loss(self.base, self.tokenizer, self.tasks[0], self.budget, rank, rate)
                cell = {"rank": rank, "rate": rate, "loss": loss}
                self.write(file, cell)
            losses[cell["rate"]] = cell["loss"]
        return min(losses, key=lambda rate: losses[rate])

    def read(self, file: Path) -> dict[str, Any] | None:
        """A cell, or None if it is not there.

        Raises:
            ValueError: a cell that was measured with other settings.
        """
        if not file.exists():
            return None
        cell = json.loads(file.read_text(encoding="utf-8"))
        if cell["settings"] != self.noted:
            raise ValueError(f"{file} was measured with {cell['settings']}, not {self.noted}; give another --out.")
        return cell

    def write(self, file: Path, cell: dict[str, Any]) -> None:
        """Put a cell in place at once."""
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps({"settings": self.noted, **cell}, indent=1) + "\n", encoding="utf-8")
        draft.rename(file)
        print(f"wrote {file.name}", flush=True)
