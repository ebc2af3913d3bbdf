"""Tables for the terminal have the words of the metric that was measured."""

from __future__ import annotations

import pytest
from rich.console import Console

from dylora_moe.report.terminal import results_tables
from dylora_moe.training.run.results import Results


@pytest.mark.parametrize(
    ("metric", "title", "shown"),
    [
        ("exact_match", "Held-out exact match", ["25.0%", "75.0%"]),
        ("loss", "Held-out loss (nats per completion token)", ["0.250", "0.750"]),
    ],
)
def test_results_are_shown_in_the_metrics_words(metric, title, shown):
    results = Results(metric, "out", {"base": {"a": 0.25}, "top1": {"a": 0.75}}, load={"a": {"x": 1.0}})
    table, load = results_tables(results)
    assert table.title == title
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table, load)
    text = capture.get()
    for words in [*shown, "top-1", "100.0%"]:
        assert words in text
    assert "top-2" not in text
