"""Measuring a mixture: each routing once, with rows and intervals, and progress without a terminal."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from dylora_moe.report.terminal import results_tables
from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.run.job import Job
from runs import run


def test_two_experts_have_no_column_twice(content, tmp_path):
    results = run(content(max_steps=1)).results
    assert list(results.columns) == ["base", "mixture", "top1"]
    assert results.rows == {"date": 2, "cart": 2}
    for column, values in results.columns.items():
        for domain, value in values.items():
            low, high = results.intervals[column][domain]
            assert low <= value <= high
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["rows"] == results.rows
    assert written["intervals"]["base"]["date"] == list(results.intervals["base"]["date"])
    screen = Console(width=200, file=io.StringIO())
    screen.print(results_tables(results)[0])
    low, high = results.intervals["base"]["date"]
    assert f"{low:.2f} – {high:.2f}" in screen.file.getvalue()


@pytest.mark.parametrize("kept", [True, False], ids=["with-test", "without-test"])
def test_what_is_measured_is_said_without_a_terminal(content, tmp_path, kept):
    made = content(max_steps=1)
    if not kept:
        file = tmp_path / "date.jsonl"
        file.write_text('{"prompt": "a", "completion": "b"}\n')
        made["experts"] = {"date": {"data": {"train": str(file)}}}
    console = Console(file=io.StringIO(), width=200)
    Job(parse_recipe(made), console).run()
    lines = console.file.getvalue().splitlines()
    assert f"Base: {made['base']['model']}" in lines
    assert ("evaluate base 4/4" in lines) == kept
    assert ("evaluate mixture 4/4" in lines) == kept
    assert any(line.startswith("Nothing was measured: no expert has held-out data") for line in lines) == (not kept)
