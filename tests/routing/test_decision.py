"""What a decision makes of scores, of forced rows and of the base route."""

from __future__ import annotations

from dylora_moe.routing import decision


def test_one_hot_weights():
    weights = decision.one_hot_weights([2, None, 0], 3)
    assert weights.tolist() == [[[0, 0, 1]], [[0, 0, 0]], [[1, 0, 0]]]
