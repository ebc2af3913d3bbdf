"""The results page of a machine and a day: a folder that runs are added to.

results/<date>-<machine>/<run>.json    what was measured
results/<date>-<machine>/<run>-*.png   its figures
results/<date>-<machine>/causes.md     written by people: why a figure is missed, `## <name of the figure>` and text
results/<date>-<machine>/README.md     the page, made from the above
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dylora_moe.report import plots

from .columns import cells
from .figures import figures
from .machine import slug
from .run import FORMAT_VERSION
from .settings import Settings
from .targets import PLANS, TARGETS, Outcome, outcome

PAGE, CAUSES = "README.md", "causes.md"


def folder_for(results: Mapping[str, Any], parent: Path, today: datetime.date) -> Path:
    """The folder of a machine and a day; it names neither host nor user."""
    return parent / f"{today.isoformat()}-{slug(results['machine']['name'])}"


def add_run(results: Mapping[str, Any], folder: Path) -> Path:
    """Write a run into `folder`, an earlier one with the same settings is replaced; and the page again."""
    folder.mkdir(parents=True, exist_ok=True)
    name = Settings.from_dict(results["settings"]).name
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return write_page(folder)


def write_page(folder: Path) -> Path:
    """Make the page and its figures from the runs in `folder`.

    Raises:
        ValueError: the folder holds no run, or a file that is none.
    """
    runs = {file.stem: read_run(file) for file in sorted(folder.glob("*.json"))}
    if not runs:
        raise ValueError(f"{folder} holds no results of `dylora-moe bench` (*.json).")
    order = {plan: i for i, plan in enumerate(PLANS)}
    runs = dict(sorted(runs.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
    machines = list({run["machine"]["name"]: run["machine"] for run in runs.values()}.values())
    lines = [f"# Measured on {', '.join(machine['name'] for machine in machines)}", "", *_facts(machines), ""]
    lines += _acceptance(runs, read_causes(folder / CAUSES))
    for name, run in runs.items():
        lines += _section(name, run, folder)
    file = folder / PAGE
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def read_run(file: Path) -> dict[str, Any]:
    """One run as it was written."""
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        if run["format_version"] != FORMAT_VERSION:
            raise ValueError(f"{file}: format {run['format_version']}; this version reads {FORMAT_VERSION}.")
        Settings.from_dict(run["settings"])
        _ = [run[key] for key in ("command", "seconds", "missing")], run["machine"]["name"], run["machine"]["versions"]
        _ = [(row["key"], row["title"], row.get("seconds", [0.0])[0]) for row in run["rows"]], run["rows"][0]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} is not a result of `dylora-moe bench`: {error}") from error
    return run


def read_causes(file: Path) -> dict[str, str]:
    """Name of a figure → why it is missed."""
    if not file.is_file():
        return {}
    parts = re.split(r"^## +(.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    causes = {name.strip(): " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    unknown = sorted(set(causes) - {target.name for target in TARGETS})
    if unknown:
        raise ValueError(f"{file}: no figure is called {unknown[0]!r}; they are {[target.name for target in TARGETS]}.")
    return causes


# ---------------------------------------------------------------------- parts


def _facts(machines: Sequence[Mapping[str, Any]]) -> list[str]:
    told = []
    for machine in machines:
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
        told.append(f"{machine['name']}: {machine['threads']} threads, Python {machine['python']}, {versions}.")
    how = (
        "Written by `dylora-moe bench`; what is measured and how is described in `docs/performance.md`. Times are "
        "medians of per-round ratios within one process, with a 95 % bootstrap interval; the bare base measured a "
        "second time is the noise floor."
    )
    return [*told, "", how]


def _acceptance(runs: Mapping[str, Mapping[str, Any]], causes: Mapping[str, str]) -> list[str]:
    lines = ["## Figures to reach", "", "| figure | wanted | measured | |", "| --- | ---: | ---: | --- |"]
    for target in TARGETS:
        bound = f"{'≥' if target.at_least else '≤'} {target.limit:g}"
        if target.plan not in runs:
            lines.append(f"| {target.name} | {bound} | | not measured: `dylora-moe bench --plan {target.plan}` |")
            continue
        result = outcome(target, runs[target.plan])
        lines.append(f"| {target.name} | {bound} | {_measured(result)} | {_verdict(result, causes)} |")
    others = (
        "Decoding with a CUDA graph (≤ 1.15) and the kernels against float64: `benchmarks/gpu.sh`, a file of its own."
    )
    return [*lines, "", others, ""]


def _measured(result: Outcome) -> str:
    if result.value is None:
        return ""
    if result.interval is None:
        return f"{result.value:.4g}"
    return f"{result.value:.3f} [{result.interval.low:.3f}, {result.interval.high:.3f}]"


def _verdict(result: Outcome, causes: Mapping[str, str]) -> str:
    if result.met is None:
        return f"not measured: {result.missing}"
    if result.met:
        within = result.interval is not None and result.interval.low < result.target.limit < result.interval.high
        return "met, but the interval crosses it" if within else "met"
    cause = causes.get(result.target.name, f"cause not yet written in {CAUSES}")
    return f"**missed by {result.gap:.1%}**: {cause}"


def _section(name: str, run: Mapping[str, Any], folder: Path) -> list[str]:
    settings = run["settings"]
    shape = f"{settings['work']}, {settings['shape']}, batch {settings['batch']}×{settings['length']}"
    timed = f"{settings['rounds']} rounds" if settings["rounds"] else "counted, not timed"
    lines = [f"## {name}", "", f"{shape}, r={settings['rank']}, {settings['dtype']}, {timed}; {run['seconds']:.0f} s."]
    lines += ["", "```", run["command"], "```", ""]
    headings, rows = cells(run)
    lines += [f"| {' | '.join(headings)} |", "| --- |" + " ---: |" * (len(headings) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines.append("")
    if run["missing"]:
        lines += ["Not run:", "", *(f"- `{key}`: {reason}" for key, reason in run["missing"].items()), ""]
    for kind, figure in figures(run).items():
        picture = folder / f"{name}-{kind}.png"
        picture.write_bytes(plots.png(figure))
        lines += [f"![{kind} of {name}]({picture.name})", ""]
    return lines
