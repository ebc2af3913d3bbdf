"""Figures of a run: from plain data to matplotlib figures, without pyplot or any global state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

from .colours import LIGHT, PALETTE, Theme, contrast, legible
from .labels import labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES_LIMIT = 10  # more lines than these cannot be told apart: a heat map over the steps instead
COLUMNS_LIMIT = 32  # of a heat map of normal width
PANELS_LIMIT = 12  # experts up to which co-activation is shown per domain
WIDTH = 5.8  # inches; a figure fills half a desktop page or a narrow screen
DPI = 160
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Span:
    """A stage of training on the common step axis: it covers the steps from `start` to `end`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Panel:
    """One pair of axes of a figure of curves.

    Args:
        title: what is shown and its unit.
        lines: label → (steps, values).
        colours: label → colour; the others take the palette's in turn.
        reference: label and height of a dashed line to compare with.
        limits: of the values; from the data where None.
    """

    title: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    colours: Mapping[str, str] = field(default_factory=dict)
    reference: tuple[str, float] | None = None
    limits: tuple[float | None, float | None] | None = None


# ---------------------------------------------------------------------- figures


def curves(panels: Sequence[Panel], stages: Sequence[Span], theme: Theme = LIGHT) -> Figure:
    """Panels of curves one below the other over one step axis, with a thin line where a stage begins."""
    heights = [2.6 if i == 0 else 1.7 for i in range(len(panels))]
    legends = [len(panel.lines) + bool(panel.reference) > 1 for panel in panels]
    entries = max((len(panel.lines) for panel in panels), default=0)
    figure = _figure(WIDTH, sum(heights) + 0.5 + 0.12 * entries, theme)
    grid = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights).flat)
    for panel, axes, legend in zip(panels, grid, legends, strict=True):
        _draw(panel, axes, stages, theme)
        if legend:
            lift = 14 if axes is grid[0] and len(stages) > 1 else 0
            _legend(axes, theme, not _beside(panel), lift)
    _mark_stages(grid, stages, theme)
    _titles([panel.title for panel in panels], grid, theme, len(stages) > 1)
    grid[-1].set_xlabel("optimizer step")
    return figure


def over_time(panel: Panel, stages: Sequence[Span], theme: Theme = LIGHT) -> Figure:
    """One curve per label of `panel`, or, with more than ten of them, a heat map of label × step."""
    if len(panel.lines) <= LINES_LIMIT:
        return curves([panel], stages, theme)
    steps = sorted({at for steps, _ in panel.lines.values() for at in steps})
    values = []
    for at_steps, numbers in panel.lines.values():
        known = dict(zip(at_steps, numbers, strict=True))
        values.append([known.get(at, math.nan) for at in steps])
    names = list(panel.lines)
    figure = _figure(WIDTH, 1.2 + 0.17 * len(names), theme)
    axes = figure.subplots()
    start = stages[0].start if stages else 0.0
    edges = [min(start, steps[0]), *steps]
    mesh = axes.pcolormesh(edges, range(len(names) + 1), values, cmap=_colour_map(theme), vmin=0)
    axes.set_yticks([i + 0.5 for i in range(len(names))], list(labels(names).values()), fontsize=7)
    axes.invert_yaxis()
    _style(axes, theme, grid=False)
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_color(legible(panel.colours.get(name, theme.text), theme, 4.5))
    _colour_bar(figure, mesh, axes, theme, percent=False)
    _mark_stages([axes], stages, theme)
    _titles([panel.title], [axes], theme, len(stages) > 1)
    axes.set_xlabel("optimizer step")
    return figure


def heat_map(table: Mapping[str, Mapping[str, float]], columns: Sequence[str], title: str, theme: Theme = LIGHT):
    """A table of shares as colours; the longer side stands upright, and few cells show their percentage.

    Args:
        table: row → column → share between 0 and 1; what is not there is zero.
        columns: the columns in order.
        title: what is shown.
        theme: the page's colours.
    """
    rows = list(table)
    values = [[float(table[row].get(column, 0.0)) for column in columns] for row in rows]
    across = list(columns)
    if len(across) > len(rows):
        rows, across, values = across, rows, [list(column) for column in zip(*values, strict=True)]
    width = WIDTH * (1 + (len(across) > COLUMNS_LIMIT))
    figure = _figure(width, 1.1 + _room(across, width) + len(rows) * (0.42 if len(rows) <= 8 else 0.2), theme)
    axes = figure.subplots()
    top = max((max(row) for row in values), default=0.0)
    mesh = _cells(axes, values, rows, across, theme, 1.0 if top > 0.5 else max(top, 1e-9), width)
    _colour_bar(figure, mesh, axes, theme)
    _titles([title], [axes], theme)
    return figure


def coactivation(
    tables: Mapping[str, Mapping[str, Mapping[str, float]]],
    experts: Sequence[str],
    theme: Theme = LIGHT,
    beside: int = 2,
) -> Figure:
    """How often two experts have weight on the same token; the diagonal is how often one has.

    One heat map per domain up to twelve experts and six domains, else their mean over the domains.

    Args:
        tables: domain → expert → expert → share of the tokens.
        experts: the experts in order.
        theme: the page's colours.
        beside: at most so many heat maps beside each other; 1 for a narrow screen.
    """
    if len(experts) > PANELS_LIMIT or len(tables) > 6:
        tables = {f"mean of {len(tables)} domains": _mean(list(tables.values()), experts)}
    across = min(beside, len(tables))
    down = -(-len(tables) // across)
    width = WIDTH * (1 + (across > 1 or len(experts) > COLUMNS_LIMIT))
    side = (width - 1.0) / across
    names = _room(experts, side) + 0.45
    height = len(experts) * (0.42 if len(experts) <= 5 else 0.3 if len(experts) <= PANELS_LIMIT else 0.2)
    figure = _figure(width, 0.4 + down * (height + names), theme)
    grid = figure.subplots(down, across, squeeze=False)
    mesh, titles = None, labels(tables)
    top = max(float(share) for table in tables.values() for row in table.values() for share in row.values())
    for axes in grid.flat[len(tables) :]:
        axes.set_axis_off()
    for axes, (domain, table) in zip(grid.flat, tables.items(), strict=False):
        values = [[float(table.get(a, {}).get(b, 0.0)) for b in experts] for a in experts]
        mesh = _cells(axes, values, experts, experts, theme, 1.0 if top > 0.5 else max(top, 1e-9), side)
        _titles([f"Co-activation (%): {titles[domain]}"], [axes], theme)
    _colour_bar(figure, mesh, list(grid.flat), theme)
    return figure


def results(columns: Mapping[str, Mapping[str, float]], unit: str, title: str, theme: Theme = LIGHT) -> Figure:
    """A dot per column for every domain, on a line from the smallest to the largest value.

    Args:
        columns: title → domain → value; the first is the base, drawn hollow.
        unit: of the values; `%` for shares, which are shown a hundredfold.
        title: what is measured.
        theme: the page's colours.
    """
    domains = list(next(iter(columns.values())))
    figure = _figure(WIDTH, 1.3 + 0.36 * len(domains), theme)
    axes = figure.subplots()
    percent = unit == "%"
    scale = 100.0 if percent else 1.0
    for i, domain in enumerate(domains):
        values = [scale * column[domain] for column in columns.values() if column.get(domain) is not None]
        if values:
            axes.plot([min(values), max(values)], [i, i], color=theme.grid, linewidth=3, zorder=1)
    for j, (name, column) in enumerate(columns.items()):
        known = [(scale * column[d], i) for i, d in enumerate(domains) if column.get(d) is not None]
        colour = theme.muted if j == 0 else legible(PALETTE[(j - 1) % len(PALETTE)], theme)
        axes.plot(
            *zip(*known, strict=True),
            MARKERS[j % len(MARKERS)],
            label=name,
            color=colour,
            markerfacecolor=theme.background if j == 0 else colour,
            markeredgewidth=1.5,
            markersize=8 - 0.7 * j,  # later ones lie on top, and what is below shows around them
            clip_on=False,
            zorder=2 + j,
        ) if known else None
    axes.set_yticks(range(len(domains)), list(labels(domains).values()))
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.set_xlim(*((-3, 103) if percent else (0, None)))
    _style(axes, theme)
    axes.set_xlabel(unit)
    _legend(axes, theme, True)
    _titles([title], [axes], theme)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG with a palette of 256 colours, a third of the size of one without."""
    from PIL import Image

    drawn, packed = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return packed.getvalue()


# ---------------------------------------------------------------------- parts


def _figure(width: float, height: float, theme: Theme) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'dylora-moe[plot]'") from error
    return Figure(figsize=(width, height), facecolor=theme.background, layout="constrained")


def _colour_map(theme: Theme) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", theme.heat)


def _mean(tables: Sequence[Mapping[str, Mapping[str, float]]], experts: Sequence[str]) -> dict[str, dict[str, float]]:
    return {
        a: {b: sum(float(table.get(a, {}).get(b, 0.0)) for table in tables) / len(tables) for b in experts}
        for a in experts
    }


def _draw(panel: Panel, axes: Axes, stages: Sequence[Span], theme: Theme) -> None:
    gaps = [(stage.start, math.nan) for stage in stages[1:]]  # no line leads from one stage to the next
    short = labels(panel.lines)
    finite = [v for _, values in panel.lines.values() for v in values if math.isfinite(v)]
    for i, (label, (steps, values)) in enumerate(panel.lines.items()):
        axes.plot(
            *zip(*sorted([*zip(steps, values, strict=True), *gaps], key=lambda point: point[0]), strict=True),
            STYLES[i // len(PALETTE) % len(STYLES)],
            color=legible(panel.colours.get(label, PALETTE[i % len(PALETTE)]), theme),
            label=short[label],
            linewidth=1.6,
            marker=MARKERS[i % len(MARKERS)] if len(steps) <= min(30 * len(stages), 90) else None,
            markersize=3.5,
        )
    if panel.reference is not None:
        label, height = panel.reference
        axes.axhline(height, color=theme.muted, linestyle=(0, (1, 2)), linewidth=1.4, label=label)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
        if panel.limits[1] is None and max(finite, default=0.0) == 0:
            axes.set_ylim(panel.limits[0], 1)
        low, high = axes.get_ylim()
        room = 0.04 * (high - low)  # so that no line lies on the frame
        axes.set_ylim(low - room, high + room * (panel.limits[1] is None))
    elif finite and min(finite) > 0 and max(finite) > 50 * min(finite):
        axes.set_yscale("log")
    _style(axes, theme)


def _style(axes: Axes, theme: Theme, grid: bool = True) -> None:
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.muted, labelcolor=theme.text, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.muted)
    for name, spine in axes.spines.items():
        spine.set_visible(grid and name in ("bottom", "left"))
        spine.set_color(theme.grid)
    if grid:
        axes.grid(color=theme.grid, linewidth=0.7)
        axes.set_axisbelow(True)


def _legend(axes: Axes, theme: Theme, below: bool, lift: float = 0.0) -> None:
    """A legend on the line of the title, or below the figure; never over the data."""
    style: dict[str, Any] = {"fontsize": 9, "labelcolor": theme.text, "frameon": False, "handlelength": 1.6}
    handles, names = axes.get_legend_handles_labels()
    if below:
        columns = max(1, min(len(names), int(WIDTH / (0.085 * max(map(len, names)) + 0.55))))
        figure: Any = axes.figure
        figure.legend(handles, names, loc="outside lower center", ncols=columns, **style)
    else:
        style |= {"borderaxespad": lift / 9, "columnspacing": 1.2, "borderpad": 0.3}
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names), **style)


def _beside(panel: Panel) -> bool:
    """Whether the legend fits on the line of the title."""
    entries = [*labels(panel.lines).values(), *([panel.reference[0]] if panel.reference else [])]
    return 0.1 * len(panel.title) + sum(0.075 * len(entry) + 0.45 for entry in entries) < WIDTH - 0.8


def _titles(titles: Sequence[str], grid: Iterable[Axes], theme: Theme, staged: bool = False) -> None:
    for i, (title, axes) in enumerate(zip(titles, grid, strict=False)):
        pad = 20 if staged and i == 0 else 8
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=theme.text, pad=pad)


def _mark_stages(grid: Sequence[Axes], stages: Sequence[Span], theme: Theme) -> None:
    if not stages:
        return
    total = stages[-1].end - stages[0].start
    for axes in grid:
        axes.set_xlim(stages[0].start - 0.01 * total, stages[-1].end + 0.02 * total + (total == 0))
        axes.locator_params(axis="x", integer=True)
        for stage in stages[1:]:
            axes.axvline(stage.start, color=theme.muted, linewidth=0.8, alpha=0.7)
    for stage in stages if len(stages) > 1 else ():
        fits = int((stage.end - stage.start) / max(total, 1e-9) * (WIDTH - 1.2) / 0.07)  # letters of 8 points
        if fits >= min(3, len(stage.name)):
            name = stage.name if len(stage.name) <= fits else f"{stage.name[: max(fits - 1, 1)]}…"
            place = ((stage.start + stage.end) / 2, 1.0)
            options: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8, "color": theme.muted}
            grid[0].annotate(
                labels([name])[name],
                place,
                (0, 4),
                grid[0].get_xaxis_transform(),
                textcoords="offset points",
                **options,
            )


def _room(columns: Sequence[str], width: float) -> float:
    """Inches below a heat map for the names of its columns."""
    longest = max(map(len, labels(columns).values()), default=1)
    return 0.25 if _level(columns, width) else 0.15 + 0.075 * longest


def _level(columns: Sequence[str], width: float) -> bool:
    """Whether the names of columns fit beside each other."""
    return sum(len(name) + 2 for name in labels(columns).values()) * 0.085 < 0.62 * width


def _cells(
    axes: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    theme: Theme,
    top: float,
    width: float,
) -> Any:
    mesh = axes.pcolormesh(values, cmap=_colour_map(theme), vmin=0, vmax=top, edgecolor=theme.background)
    mesh.set_linewidth(0.8 if len(rows) <= 20 else 0.3)
    size = 9 if len(rows) <= 20 else 7
    level = _level(columns, width)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], list(labels(rows).values()), fontsize=size)
    axes.set_xticks([i + 0.5 for i in range(len(columns))], list(labels(columns).values()))
    axes.tick_params(axis="x", labelrotation=0 if level else 90, labelsize=9 if len(columns) <= 20 else 7)
    axes.invert_yaxis()
    _style(axes, theme, grid=False)
    if len(columns) <= 10 and len(rows) <= 40:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                shade = mesh.cmap(min(value / top, 1.0))[:3]
                channels = [round(255 * c) for c in shade]
                ink = max((LIGHT.text, "#ffffff"), key=lambda colour: contrast(channels, colour))
                axes.text(j + 0.5, i + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=size)
    return mesh


def _colour_bar(figure: Figure, mesh: Any, axes: Any, theme: Theme, percent: bool = True) -> None:
    bar = figure.colorbar(
        mesh, ax=axes, fraction=0.04, pad=0.02, aspect=30, shrink=min(1.0, 5 / figure.get_figheight())
    )
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(colors=theme.muted, labelcolor=theme.text, length=0, labelsize=8)
    if percent:
        from matplotlib.ticker import PercentFormatter

        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
