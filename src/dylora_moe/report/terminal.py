"""Tables and colours for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text
from torch import Tensor

from dylora_moe.arguments import BASE
from dylora_moe.evaluation.metrics import METRICS
from dylora_moe.reports import GradientStats, ParameterReport
from dylora_moe.routing.trace import RoutingTrace
from dylora_moe.training.run.results import COLUMNS, Results

if TYPE_CHECKING:
    from dylora_moe.training.run.plan import Plan  # what makes a plan needs TRL

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


def colour_of(index: int) -> str:
    """The colour of the expert in column `index`."""
    return COLOURS[index % len(COLOURS)]


def colour_by_expert(tokens: Sequence[str], weights: Tensor, names: Sequence[str]) -> Text:
    """`tokens` in the colour of the expert that weighs most for each; dim where its weight is below a half.

    Args:
        tokens: S pieces of text.
        weights: `[S, E]`; NaN for a token that nothing predicted.
        names: the experts, for the legend.
    """
    text = Text()
    for i, name in enumerate(names):
        text.append(f" {name} ", style=f"reverse {colour_of(i)}").append(" ")
    text.append("\n")
    for token, row in zip(tokens, weights, strict=False):
        share, best = row.max(-1)
        if not float(share) > 0.0:
            text.append(token)
        else:
            text.append(token, style=colour_of(int(best)) + ("" if float(share) >= 0.5 else " dim"))
    return text


def name_experts(tokens: Sequence[str], weights: Tensor, names: Sequence[str]) -> Text:
    """A line per token with the weights above a hundredth of the pass that predicted it: what needs no colours.

    Args: as `colour_by_expert`.
    """
    shown, lines = [repr(token) for token in tokens], []
    width = max(map(len, shown), default=0)
    for token, row in zip(shown, weights.tolist(), strict=True):
        shares = sorted(((share, name) for share, name in zip(row, names, strict=True) if share >= 0.01), reverse=True)
        words = ", ".join(f"{name} {share:.2f}" for share, name in shares)
        lines.append(f"{token:<{width}}  {words or ('-' if any(map(math.isnan, row)) else BASE)}")
    return Text("\n".join(lines))


def parameter_table(report: ParameterReport) -> Table:
    """Parameters per expert, router and base."""
    table = Table(title=f"Parameters (overhead {report.overhead:.2f} %, trainable {report.trainable:,})")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("% of base", justify="right")
    for row in report.table():
        table.add_row(row["part"], f"{row['parameters']:,}", f"{row['percent of base']:.2f}")
    return table


def plan_tables(plan: Plan) -> list[Table]:
    """What a run would train: its parameters, and its stages with their steps and tokens."""
    stages = Table(title=f"Plan (the router reads the input of layer {plan.router_layer})")
    stages.add_column("stage", no_wrap=True)
    for title in ("trainable", "rows / epoch", "steps × rows", "tokens, about", "base passes"):
        stages.add_column(title, justify="right")
    for stage in plan.stages:
        steps = f"{stage.steps:,} × {stage.rows_per_step:,}"
        numbers = (f"{stage.trainable:,}", f"{stage.rows:,}", steps, f"{stage.total_tokens:,}", f"{stage.passes:.2f}")
        stages.add_row(stage.name, *numbers)
    return [parameter_table(plan.parameters), stages]


def routing_table(trace: RoutingTrace) -> Table:
    """Load per expert, and how sharp the routing is."""
    title = f"Routing (entropy {trace.entropy():.3f} nats, {len(trace.layers_reached)} layers reached)"
    table = Table(title=title)
    table.add_column("expert")
    table.add_column("load", justify="right")
    table.add_column("strongest for", justify="right")
    for i, row in enumerate(trace.table()):
        table.add_row(Text(row["expert"], style=colour_of(i)), f"{row['load']:.1%}", f"{row['strongest']:.1%}")
    return table


def confusion_table(counts: Mapping[str, Mapping[str, int]], names: Sequence[str]) -> Table:
    """Where the texts of each expert go, each by a router that has not seen it.

    Args:
        counts: expert → expert → how many texts.
        names: the experts, in order.
    """
    table = Table(title="Where each text goes if it is left out")
    table.add_column("texts of")
    for i, name in enumerate(names):
        table.add_column(Text(name, style=colour_of(i)), justify="right")
    table.add_column("right", justify="right")
    for name in names:
        row = counts[name]
        cells = [str(row.get(other, 0) or "·") for other in names]
        table.add_row(name, *cells, f"{row.get(name, 0) / max(sum(row.values()), 1):.0%}")
    return table


def gradient_table(report: Mapping[str, GradientStats]) -> Table:
    """Gradients per expert, router and frozen."""
    table = Table(title="Gradients of the language-model loss on this text (absolute values)")
    for name in ("group", "with gradient", "min", "mean", "max"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for name, stats in report.items():
        numbers = (stats.minimum, stats.mean, stats.maximum)
        cells = [f"{n:.3g}" for n in numbers] if stats.with_gradient else ["-"] * 3
        table.add_row(name, f"{stats.with_gradient}/{stats.tensors}", *cells)
    return table


def results_tables(results: Results) -> list[Table]:
    """Held-out results per domain, and the load of each expert per domain; none without held-out data."""
    if not results.columns.get("base"):
        return []
    metric = METRICS[results.metric]
    table = Table(title=f"Held-out {metric.title}" + ("" if metric.is_share else f" ({metric.unit})"))
    table.caption = "with 95 % bootstrap intervals over the rows"
    if results.baseline is not None:
        rank, rate = results.baseline["rank"], results.baseline["learning_rate"]
        table.caption += f"; one LoRA of rank {rank} at the learning rate {rate:.3g} ({results.baseline['how']})"
    table.add_column("domain")
    table.add_column("rows", justify="right")
    columns = [key for key in COLUMNS if results.columns.get(key)]
    for key in columns:
        table.add_column(COLUMNS[key], justify="right")
    for domain in results.columns["base"]:
        cells = []
        for key in columns:
            bounds = results.intervals.get(key, {}).get(domain)
            cells.append(_shown(results.columns[key][domain], bounds, metric.is_share))
        table.add_row(domain, str(results.rows.get(domain, "")), *cells)
    load = Table(title="Load of each expert per domain")
    load.add_column("domain")
    names = list(dict.fromkeys(name for shares in results.load.values() for name in shares))
    for i, name in enumerate(names):
        load.add_column(Text(name, style=colour_of(i)), justify="right")
    for domain, row in results.load.items():
        load.add_row(domain, *(f"{row.get(name, 0.0):.1%}" for name in names))
    return [table, load]


def _shown(value: float, bounds: Sequence[float] | None, is_share: bool) -> str:
    """A value, and its interval below it."""
    if is_share:
        return f"{value:.1%}" + (f"\n{bounds[0]:.0%} – {bounds[1]:.0%}" if bounds else "")
    return f"{value:.3f}" + (f"\n{bounds[0]:.2f} – {bounds[1]:.2f}" if bounds else "")
