"""What the files of a run hold, read back for its report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dylora_moe.colours import BASE, expert_colours
from dylora_moe.display import TITLES
from dylora_moe.files import read_json
from dylora_moe.plots import Stage

from .run_folder import ENVIRONMENT_FILE, HISTORY_FILE, RECIPE_FILE, RESULTS_FILE

LOAD = "router/load/"


@dataclass
class Run:
    """What a run's files hold.

    Attributes:
        name: the folder's.
        results: `results.json`.
        history: the rows of `history.json`.
        recipe: the text of `recipe.yaml`.
        environment: `environment.json`.
        missing: file → why there is nothing from it.
    """

    name: str
    results: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]] = ()
    recipe: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.rows, self.stages = step_axis(self.history)
        self.columns = {key: self.results[key] for key in TITLES if self.results.get(key)}
        self.domains = list(dict.fromkeys(domain for column in self.columns.values() for domain in column))
        self.load: Mapping[str, Mapping[str, float]] = self.results.get("load") or {}
        self.routing: Mapping[str, Mapping[str, Any]] = self.results.get("routing") or {}
        names = [name for name in self.results.get("parameters") or {} if name not in ("router", BASE)]
        names += [name for row in self.load.values() for name in row]
        names += [key.removeprefix(LOAD) for row in self.rows for key in row if key.startswith(LOAD)]
        self.experts = [name for name in dict.fromkeys(names) if name != BASE]
        self.outputs = [*self.experts, BASE] if BASE in names else self.experts
        self.colours = expert_colours([*self.experts, *self.domains])

    @property
    def shares(self) -> bool:
        """Whether results are shares (higher is better) and not losses (lower is better)."""
        return self.results.get("metric", "exact_match") == "exact_match"


def read_run(folder: Path) -> Run:
    """What the files of a run hold; only `results.json` must be there."""
    if not (folder / RESULTS_FILE).is_file():
        raise ValueError(
            f"{folder / RESULTS_FILE} is missing; give the output folder of a finished run, where `dylora-moe train` "
            "writes it."
        )
    missing: dict[str, str] = {}
    history = _optional(folder / HISTORY_FILE, list, missing)
    return Run(
        folder.resolve().name,
        read_json(folder / RESULTS_FILE),
        [row for row in history if isinstance(row, dict)],
        _optional(folder / RECIPE_FILE, str, missing),
        _optional(folder / ENVIRONMENT_FILE, dict, missing),
        missing,
    )


def _optional(file: Path, kind: type, missing: dict[str, str]) -> Any:
    """The content of `file`; empty, with the reason in `missing`, if there is none to be had."""
    try:
        text = file.read_text(encoding="utf-8")
        content = text if kind is str else json.loads(text)
    except FileNotFoundError:
        missing[file.name] = f"There is no {file.name} in the run's folder."
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        missing[file.name] = f"{file.name} cannot be read: {error}"
    else:
        if isinstance(content, kind) and content:
            return content
        missing[file.name] = f"{file.name} is empty." if not content else f"{file.name} holds no {kind.__name__}."
    return kind()


def step_axis(history: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Stage]]:
    """The rows of a history in the order of their stages, each with its place `at` on one step axis; and the stages.

    Args:
        history: rows with `stage` and `step` (counted within the stage), in the order in which they were logged.
    """
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for row in history:
        by_stage.setdefault(str(row.get("stage", "")), []).append(row)
    rows, stages, start = [], [], 0.0
    for name, members in by_stage.items():
        rows += [{**row, "at": start + float(row.get("step", 0))} for row in members]
        end = max(row["at"] for row in rows[-len(members) :])
        stages.append(Stage(name, start, end))
        start = end
    return rows, stages


def series(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The steps and the values of `key`, over the rows that have a number there."""
    pairs = [(row["at"], float(row[key])) for row in rows if isinstance(row.get(key), int | float)]
    return [at for at, _ in pairs], [value for _, value in pairs]
