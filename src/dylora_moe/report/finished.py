"""What the files of a run hold, read back for its report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dylora_moe.checkpoint.files import CheckpointError, read_json
from dylora_moe.evaluation.metrics import DEFAULT_METRIC, METRICS, Metric
from dylora_moe.training.run.folder import ENVIRONMENT_FILE, HISTORY_FILE, RECIPE_FILE, RESULTS_FILE
from dylora_moe.training.run.results import COLUMNS

from .colours import BASE, expert_colours
from .plots import Span

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
        self.columns = {key: self.results[key] for key in COLUMNS if self.results.get(key)}
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
    def metric(self) -> Metric:
        """What was measured."""
        return METRICS[self.results.get("metric", DEFAULT_METRIC)]


def read_run(folder: Path) -> Run:
    """What the files of a run hold; only `results.json` must be there."""
    if not (folder / RESULTS_FILE).is_file():
        raise ValueError(
            f"{folder / RESULTS_FILE} is missing; give the output folder of a finished run, where `dylora-moe train` "
            "writes it."
        )
    results = read_json(folder / RESULTS_FILE)
    _check_shape(results, folder / RESULTS_FILE)
    missing: dict[str, str] = {}
    history = _optional(folder / HISTORY_FILE, list, missing)
    return Run(
        folder.resolve().name,
        results,
        [row for row in history if isinstance(row, dict) and _is_number(row.get("step", 0))],
        _optional(folder / RECIPE_FILE, str, missing),
        _environment(folder / ENVIRONMENT_FILE, missing),
        missing,
    )


def _check_shape(results: Mapping[str, Any], file: Path) -> None:
    """Raise a `CheckpointError` for the first part of `results.json` that is not what the job writes."""
    if (metric := results.get("metric", DEFAULT_METRIC)) not in [*METRICS]:
        raise CheckpointError(f"{file}: unknown metric {metric!r}; known are {', '.join(METRICS)}.")
    flat = {key: results.get(key) for key in (*COLUMNS, "rows", "parameters", "phases")}
    for part in ("load", "routing"):
        rows = results.get(part) or {}
        if not isinstance(rows, dict):
            raise CheckpointError(f"{file}: {part!r} holds {rows!r}; expected a mapping of domains.")
        flat |= {f"{part}/{domain}": row for domain, row in rows.items()}
    for name, numbers in flat.items():
        known = {} if numbers is None else numbers
        if not isinstance(known, dict):
            raise CheckpointError(f"{file}: {name!r} holds {numbers!r}; expected a mapping of numbers.")
        for key, value in known.items():
            may_be_missing = value is None and name in COLUMNS
            nested = key == "coactivation" and isinstance(value, dict)
            if not (_is_number(value) or may_be_missing or nested):
                raise CheckpointError(f"{file}: {name!r} holds {value!r} at {key!r}; expected a number.")
    intervals = results.get("intervals") or {}
    for column, bounds in intervals.items() if isinstance(intervals, dict) else [("", intervals)]:
        for domain, pair in bounds.items() if isinstance(bounds, dict) else [("", bounds)]:
            if not (isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))):
                raise CheckpointError(
                    f"{file}: 'intervals/{column}' holds {pair!r} at {domain!r}; expected two numbers."
                )
    for key in ("seconds", "passes_per_step"):
        if not _is_number(results.get(key) or 0):
            raise CheckpointError(f"{file}: {key!r} holds {results[key]!r}; expected a number.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _environment(file: Path, missing: dict[str, str]) -> dict[str, Any]:
    environment = _optional(file, dict, missing)
    if not isinstance(environment.get("versions", {}), dict):
        missing[file.name] = f"{file.name} holds no mapping of versions."
        return {}
    return environment


def _optional(file: Path, kind: type, missing: dict[str, str]) -> Any:
    """The content of `file`; empty, with the reason in `missing`, if there is none to be had."""
    try:
        text = file.read_text(encoding="utf-8")
        content = text if kind is str else json.loads(text)
    except FileNotFoundError:
        missing[file.name] = f"There is no {file.name} in the run's folder."
    except (OSError, ValueError, RecursionError) as error:
        missing[file.name] = f"{file.name} cannot be read: {error}"
    else:
        if isinstance(content, kind) and content:
            return content
        missing[file.name] = f"{file.name} is empty." if not content else f"{file.name} holds no {kind.__name__}."
    return kind()


def step_axis(history: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Span]]:
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
        stages.append(Span(name, start, end))
        start = end
    return rows, stages


def series(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The steps and the values of `key`, over the rows that have a number there."""
    pairs = [(row["at"], float(row[key])) for row in rows if isinstance(row.get(key), int | float)]
    return [at for at, _ in pairs], [value for _, value in pairs]
