"""One skill: what its rows weigh, and which views of them are kept."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.skills.skill import PROMPT_SHARE, ROWS_KEPT, RowViews, Skill
from tiny import difference
from topics import WIDTH, row_states, skill

HALF = 1e-3  # float16


def test_a_row_weighs_one_and_its_prompt_its_share():
    rows = [row_states(1, length=9, prompt=2), row_states(2, length=30, prompt=25), row_states(3, prompt=0)]
    found = Skill.of(rows, WIDTH)
    expected = torch.zeros(WIDTH, dtype=torch.float64)
    for row in rows[:2]:
        prompt, completion = row.states[row.prompt].double().mean(0), row.states[~row.prompt].double().mean(0)
        expected += PROMPT_SHARE * prompt + (1 - PROMPT_SHARE) * completion
    expected = (expected + rows[2].states.double().mean(0)) / 3
    assert (found.rows, found.tokens) == (3, 9 + 30 + 9)
    assert found.sums.weight == pytest.approx(3, rel=1e-12)
    assert difference(found.sums.mean, expected) <= 1e-12


@pytest.mark.parametrize("prompt", [0, 4, 9])
def test_views_are_the_means_of_the_parts_and_one_token(prompt):
    row = row_states(5, prompt=prompt)
    views = RowViews.of(row)
    parts = [row.states[:prompt], row.states[prompt:]]
    for view, part in zip(views.states[0], parts, strict=False):
        expected = part.mean(0) if len(part) else torch.zeros(WIDTH)
        assert difference(view, expected) <= HALF
    at = row.row.key % 9
    assert difference(views.states[0, 2], row.states[at]) <= HALF
    assert difference(views.states[0, 3], row.early) <= HALF
    assert views.counts.tolist() == [[prompt, 9 - prompt]]
    assert views.token_parts.tolist() == [int(at >= prompt)]
    assert difference(views.deciding[0], row.states[:prompt].mean(0) if prompt else row.states.mean(0)) <= HALF


def test_the_same_rows_are_kept_in_any_order():
    rows = [row_states(seed) for seed in range(ROWS_KEPT + 30)]
    one, other = Skill.of(rows, WIDTH), Skill.of(rows[::-1], WIDTH)
    halves = Skill.of(rows[70:], WIDTH) + Skill.of(rows[:70], WIDTH)
    for found in (other, halves):
        assert len(found.views.keys) == ROWS_KEPT
        assert torch.equal(found.views.keys, one.views.keys)
        assert torch.equal(found.views.states, one.views.states)
        assert torch.equal(found.views.counts, one.views.counts)


def test_a_row_is_kept_once():
    assert len(Skill.of([row_states(1), row_states(1), row_states(2)], WIDTH).views.keys) == 2


def test_adding_is_the_skill_of_all_rows():
    together = skill(0, 3, centre=0.0) + skill(3, 4, centre=0.0)
    whole = skill(0, 7, centre=0.0)
    assert (together.rows, together.tokens) == (whole.rows, whole.tokens)
    assert difference(together.sums.scatter, whole.sums.scatter) <= 1e-12
    assert [each.rows for each in together.taught] == [3, 4]
    assert (skill(3, 4) + skill(0, 3)).taught == (skill(0, 3) + skill(3, 4)).taught
