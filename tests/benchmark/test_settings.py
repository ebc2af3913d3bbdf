"""Settings of a run: their file names, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dylora_moe.benchmark.settings import Settings


def test_runs_that_differ_have_files_of_their_own():
    one = Settings("decode", "tiny", (4,), ("base", "auto"))
    others = [
        replace(one, **change)
        for change in (
            {"variants": ("base", "dense")},
            {"new_tokens": 5},
            {"top_k": 1},
            {"router_layer": 1},
            {"rounds": 0},
            {"seed": 3},
            {"experts": (4, 8)},
        )
    ]
    assert len({settings.name for settings in (one, *others)}) == len(others) + 1
    assert replace(one, rounds=3).name == one.name


@pytest.mark.parametrize("change", [{"variants": ()}, {"experts": (8, 8)}])
def test_nothing_or_twice_the_same_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Settings("train", "tiny", **change)
