"""Figures: what is drawn is what was given, from 1 to 64 experts, and no global state is touched."""

from __future__ import annotations

import math
import sys
from io import BytesIO

import numpy as np
import pytest
from matplotlib.colors import to_hex

from dylora_moe.report import plots
from dylora_moe.report.colours import DARK, LIGHT, expert_colours

STAGES = [plots.Span("sql", 0, 20), plots.Span("router", 20, 50)]


def panel(count: int, **options) -> plots.Panel:
    steps = [10.0, 20.0, 30.0, 40.0, 50.0]
    names = [f"expert_{i}" for i in range(count)]
    lines = {name: (steps, [i + step / 100 for step in steps]) for i, name in enumerate(names)}
    return plots.Panel("Load", lines, expert_colours(names), **options)


def texts(figure) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts outside the cells whose boxes overlap, and texts that leave the figure."""
    figure.canvas.draw() if hasattr(figure.canvas, "get_renderer") else figure.savefig(BytesIO(), format="png")
    shown = []
    for axes in figure.axes:
        shown += [axes.title, getattr(axes, "_left_title"), axes.xaxis.label]  # noqa: B009
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            if axis.get_visible() and axes.axison:
                shown += [
                    t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_visible()
                ]
        shown += axes.texts if len(axes.texts) < 8 else []
        shown += axes.get_legend().get_texts() if axes.get_legend() else []
    for legend in figure.legends:
        shown += legend.get_texts()
    boxes = [(t.get_text(), t.get_window_extent()) for t in shown if t.get_text() and t.get_visible()]
    width, height = figure.bbox.size
    found = [
        (a, "figure") for a, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]
    for i, (a, first) in enumerate(boxes):
        for b, second in boxes[i + 1 :]:
            wide = min(first.x1, second.x1) - max(first.x0, second.x0)
            high = min(first.y1, second.y1) - max(first.y0, second.y0)
            if wide > 1.5 and high > 1.5:
                found.append((a, b))
    return found


def test_curves_draw_the_values_in_the_experts_colours():
    figure = plots.curves([panel(3)], STAGES)
    lines = [line for line in figure.axes[0].lines if line.get_label().startswith("expert")]
    for i, line in enumerate(lines):
        known = ~np.isnan(line.get_ydata())
        assert list(line.get_xdata()[known]) == [10, 20, 30, 40, 50]
        np.testing.assert_allclose(line.get_ydata()[known], [i + step / 100 for step in (10, 20, 30, 40, 50)])
        assert to_hex(line.get_color()) == expert_colours(["expert_0", "expert_1", "expert_2"])[f"expert_{i}"]


def test_no_line_leads_from_one_stage_to_the_next():
    line = plots.curves([panel(1)], STAGES).axes[0].lines[0]
    gap = list(np.isnan(line.get_ydata())).index(True)
    assert list(line.get_xdata()[:gap]) == [10, 20]
    assert not np.isnan(plots.curves([panel(1)], STAGES[:1]).axes[0].lines[0].get_ydata()).any()


def test_stages_are_named_if_there_are_several():
    assert "router" in texts(plots.curves([panel(2)], STAGES))
    assert "sql" not in texts(plots.curves([panel(2)], STAGES[:1]))


def test_one_row_is_a_dot_within_the_axes():
    single = plots.Panel("Loss", {"loss": ([2.0], [0.3])})
    axes = plots.curves([single], [plots.Span("joint", 0, 2)]).axes[0]
    assert axes.lines[0].get_marker() == "o"
    assert axes.get_xlim()[0] <= 0 < 2 < axes.get_xlim()[1]


def test_many_lines_become_a_heat_map_of_the_same_values():
    given = panel(32)
    given.lines["expert_3"][1][2] = math.nan
    mesh = plots.over_time(given, STAGES).axes[0].collections[0]
    values = mesh.get_array()
    assert values.shape == (32, 5)
    np.testing.assert_allclose(values[7], [7.1, 7.2, 7.3, 7.4, 7.5])
    assert np.ma.getmaskarray(values)[3, 2] or np.isnan(values[3, 2])


def test_heat_map_writes_percentages_into_few_cells():
    load = {"dates": {"sql": 0.123, "date": 0.877}, "tables": {"sql": 1.0}}
    axes = plots.heat_map(load, ["sql", "date"], "Load").axes[0]
    assert [text.get_text() for text in axes.texts] == ["12", "88", "100", "0"]
    np.testing.assert_allclose(axes.collections[0].get_array(), [[0.123, 0.877], [1, 0]])
    many = {f"d{i}": {f"e{i}": 1.0} for i in range(40)}
    assert not plots.heat_map(many, [f"e{i}" for i in range(40)], "Load").axes[0].texts


def test_heat_map_stands_its_longer_side_upright():
    axes = plots.heat_map({"one": {"b": 0.25, "d": 0.75}}, ["a", "b", "c", "d"], "Load").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c", "d"]
    np.testing.assert_allclose(axes.collections[0].get_array(), [[0], [0.25], [0], [0.75]])


def test_coactivation_is_per_domain_for_few_experts_and_their_mean_for_many():
    tables = {"x": {"a": {"a": 1.0, "b": 0.5}}, "y": {"a": {"a": 0.5}}}
    figure = plots.coactivation(tables, ["a", "b"])
    np.testing.assert_allclose(figure.axes[0].collections[0].get_array(), [[1, 0.5], [0, 0]])
    np.testing.assert_allclose(figure.axes[1].collections[0].get_array(), [[0.5, 0], [0, 0]])
    many = plots.coactivation(tables, ["a", "b", *(f"e{i}" for i in range(20))])
    assert "mean of 2 domains" in texts(many)
    np.testing.assert_allclose(many.axes[0].collections[0].get_array()[:2, :2], [[0.75, 0.25], [0, 0]])


def test_results_place_a_dot_per_column_and_skip_what_is_not_there():
    columns = {"base": {"sql": 0.1, "date": 0.2}, "top-1": {"sql": 0.9}}
    axes = plots.results(columns, "%", "Exact match").axes[0]
    dots = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label() in columns}
    assert dots == {"base": [[10, 0], [20, 1]], "top-1": [[90, 0]]}


@pytest.mark.parametrize("count", [1, 8, 10, 40])
@pytest.mark.parametrize("length", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_nothing_overlaps_or_is_cut_off(count, length):
    names = [f"e{i}".ljust(length, "x") + str(i) if length > 3 else f"e{i}" for i in range(count)]
    steps = [float(step) for step in range(5, 55, 5)]
    lines = {name: (steps, [i / 7 + step / 9 for step in steps]) for i, name in enumerate(names)}
    table = {a: {b: 1 / (1 + abs(i - j)) for j, b in enumerate(names)} for i, a in enumerate(names)}
    drawn = {
        "load": plots.over_time(plots.Panel("Load in training", lines, reference=("1/E", 0.5)), STAGES),
        "heat": plots.heat_map(table, names, "Load by domain and expert (%)"),
        "coactivation": plots.coactivation(dict.fromkeys(names[:4], table), names),
        "results": plots.results({t: dict.fromkeys(names, 0.5) for t in ("base", "mixture", "top-1")}, "%", "Match"),
    }
    assert {name: overlaps(figure) for name, figure in drawn.items()} == {key: [] for key in drawn}


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_png_has_the_size_and_the_background_of_its_theme(theme):
    from PIL import Image

    image = Image.open(BytesIO(plots.png(plots.curves([panel(2)], STAGES, theme)))).convert("RGB")
    assert image.width == round(plots.WIDTH * plots.DPI)
    assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((1, 1))) == theme.background


def test_names_with_dollars_are_no_formulas():
    name = r"$\frac{$"
    assert plots.png(plots.curves([plots.Panel("Load", {name: ([1.0], [2.0]), "b": ([1.0], [1.0])})], STAGES))


def test_no_pyplot_and_a_clear_message_without_matplotlib(monkeypatch):
    before = "matplotlib.pyplot" in sys.modules  # another test's library may have brought it
    plots.png(plots.heat_map({"a": {"b": 1.0}}, ["b"], "Load"))
    assert ("matplotlib.pyplot" in sys.modules) == before
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'dylora-moe\[plot\]'"):
        plots.heat_map({"a": {"b": 1.0}}, ["b"], "Load")
