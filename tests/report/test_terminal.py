"""Tables for the terminal have the words of the metric that was measured."""

from __future__ import annotations

import pytest
from rich.console import Console

from dylora_moe.report.terminal import confusion_table, results_tables
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


def test_a_confusion_has_a_row_per_expert_and_the_share_that_is_right():
    counts = {"sql": {"law": 1, "sql": 3}, "law": {"law": 2, "sql": 0}}
    console = Console(width=100)
    with console.capture() as capture:
        console.print(confusion_table(counts, ["sql", "law"]))
    rows = [line.split() for line in capture.get().splitlines() if "%" in line]
    assert [[cell for cell in row if cell != "│"] for row in rows] == [
        ["sql", "3", "1", "75%"],
        ["law", "·", "2", "100%"],
    ]
