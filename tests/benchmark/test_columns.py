"""The columns of a run's table."""

from __future__ import annotations

import pytest

from dylora_moe.benchmark.columns import cells

RUN = {
    "settings": {"seed": 0},
    "rows": [
        {"title": "base", "key": "base", "seconds": [0.002, 0.001, 0.003], "ratio": [1, 1, 1], "peak_bytes": 2**20},
        {"title": "ours", "key": "auto", "seconds": [0.004, 0.002, 0.006], "ratio": [2, 1.9, 2.1], "shrinks": None},
    ],
}


def test_columns_that_say_nothing_are_left_out():
    headings, rows = cells(RUN)
    assert headings == ["variant", "time ÷ base [95 %]", "ms", "peak MiB"]
    assert rows == [["base", "1.000 [1.000, 1.000]", "2", "1.00"], ["ours", "2.000 [1.900, 2.100]", "4", ""]]


def test_times_can_be_compared_with_another_variant():
    headings, rows = cells(RUN, ("auto",))
    assert headings[-1] == "time ÷ auto"
    assert [row[-1] for row in rows] == ["0.500 [0.500, 0.500]", "1.000 [1.000, 1.000]"]
    with pytest.raises(ValueError, match="against='nobody': not a timed variant"):
        cells(RUN, ("nobody",))
