"""What is read back of a run's files, and what is said of files that are not a run's."""

from __future__ import annotations

import json

import pytest

from dylora_moe import CheckpointError
from dylora_moe.report.finished import read_run, series, step_axis
from fakerun import write_run


def test_without_results_the_file_and_the_remedy_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"results\.json is missing; .*dylora-moe train"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"results\.json holds list"):
        read_run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "results",
    [
        {"base": 3},
        {"base": {"date": "x"}},
        {"load": 3},
        {"load": {"date": 3}},
        {"routing": {"date": []}},
        {"phases": {"a": None}},
        {"seconds": "long"},
    ],
)
def test_results_of_another_shape_name_the_file(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"results\.json: .*expected a (mapping|number)"):
        read_run(tmp_path)


def test_stages_follow_one_another_on_one_axis():
    history = [
        {"stage": "sql", "step": 5, "loss": 2},
        {"stage": "sql", "step": 10, "loss": None},
        {"stage": "router", "step": 5, "loss": 1.0},
        {"stage": "router", "step": 20, "eval_loss": 0.5},
    ]
    rows, stages = step_axis(history)
    assert [(stage.name, stage.start, stage.end) for stage in stages] == [("sql", 0, 10), ("router", 10, 30)]
    assert series(rows, "loss") == ([5, 15], [2, 1])
    assert series(rows, "eval_loss") == ([30], [0.5])


def test_the_base_output_is_no_expert_and_comes_last(tmp_path):
    write_run(tmp_path, experts=["sql", "date"], route_to_base=True)
    found = read_run(tmp_path)
    assert found.experts == ["sql", "date"]
    assert found.outputs == ["sql", "date", "base"]


def test_a_metric_that_is_not_known_is_named(tmp_path):
    (tmp_path / "results.json").write_text('{"metric": "beauty"}')
    with pytest.raises(CheckpointError, match=r"results\.json: unknown metric 'beauty'; known are exact_match, loss"):
        read_run(tmp_path)
