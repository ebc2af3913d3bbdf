"""The learning rate of the single LoRA beside a mixture."""

from __future__ import annotations

import pytest

from dylora_moe.training.run.single import single_rate
from runs import run


def test_the_rate_goes_as_one_over_the_root_of_the_rank():
    rate = single_rate(None, 2e-3, 32, 4)
    assert rate.rates == [pytest.approx(1e-3)]
    assert str(rate) == "one LoRA of rank 32: learning rate 0.001 (0.002 × √(8/32))"
    assert rate.warning is None
    assert single_rate(None, 2e-3, 8, 1).chosen == 2e-3


def test_two_ranks_at_one_rate_are_warned_of():
    assert single_rate(2e-3, 2e-3, 8, 1).warning is None
    assert single_rate(1e-3, 2e-3, 32, 4).warning is None
    warning = single_rate(2e-3, 2e-3, 32, 4).warning
    assert warning is not None
    assert "rank 32 and experts of rank 8 are compared at one learning rate (0.002)" in warning


@pytest.mark.parametrize(("higher", "best"), [(True, 2), (False, 0)])
def test_a_sweep_keeps_the_best_of_three(higher, best):
    rate = single_rate("sweep", 2e-3, 32, 4)
    tried = rate.rates
    assert tried == pytest.approx([5e-4, 1e-3, 2e-3])
    rate.choose(dict(zip(tried, (0.1, 0.2, 0.3), strict=True)), higher)
    assert rate.chosen == tried[best]
    assert rate.warning is None
    assert str(rate).endswith("(the best of 0.0005, 0.001, 0.002 on the held-out rows)")
    assert rate.to_dict()["tried"] == {"0.0005": 0.1, "0.001": 0.2, "0.002": 0.3}


@pytest.mark.parametrize(
    ("asked", "how", "count"),
    [(None, "scaled", 1), pytest.param(0.03, "given", 1, marks=pytest.mark.slow), ("sweep", "sweep", 3)],
)
def test_the_results_say_which_rate(content, asked, how, count):
    recipe = content(max_steps=2)
    recipe["eval"] |= {"baseline": True, "baseline_learning_rate": asked}
    found = run(recipe).results
    said = found.to_dict()["baseline"]
    assert (said["rank"], said["how"], said["experts_learning_rate"], len(said["tried"])) == (8, how, 0.01, count)
    assert f"{said['learning_rate']:g}" in said["tried"]
    if how == "scaled":
        assert said["learning_rate"] == pytest.approx(0.01 * (4 / 8) ** 0.5)
    best = min(said["tried"].values())
    assert sum(found.columns["single"].values()) / 2 == pytest.approx(best)
