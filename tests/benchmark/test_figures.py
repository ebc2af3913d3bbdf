"""Which figures a run is drawn in."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from dylora_moe.benchmark.figures import figures


def row(key, experts, **values):
    return {"key": key, "title": key, "experts": experts, **values}


@pytest.mark.parametrize("sizes", [(8,), (2, 4, 8)])
def test_what_was_measured_is_drawn_and_nothing_else(sizes):
    timed = {"seconds": [1.0, 2.0], "ratio": [1.0, 0.9, 1.1]}
    rows = [row("base", None, **timed), *(row(f"auto/{size}", size, **timed) for size in sizes)]
    found = figures({"settings": {"work": "train", "experts": list(sizes)}, "rows": rows})
    assert len(found) == 1
    counted = [{**each, "saved_bytes": 2**20} for each in rows]
    both = figures({"settings": {"work": "train", "experts": list(sizes)}, "rows": counted})
    assert found.keys() < both.keys()
    plt.close("all")
