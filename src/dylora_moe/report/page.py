"""The report of a run: one page and its figures, from the files the job wrote."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from dylora_moe.checkpoint.files import write_file
from dylora_moe.training.run.results import COLUMNS

from . import plots
from .colours import DARK, LIGHT, legible
from .figures import FIGURES, pictures
from .finished import Run, read_run

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"
TEMPLATE = "page.html.jinja"
MINUS = "−"


def write_report(folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into a run's folder, from the files in it.

    Args:
        folder: where `results.json` lies; `history.json`, `recipe.yaml` and `environment.json` beside it are shown if
            they are there, and the page says so if not.

    Returns:
        the page's path. The page holds its figures, in a light and a dark form, and needs no other file.

    Raises:
        ValueError: `results.json` is missing or no JSON object.
        ImportError: matplotlib or jinja2 is not installed.
    """
    folder = Path(folder)
    run = read_run(folder)
    shown: dict[str, list[dict[str, Any]]] = {}
    files = {}
    for picture in pictures(run):
        files[picture.name] = plots.png(picture.draw(LIGHT))
        sources = {"light": _data_uri(files[picture.name]), "dark": _data_uri(plots.png(picture.draw(DARK)))}
        narrow = {}
        if picture.narrow is not None:
            drawn = {"light": picture.narrow(LIGHT), "dark": picture.narrow(DARK)}
            narrow = {theme: _data_uri(plots.png(figure)) for theme, figure in drawn.items()}
        words = {"name": picture.name, "caption": picture.caption, "alt": picture.alt, "wide": picture.wide}
        shown.setdefault(picture.section, []).append({**words, **sources, "narrow": narrow})
    page = _render(run, shown)
    (folder / FIGURES_FOLDER).mkdir(exist_ok=True)
    for name in FIGURES:
        file = folder / FIGURES_FOLDER / f"{name}.png"
        if name in files:
            write_file(file, files[name])
        else:
            file.unlink(missing_ok=True)  # of an earlier report, and no longer true
    write_file(folder / REPORT_FILE, page.encode())
    return folder / REPORT_FILE


# ---------------------------------------------------------------------- the page


def _render(run: Run, shown: Mapping[str, list[dict[str, Any]]]) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("The report needs jinja2: pip install 'dylora-moe[plot]'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files("dylora_moe.report") / TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        run=run,
        facts=_facts(run),
        titles=[COLUMNS[key] for key in run.columns],
        table=_results_table(run),
        load=[(domain, [_percent(row.get(name, 0.0)) for name in run.outputs]) for domain, row in run.load.items()],
        routing=_routing_table(run),
        uniform=f"{math.log(max(len(run.outputs), 1)):.3f}",
        parameters=_parameter_table(run),
        phases=_phase_table(run),
        total=_duration(float(run.results.get("seconds") or 0)),
        versions=dict(run.environment.get("versions") or {}),
        facts_of_machine={key: value for key, value in run.environment.items() if key != "versions"},
        figures=shown,
        swatches={n: (legible(c, LIGHT), legible(c, DARK)) for n, c in run.colours.items()},
        themes={"light": LIGHT, "dark": DARK},
    )


def _results_table(run: Run) -> list[dict[str, Any]]:
    """A row per domain and one for the mean over the domains that every column has."""
    rows = {domain: {key: column.get(domain) for key, column in run.columns.items()} for domain in run.domains}
    whole = [row for row in rows.values() if None not in row.values()]
    if len(run.domains) > 1 and whole:
        name = "mean" if len(whole) == len(rows) else f"mean of {len(whole)} domains"
        rows[name] = {key: sum(row[key] for row in whole) / len(whole) for key in run.columns}
    table = []
    for i, (name, row) in enumerate(rows.items()):
        known = [value for value in row.values() if value is not None]
        best = (max if run.metric.higher_is_better else min)(known) if len(known) > 1 else None
        cells = [
            {
                "value": _value(run, value),
                "best": value == best,
                "interval": _interval(run, key, name),
                **_change(run, value, row.get("base"), key),
            }
            for key, value in row.items()
        ]
        rows_of = run.results.get("rows") or {}
        counted = "" if i >= len(run.domains) else str(rows_of.get(name, ""))
        table.append(
            {
                "name": name,
                "rows": counted,
                "cells": cells,
                "mean": i >= len(run.domains),
                "colour": run.colours.get(name),
            }
        )
    return table


def _interval(run: Run, key: str, domain: str) -> str:
    """The 95 % bootstrap interval of a value; runs of before have none."""
    bounds = ((run.results.get("intervals") or {}).get(key) or {}).get(domain)
    if not bounds:
        return ""
    low, high = bounds
    return f"{low:.0%} – {high:.0%}" if run.metric.is_share else f"{low:.2f} – {high:.2f}"


def _change(run: Run, value: float | None, base: float | None, key: str) -> dict[str, str]:
    """The signed change against the base, and whether it is for the better."""
    if value is None or base is None or key == "base":
        return {"change": "", "verdict": ""}
    digits, scale = (1, 100) if run.metric.is_share else (3, 1)
    change = round((value - base) * scale, digits)
    if math.isnan(change) or change == 0:
        return {"change": "" if math.isnan(change) else f"±{0:.{digits}f}", "verdict": "same"}
    text = f"{change:+.{digits}f}".replace("-", MINUS)
    return {"change": text, "verdict": "better" if (change > 0) == run.metric.higher_is_better else "worse"}


def _facts(run: Run) -> list[tuple[str, str]]:
    """The numbers at the head of the page."""
    facts = []
    for row in _results_table(run)[-1:]:
        which = ", mean" if row["mean"] else ""
        for key, cell in zip(run.columns, row["cells"], strict=True):
            if key in ("base", "top2" if "top2" in run.columns else "mixture"):
                facts.append((f"{COLUMNS[key]}: {run.metric.title}{which}", cell["value"]))
    if run.experts:
        facts.append(("experts", str(len(run.experts))))
    if run.results.get("passes_per_step"):
        facts.append(("passes of the base per step", f"{run.results['passes_per_step']:.2f}"))
    if run.results.get("seconds"):
        facts.append(("wall time", _duration(float(run.results["seconds"]))))
    return facts


def _routing_table(run: Run) -> list[tuple[str, str, str, str]]:
    rows = []
    for domain in dict.fromkeys([*run.load, *run.routing]):
        load, routing = run.load.get(domain) or {}, run.routing.get(domain) or {}
        strongest = max(load, key=load.__getitem__) if load else None
        top = "–" if strongest is None else f"{strongest} ({_percent(load[strongest])})"
        entropy, largest = (_number(routing.get(key)) for key in ("entropy", "max_probability"))
        rows.append((domain, top, entropy, largest))
    return rows


def _parameter_table(run: Run) -> list[tuple[str, str, str]]:
    """A row per part: name, count, share of the base."""
    counts = {str(name): int(count) for name, count in (run.results.get("parameters") or {}).items()}
    base = counts.get("base", 0)
    added = {name: count for name, count in counts.items() if name != "base"}
    if added:
        added["added in all"] = sum(added.values())
    rows = {**added, "base": base} if base else added
    return [(name, f"{count:,}", f"{count / base:.2%}" if base else "–") for name, count in rows.items()]


def _phase_table(run: Run) -> list[tuple[str, str, float]]:
    """A row per phase: name, duration, share of the whole in percent."""
    phases = {str(name): float(seconds) for name, seconds in (run.results.get("phases") or {}).items()}
    whole = sum(phases.values()) or 1.0
    return [(name, _duration(seconds), round(100 * seconds / whole, 1)) for name, seconds in phases.items()]


# ---------------------------------------------------------------------- words and bytes


def _value(run: Run, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return _percent(value) if run.metric.is_share else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
