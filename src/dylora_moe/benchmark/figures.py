"""Figures of a run: time against the base, and what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dylora_moe.report import plots
from dylora_moe.report.colours import LIGHT, PALETTE, Theme, legible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from .kinds import KINDS

Row = Mapping[str, Any]


def figures(results: Mapping[str, Any], theme: Theme = LIGHT) -> dict[str, Figure]:
    """Name → figure of what the run measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = results["rows"]
    drawn = {}
    for name, title, value in (
        ("time", "Time over the bare base", lambda row: row.get("ratio")),
        ("saved", "MiB kept for the backward pass", lambda row: _size(row, "saved_bytes")),
        ("peak", "Peak MiB of one step", lambda row: _size(row, "peak_bytes")),
    ):
        values: Any = {row["key"]: value(row) for row in rows}
        if not any(values.values()):
            continue
        sizes = sorted({row["experts"] for row in rows if row["experts"]})
        draw = _over_experts if len(sizes) > 2 else _dots
        drawn[name] = draw([row for row in rows if values[row["key"]]], values, title, theme)
    return drawn


def _size(row: Row, key: str) -> list[float] | None:
    return [row[key] / 2**20] * 3 if row.get(key) else None


def _dots(rows: Sequence[Row], values: Mapping[str, Sequence[float]], title: str, theme: Theme) -> Figure:
    """A dot with its interval per variant."""
    figure = plots._figure(1.35 * plots.WIDTH, 0.8 + 0.3 * len(rows), theme)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        middle, low, high = values[row["key"]]
        family = KINDS[row["key"].partition("/")[0]].family
        colour = legible(PALETTE[0], theme) if family == "ours" else theme.muted
        axes.plot([low, high], [i, i], color=colour, linewidth=2.5, alpha=0.5, solid_capstyle="butt")
        axes.plot([middle], [i], "o", color=colour, markersize=6)
        axes.annotate(f"{middle:.3g}", (high, i), (7, 0), textcoords="offset points", va="center", color=theme.text)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _scale(axes.set_xscale, axes.set_xlim, [values[row["key"]][2] for row in rows])
    plots._style(axes, theme)
    plots._titles([title], [axes], theme)
    return figure


def _scale(set_scale: Any, set_limits: Any, highest: Sequence[float]) -> None:
    if max(highest) > 8 * min(highest):
        set_scale("log")
        set_limits(0.8 * min(highest), 1.6 * max(highest))
    else:
        set_limits(0, 1.15 * max(highest))


def _over_experts(rows: Sequence[Row], values: Mapping[str, Sequence[float]], title: str, theme: Theme) -> Figure:
    """A curve with its interval per kind that grows with E; the others are level lines."""
    figure = plots._figure(plots.WIDTH, 3.6, theme)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(row["key"].partition("/")[0] for row in rows))
    for i, kind in enumerate(kinds):
        mine = [row for row in rows if row["key"].partition("/")[0] == kind]
        label = mine[0]["title"].partition(", E=")[0].partition(" r=")[0] if mine[0]["experts"] else mine[0]["title"]
        if kind == "peft-wide":
            label = "PEFT, one adapter r·E"
        colour = legible(PALETTE[i % len(PALETTE)], theme)
        if mine[0]["experts"] is None:
            axes.axhline(values[kind][0], color=theme.muted, linestyle=plots.STYLES[i % 4], linewidth=1.2, label=label)
            continue
        across = [row["experts"] for row in mine]
        middle, low, high = zip(*(values[row["key"]] for row in mine), strict=True)
        marker = plots.MARKERS[i % len(plots.MARKERS)]
        axes.plot(across, middle, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)
        axes.fill_between(across, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    sizes = sorted({row["experts"] for row in rows if row["experts"]})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("experts E")
    _scale(axes.set_yscale, axes.set_ylim, [values[row["key"]][2] for row in rows])
    plots._style(axes, theme)
    plots._legend(axes, theme, True)
    plots._titles([title], [axes], theme)
    return figure
