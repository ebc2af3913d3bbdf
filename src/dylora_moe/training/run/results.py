"""What a run measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dylora_moe.evaluation.held_out import Measured

COLUMNS = {"base": "base", "single": "one LoRA", "mixture": "mixture (dense)", "top1": "top-1", "top2": "top-2"}
"""Columns of the held-out results → their titles, in the order in which they are shown."""


@dataclass
class Results:
    """What a run measured.

    Attributes:
        metric: a row of `evaluation.metrics.METRICS`.
        columns: column (a key of `COLUMNS`) → domain → value.
        rows: domain → held-out rows it was measured on.
        intervals: column → domain → 95 % bootstrap interval of the value, over the rows.
        load: domain → expert → share of the tokens, under the default routing.
        routing: domain → entropy, mean largest weight and co-activation, under the default routing.
        reloaded_identical: whether the saved checkpoint, loaded again, gave the same answers.
        baseline: rank and learning rate of the single LoRA, and why that rate.
        seconds: phase → wall time.
        output: the checkpoint's folder.
    """

    metric: str
    output: str
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    load: dict[str, dict[str, float]] = field(default_factory=dict)
    routing: dict[str, dict[str, Any]] = field(default_factory=dict)
    reloaded_identical: bool | None = None
    passes_per_step: float = 1.0
    parameters: dict[str, int] = field(default_factory=dict)
    baseline: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, column: str, measured: Mapping[str, Measured]) -> None:
        """Note what was measured of each domain."""
        self.columns[column] = {domain: found.value for domain, found in measured.items()}
        self.intervals[column] = {domain: (found.low, found.high) for domain, found in measured.items()}
        self.rows |= {domain: found.rows for domain, found in measured.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `results.json`."""
        return {
            **self.columns,
            "rows": self.rows,
            "intervals": self.intervals,
            "load": self.load,
            "routing": self.routing,
            "metric": self.metric,
            "reloaded_identical": self.reloaded_identical,
            "passes_per_step": self.passes_per_step,
            "parameters": self.parameters,
            **({} if self.baseline is None else {"baseline": self.baseline}),
            "phases": {name: round(value, 2) for name, value in self.seconds.items()},
            "seconds": round(sum(self.seconds.values()), 2),
        }
