"""The page of a day: what is met, what is missed, and files that are no results."""

from __future__ import annotations

import json

import pytest

from dylora_moe.benchmark.page import add_run, read_causes, write_page
from dylora_moe.benchmark.targets import PLANS

TIMES = {"auto/8": [1.0, 2.0, 3.0], "peft-wide/8": [1.0, 2.0, 3.0], "loop/8": [1.5, 3.0, 4.5]}


def test_page_says_what_is_met_what_is_missed_and_why(results, tmp_path):
    folder = tmp_path / "day"
    page = add_run(results(**TIMES), folder).read_text()
    assert "| training step, against PEFT of rank 8r | ≤ 1.05 | 1.000 [1.000, 1.000] | met |" in page
    assert (
        "| training step, the loop takes longer | ≥ 1.8 | 1.500 [1.500, 1.500] | **missed by 16.7%**: cause not" in page
    )
    assert "not measured: it does not run" in page
    assert "not measured: `dylora-moe bench --plan generation`" in page
    assert PLANS["training"].command() in page
    (folder / "causes.md").write_text("# Causes\n\n## training step, the loop takes longer\n\nThe loop\nis quick.\n")
    assert "**missed by 16.7%**: The loop is quick. |" in write_page(folder).read_text()
    (folder / "causes.md").write_text("## no such figure\n\nText.\n")
    with pytest.raises(ValueError, match="no such figure"):
        write_page(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}', '{"format_version": 99}'])
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        write_page(tmp_path)


@pytest.mark.parametrize("part", ["rows", "machine", "missing", "command"])
def test_a_result_that_lacks_a_part_is_named(results, tmp_path, part):
    whole = results(**TIMES)
    del whole[part]
    (tmp_path / "x.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"x\.json"):
        write_page(tmp_path)


def test_no_causes_is_no_mistake(tmp_path):
    assert read_causes(tmp_path / "causes.md") == {}
