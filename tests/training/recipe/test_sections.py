"""Sections of a recipe refuse values that cannot be used, made from YAML or in Python."""

from __future__ import annotations

import pytest

from dylora_moe.training.recipe.sections import TwoPhase


@pytest.mark.parametrize(
    ("values", "message"),
    [({"seeding": 0}, "seeding=0"), ({"seeding": 1.0}, "seeding=1.0"), ({"consolidation": 2}, "consolidation=2")],
)
def test_two_phase_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        TwoPhase(**values)
