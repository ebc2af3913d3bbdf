"""Which figures a run's report has, and the words that go with each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dylora_moe.training.run.results import COLUMNS

from . import plots
from .colours import Theme
from .finished import LOAD, Run, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVAL_LOSS = "eval_loss/"
FIGURES = ("results", "load_by_domain", "coactivation", "loss", "eval_loss", "load", "router", "schedule")


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its file's name, the section it stands in, and how to draw it.

    A `wide` one takes the whole page; on a narrow screen `narrow` is shown in its place, or else it scrolls.
    """

    name: str
    section: str
    caption: str
    alt: str
    draw: Callable[[Theme], Figure]
    wide: bool = False
    narrow: Callable[[Theme], Figure] | None = None


def pictures(run: Run) -> list[Picture]:
    """The figures for which `run` has data, in the order in which they are shown."""
    found = [_results(run), _load_by_domain(run), _coactivation(run), *_curves(run)]
    return [picture for picture in found if picture is not None]


def _results(run: Run) -> Picture | None:
    if len(run.columns) < 2:
        return None
    columns = {COLUMNS[key]: values for key, values in run.columns.items()}
    title = f"Held-out {run.metric.title}" + ("" if run.metric.higher_is_better else " (lower is better)")
    return Picture(
        "results",
        "results",
        "Each domain's values on one line, the base hollow.",
        f"Dot plot of {', '.join(columns)} for {_some(run.domains)}; the table above has its numbers.",
        lambda theme: plots.results(columns, run.metric.unit, title, theme),
    )


def _load_by_domain(run: Run) -> Picture | None:
    if not run.load:
        return None
    strongest = [f"{domain}: {max(row, key=row.__getitem__)}" for domain, row in run.load.items() if row]
    return Picture(
        "load_by_domain",
        "routing",
        "Share of each domain's held-out tokens that an expert receives, in percent.",
        f"Heat map of domain by expert. Most of the load goes to, by domain, {_some(strongest)}.",
        lambda theme: plots.heat_map(run.load, run.outputs, "Load by domain and expert (%)", theme),
        wide=min(len(run.load), len(run.outputs)) > plots.COLUMNS_LIMIT,
    )


def _coactivation(run: Run) -> Picture | None:
    tables = {domain: row["coactivation"] for domain, row in run.routing.items() if row.get("coactivation")}
    count = len(run.outputs)
    if not tables or count < 2:
        return None
    panels = 1 < len(tables) <= 6 and count <= plots.PANELS_LIMIT
    return Picture(
        "coactivation",
        "routing",
        "Share of tokens on which two experts both have weight, in percent; on the diagonal, on which one has.",
        f"Heat maps of expert by expert for {_some(list(tables))}.",
        lambda theme: plots.coactivation(tables, run.outputs, theme),
        wide=panels or count > plots.COLUMNS_LIMIT,
        narrow=(lambda theme: plots.coactivation(tables, run.outputs, theme, beside=1)) if panels else None,
    )


def _curves(run: Run) -> list[Picture]:
    count = len(run.outputs)
    uniform, even = (("uniform", math.log(count)), ("1/E", 1 / count)) if count > 1 else (None, None)
    lines = {
        "loss": [
            _panel(run, "Loss", {"loss": "total", "lm_loss": "language model", "eval_loss": "evaluation"}),
            _panel(
                run,
                "Auxiliary losses",
                {"aux_loss": "total", "router/balance": "balance", "router/domain_loss": "domain"},
            ),
        ],
        "router": [
            _panel(run, "Entropy of the routing (nats)", {"router/entropy": "entropy"}, uniform, (0, None)),
            _panel(run, "Largest weight of a token (mean)", {"router/max_probability": "weight"}, None, (0, 1.02)),
            _panel(run, "Dead experts", {"router/dead_experts": "experts"}, None, (0, None)),
        ],
        "schedule": [
            _panel(run, "Learning rate", {"learning_rate": "rate"}, None, (0, None)),
            _panel(run, "Norm of the gradient", {"grad_norm": "norm"}, None, (0, None)),
            _panel(run, "Tokens per second", {"tokens_per_second": "tokens"}, None, (0, None)),
        ],
    }
    captions = {
        "loss": "Loss of training, and of evaluation where there was one, by optimizer step.",
        "router": "How decided the router is: entropy 0 sends each token to one expert.",
        "schedule": "Learning rate, norm of the gradient, and speed.",
    }
    found = {
        name: Picture(
            name,
            "curves",
            captions[name],
            _described(kept),
            lambda theme, kept=kept: plots.curves(kept, run.stages, theme),
        )
        for name, panels in lines.items()
        if (kept := [panel for panel in panels if panel.lines])
    }
    evaluated = {key.removeprefix(EVAL_LOSS): key for row in run.rows for key in row if key.startswith(EVAL_LOSS)}
    by_name = {
        "load": _panel(run, "Load in training", {LOAD + name: name for name in run.outputs}, even, (0, None)),
        "eval_loss": _panel(run, "Evaluation loss by domain", {key: name for name, key in evaluated.items()}),
    }
    captions = {
        "load": "Share of the training tokens that each expert receives.",
        "eval_loss": "Loss on the held-out examples of each domain in the course of training.",
    }
    for name, panel in by_name.items():
        if panel.lines:
            found[name] = Picture(
                name,
                "curves",
                captions[name],
                _described([panel]),
                lambda theme, panel=panel: plots.over_time(panel, run.stages, theme),
            )
    return [found[name] for name in FIGURES if name in found]


def _panel(
    run: Run,
    title: str,
    keys: Mapping[str, str],
    reference: tuple[str, float] | None = None,
    limits: tuple[float | None, float | None] | None = None,
) -> plots.Panel:
    lines = {label: series(run.rows, key) for key, label in keys.items()}
    lines = {label: line for label, line in lines.items() if line[0]}
    colours = {label: run.colours[label] for label in lines if label in run.colours}
    return plots.Panel(title, lines, colours, reference, limits)


def _described(panels: Sequence[plots.Panel]) -> str:
    """What a reader without eyes gets of some curves: from where to where each goes."""
    parts = [
        f"{panel.title}: " + _some([f"{label} from {v[0]:.3g} to {v[-1]:.3g}" for label, (_, v) in panel.lines.items()])
        for panel in panels
    ]
    return f"Curves by optimizer step. {'. '.join(parts)}."


def _some(words: Sequence[str], most: int = 8) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
