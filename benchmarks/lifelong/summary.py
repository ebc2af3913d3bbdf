"""From cells to numbers, a table and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from dylora_moe.report.colours import LIGHT, contrast
from methods import METHODS
from tasks import ORDERS

TITLES = {
    "ours": "**ours, routed**",
    "oracle": "ours, own expert forced",
    "sequential": "one LoRA, one task after the other",
    "olora": "O-LoRA",
    "replay": "one LoRA, 2 % replayed",
    "joint": "one LoRA, all tasks at once",
    "base": "base, no training",
}
COLUMNS = ("average", "of joint", "backward", "forward", "routed right", "harm", "novelty", "false alarms")


@dataclass(frozen=True)
class Course:
    """The cells of one suite, order and seed: method → those that are there, by stage."""

    tasks: tuple[str, ...]
    cells: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, folder: Path, suite: str, order: int, seed: int) -> Course:
        """All cells of a folder that belong together."""
        name = course_name(suite, order, seed)
        cells = {}
        for method in METHODS:
            files = sorted(folder.glob(f"{name}-{method}-[0-9][0-9].json"))
            cells[method] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return cls(ORDERS[suite][order - 1], cells)

    def complete(self, method: str) -> bool:
        """Whether the last stage of a method is there."""
        return len(self.cells[method]) == (1 if method == "base" else len(self.tasks))

    def matrix(self, method: str, kind: str = "scores") -> list[list[float | None]]:
        """Score of task i (row) after stage t (column); None where it was not measured."""
        stages: list[Mapping[str, Any]] = [cell.get(kind, {}) for cell in self.cells[method]]
        stages += [{}] * (len(self.tasks) - len(stages))
        return [[stage[task]["score"] if task in stage else None for stage in stages] for task in self.tasks]

    def numbers(self, method: str) -> dict[str, float]:
        """The columns of a method (or `oracle`) whose last stage is there, but for the fraction of joint."""
        kind, method = ("oracle", "ours") if method == "oracle" else ("scores", method)
        matrix, last = self.matrix(method, kind), self.cells[method][-1]
        end = [last[kind][task]["score"] for task in self.tasks]
        found = {"average": mean(end)}
        if METHODS[method].sequential:
            own = [matrix[i][i] for i in range(len(self.tasks))]
            found["backward"] = mean(b - a for a, b in zip(own[:-1], end[:-1], strict=True) if a is not None)
            if self.complete("base") and kind == "scores":
                base = [self.cells["base"][0]["scores"][task]["score"] for task in self.tasks]
                before = [(matrix[i][i - 1], base[i]) for i in range(1, len(self.tasks))]
                found["forward"] = mean(a - b for a, b in before if a is not None)
        if method == "ours" and kind == "scores":
            scores, oracle = last["scores"], last["oracle"]
            rows = {task: len(scores[task]["each"]) for task in self.tasks}
            right = [scores[task]["chosen"].get(task, 0) / rows[task] for task in self.tasks]
            found["routed right"] = 100 * mean(right)
            found["harm"] = mean(scores[task]["loss"] - oracle[task]["loss"] for task in self.tasks)
            asked = [cell["novelty"] for cell in self.cells["ours"] if cell["novelty"] is not None]
            if asked:
                found["novelty"] = mean(auroc(one["known"]["score"], one["new"]["score"]) for one in asked)
                alarms = [answer == "new" for one in asked for answer in one["known"]["answer"]]
                found["false alarms"] = 100 * mean(alarms)
        return found


def course_name(suite: str, order: int, seed: int) -> str:
    """How the names of a course's cells begin."""
    return f"{suite}-{order}-{seed}"


def auroc(low: Sequence[float], high: Sequence[float]) -> float:
    """How often one of `high` is above one of `low`; ties count half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in high for b in low]
    return mean(pairs)


def table(folder: Path, suite: str, order: int, seeds: Sequence[int]) -> str:
    """A row per method, mean over the seeds that are complete; what was not run says so."""
    courses = [Course.read(folder, suite, order, seed) for seed in seeds]
    lines = [f"| method | seeds | {' | '.join(COLUMNS)} |", f"| --- | ---: |{' ---: |' * len(COLUMNS)}"]
    for method, title in TITLES.items():
        ran = "ours" if method == "oracle" else method
        done = [course for course in courses if course.complete(ran)]
        if not done:
            stages = max((len(course.cells[ran]) for course in courses), default=0)
            of = f"not run beyond task {stages} of {len(courses[0].tasks)}" if stages else "not run"
            lines.append(f"| {title} | 0 | {of} |{' |' * (len(COLUMNS) - 1)}")
            continue
        every = [course.numbers(method) for course in done]
        joint = [course for course in done if course.complete("joint")]
        shares = [course.numbers(method)["average"] / course.numbers("joint")["average"] for course in joint]
        shown = []
        for column in COLUMNS:
            values = shares if column == "of joint" else [numbers[column] for numbers in every if column in numbers]
            shown.append(_shown(column, mean(values)) if values else _absent(column, method))
        lines.append(f"| {title} | {len(done)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _shown(column: str, value: float) -> str:
    if column in ("of joint", "novelty", "harm"):
        return f"{value:.3f}"
    return f"{value:.1f}" if column not in ("backward", "forward") or value == 0 else f"{value:+.2f}"


def _absent(column: str, method: str) -> str:
    """What stands where there is no number: nothing where there can be none."""
    of_routing = column in ("novelty", "false alarms") and method == "ours"
    return "not run" if of_routing or column == "of joint" else ""


def figure(folder: Path, suite: str, order: int, seed: int) -> Any:
    """The forgetting matrices: task × time, one panel per method that learns in sequence; white was not measured."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    course = Course.read(folder, suite, order, seed)
    shown = [name for name in METHODS if METHODS[name].sequential and course.cells[name]]
    count = len(course.tasks)
    drawn = Figure(figsize=(1.6 + 3.6 * len(shown), 1.4 + 0.24 * count), dpi=160, layout="constrained")
    drawn.set_facecolor(LIGHT.background)
    grid = drawn.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    colours = LinearSegmentedColormap.from_list("heat", LIGHT.heat)
    names = [name.split("_")[0] for name in course.tasks]
    mesh: Any = None
    for axes, method in zip(grid, shown, strict=True):
        matrix = course.matrix(method)
        values = [[math.nan if value is None else value for value in row] for row in matrix]
        mesh = axes.pcolormesh(values, cmap=colours, vmin=0, vmax=100, edgecolor=LIGHT.background, linewidth=0.6)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    shade = [round(255 * channel) for channel in colours(value / 100)[:3]]
                    ink = max((LIGHT.text, "#ffffff"), key=lambda colour: contrast(shade, colour))
                    axes.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=6)
        axes.set_title(TITLES[method].strip("*"), loc="left", fontsize=9, fontweight="bold", color=LIGHT.text)
        axes.set_xticks([i + 0.5 for i in range(count)], names, rotation=90, fontsize=7)
        axes.set_yticks([i + 0.5 for i in range(count)], names, fontsize=7)
        axes.set_ylim(count, 0)
        axes.set_xlabel("after learning", fontsize=8, color=LIGHT.muted)
        axes.tick_params(length=0, colors=LIGHT.muted, labelcolor=LIGHT.text)
        for spine in axes.spines.values():
            spine.set_visible(False)
    grid[0].set_ylabel("score of", fontsize=8, color=LIGHT.muted)
    bar = drawn.colorbar(mesh, ax=list(grid), fraction=0.03, pad=0.01)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(length=0, labelsize=7, labelcolor=LIGHT.text)
    return drawn
