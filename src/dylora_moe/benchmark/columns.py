"""The columns of a run's table, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]


def _interval(row: Row) -> str:
    if "ratio" not in row:
        return ""
    median, low, high = row["ratio"]
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def _plain(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else format(row[key], form)


def _mebibytes(key: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else f"{row[key] / 2**20:.2f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "time ÷ base [95 %]": _interval,
    "ms": lambda row: f"{1000 * sorted(row['seconds'])[len(row['seconds']) // 2]:.4g}" if "seconds" in row else "",
    "tokens/s": _plain("tokens_per_second", ".4g"),
    "saved MiB": _mebibytes("saved_bytes"),
    "of it in adapted layers": _mebibytes("saved_in_layers"),
    "peak MiB": _mebibytes("peak_bytes"),
    "FLOPs ÷ base": _plain("flops_ratio", ".4f"),
    "÷ floor": _plain("over_floor", ".4f"),
    "base passes": _plain("base_passes", ".2f"),
    "GEMMs added": _plain("added_gemms", ".2f"),
    "shrinks": _plain("shrinks", ".2f"),
    "graph breaks": _plain("graph_breaks", "d"),
}


def cells(results: Mapping[str, Any], against: tuple[str, ...] = ()) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a run; columns that say nothing anywhere are left out.

    Args:
        results: of `run`.
        against: keys of variants to which the times are compared as well.
    """
    from .timing import ratio

    columns = dict(COLUMNS)
    rows = {row["key"]: row for row in results["rows"]}
    for key in against:
        if key not in rows or "seconds" not in rows[key]:
            raise ValueError(f"against={key!r}: not a timed variant of this run, which has {', '.join(rows)}.")
        times = rows[key]["seconds"]
        columns[f"time ÷ {key}"] = lambda row, times=times: "{:.3f} [{:.3f}, {:.3f}]".format(
            *ratio(row["seconds"], times, results["settings"]["seed"])
        )
    used = {title: show for title, show in columns.items() if any(show(row) for row in results["rows"])}
    return ["variant", *used], [[row["title"], *(show(row) for show in used.values())] for row in results["rows"]]
