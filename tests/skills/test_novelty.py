"""Novelty: against the formula written out, what leaving rows out means, and what is answered."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dylora_moe.skills.novelty import KNOWN, NEW, RELATED, SHRINKAGE, TOO_SHORT, Detector, Novelty
from dylora_moe.skills.skill import RowViews, Skill
from tiny import difference
from topics import WIDTH, row_states, skill

EXACT = 1e-9  # float64 through an inverse
SKILLS = {"a": skill(0, 9, centre=0.0), "b": skill(100, 7, centre=2.0), "c": skill(200, 6, centre=-2.0, prompt=0)}
BACKGROUND = RowViews.of_each(row_states(seed, centre=seed % 7 - 3.0) for seed in range(300, 330))


def views_of(*seeds: int, centre: float = 0.0, **shape) -> RowViews:
    return RowViews.of_each(row_states(seed, centre, **shape) for seed in seeds)


def means(views: RowViews) -> list[list[Any]]:
    """Row → early, prompt (of plain text all), completion (None without one)."""
    found: list[list[Any]] = []
    for (prompt, completion), (of_prompt, of_completion, _, early) in zip(
        views.counts.tolist(), views.states.double(), strict=True
    ):
        both = prompt and completion
        found.append([early, of_prompt if prompt else of_completion, of_completion if both else None])
    return found


def mean(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(rows).mean(0)


def by_hand(x: list[Any], size: int = 1, without: tuple[str, list[int]] | None = None) -> float:
    """The score of a text: loops, and everything of the rows `without` taken out but for shrinkage and weights."""
    classes = {**{name: each.views for name, each in SKILLS.items()}, "background": BACKGROUND}
    ratios: dict[str, list[float]] = {name: [] for name in SKILLS}
    for view in range(3):
        rows = {name: [row[view] for row in means(views)] for name, views in classes.items()}
        whole = {name: [row for row in each if row is not None] for name, each in rows.items()}
        whole = {name: each for name, each in whole.items() if each}
        rest = {}
        for name, each in rows.items():
            out = without[1] if without and without[0] == name else []
            rest[name] = [row for n, row in enumerate(each) if row is not None and n not in out]
        number = sum(map(len, whole.values()))
        everything = [row for each in rest.values() for row in each]
        within, total, full_within, full_total = (torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for _ in range(4))
        for name in whole:
            for kept, one, all_rows, into in (
                (rest[name], 1 / (len(whole) * len(whole[name])), rest[name], within),
                (whole[name], 1 / (len(whole) * len(whole[name])), whole[name], full_within),
                (rest[name], 1 / number, everything, total),
                (whole[name], 1 / number, [row for each in whole.values() for row in each], full_total),
            ):
                for row in kept:
                    into += one * torch.outer(row - mean(all_rows), row - mean(all_rows))
        for matrix, full in ((within, full_within), (total, full_total)):
            matrix += SHRINKAGE * full.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
        if x[view] is None:
            continue
        for name in SKILLS:
            if rest[name]:
                apart, from_all = x[view] - mean(rest[name]), x[view] - mean(everything)
                near = apart @ torch.linalg.inv(within) @ apart / (1 / size + 1 / len(rest[name]))
                ratios[name].append(math.log(near) - math.log(from_all @ torch.linalg.inv(total) @ from_all))
    return min(sum(each) / len(each) for each in ratios.values() if each)


@pytest.mark.parametrize("shape", [{}, {"prompt": 0}, {"prompt": 9}], ids=["both", "plain", "prompt"])
def test_a_score_is_the_formula(shape):
    views = views_of(900, 901, centre=1.0, **shape)
    found = Detector(SKILLS, BACKGROUND).of_rows(views)
    for one, row in zip(found, means(views), strict=True):
        assert one.score == pytest.approx(by_hand(row), rel=EXACT)


def test_a_batch_is_scored_by_the_mean_of_its_views():
    views = views_of(900, 901, 902, 903, centre=1.0)
    together = [mean([row[view] for row in means(views)]) for view in range(3)]
    assert Detector(SKILLS, BACKGROUND).of_batch(views).score == pytest.approx(by_hand(together, size=4), rel=EXACT)


def test_known_rows_are_scored_as_if_they_had_not_been_there():
    found = Detector(SKILLS, BACKGROUND).known_scores()
    rows = [(name, n) for name, each in SKILLS.items() for n in range(len(each.views.keys))]
    expected = [by_hand(means(SKILLS[name].views)[n], without=(name, [n])) for name, n in rows]
    assert difference(found, torch.tensor(expected, dtype=torch.float64)) <= EXACT


def test_known_groups_are_scored_as_if_they_had_not_been_there():
    """Each row with the one nearest to it by its prompt."""
    expected = []
    for name, each in SKILLS.items():
        rows = means(each.views)
        for n, row in enumerate(rows):
            others = [m for m in range(len(rows)) if m != n]
            near = min(others, key=lambda m: float((rows[m][1] - row[1]).norm()))
            group = [rows[n], rows[near]]
            together = [None if group[0][v] is None else mean([g[v] for g in group]) for v in range(3)]
            expected.append(by_hand(together, size=2, without=(name, [n, near])))
    found = Detector(SKILLS, BACKGROUND).known_scores(2)
    assert difference(found, torch.tensor(expected, dtype=torch.float64)) <= EXACT


def test_the_order_of_skills_makes_no_difference():
    views = views_of(900, 901)
    assert Detector(SKILLS, BACKGROUND).of_rows(views) == (
        Detector({name: SKILLS[name] for name in "cab"}, BACKGROUND).of_rows(views)
    )


def kind(number: int, first: int, count: int) -> RowViews:
    """Rows around a centre of their own, in a direction of its own."""
    centre = torch.randn(WIDTH, generator=torch.Generator().manual_seed(number)) * 3
    views = views_of(*range(first, first + count))
    return RowViews(views.keys, views.counts, (views.states + centre).half())


def of_kind(number: int, rows: int = 40) -> Skill:
    return replace(skill(0, 1), views=kind(number, 1000 * number, rows))


def test_known_rows_are_called_new_as_often_as_was_asked_and_new_ones_are_found():
    """Within four standard errors of 10 % of 300 rows."""
    detector = Detector({f"kind{n}": of_kind(n) for n in range(6)}, kind(6, 6000, 30))
    known = [one for n in range(6) for one in detector.of_rows(kind(n, 1000 * n + 500, 50), 0.1)]
    assert sum(one.answer == NEW for one in known) / len(known) == pytest.approx(0.1, abs=0.07)
    assert sum(one.skill == f"kind{n // 50}" for n, one in enumerate(known)) >= 290
    assert sum(one.answer == NEW for one in detector.of_rows(kind(7, 7000, 50), 0.1)) >= 45
    assert detector.of_batch(kind(7, 7000, 16)).answer == NEW
    near = detector.of_batch(kind(1, 1500, 16))
    assert (near.answer, near.skill) == (KNOWN, "kind1")


def test_without_a_background_the_first_skill_knows_nothing_and_with_it_what_it_is():
    only, known, new = {"a": of_kind(0, 60)}, kind(0, 500, 30), kind(1, 1500, 30)
    alone, beside = Detector(only, RowViews.none(WIDTH)), Detector(only, kind(2, 2000, 30))
    scores = [one.score for one in alone.of_rows(known) + alone.of_rows(new)]
    assert max(scores) - min(scores) < EXACT  # within and total are the same
    middle = sorted(one.score for one in beside.of_rows(known))[15]
    assert sum(one.score > middle for one in beside.of_rows(new)) == 30


def test_answers_follow_p_and_length():
    """With 22 scores of known rows, related is up to five times what is new."""
    detector, far = Detector(SKILLS, BACKGROUND), views_of(900, centre=40.0)
    p = detector.of_rows(far, 0.5)[0].p
    answers = [detector.of_rows(far, asked)[0].answer for asked in (p, p / 2, p / 4.9, p / 5.1)]
    assert answers == [NEW, RELATED, RELATED, KNOWN]
    long = Detector({name: skill(n * 50, 9, length=80) for n, name in enumerate("ab")}, BACKGROUND)
    for length, answer in ((8, TOO_SHORT), (31, TOO_SHORT), (32, NEW)):
        assert long.of_rows(views_of(900, centre=40.0, length=length), 0.2)[0].answer == answer
    assert long.of_rows(views_of(1, centre=0.0, length=8), 0.001)[0].answer == KNOWN


def test_too_few_scores_for_what_was_asked_warn(caplog):
    found = Detector(SKILLS, BACKGROUND).of_rows(views_of(900, centre=40.0), 0.01)[0]
    assert found.answer == RELATED
    assert "by 22 scores of known texts the rate of false alarms is at least 0.043, and 0.01 was asked" in caplog.text
    with pytest.raises(ValueError, match="false_alarm=1: expected a share between 0 and 1"):
        Detector(SKILLS, BACKGROUND).of_rows(views_of(900), 1)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_skill_of_few_rows_is_no_accident(rows):
    detector = Detector({"a": skill(0, rows)}, BACKGROUND)
    assert len(detector.known_scores()) == (rows if rows > 1 else 0)
    for found in (*detector.of_rows(views_of(900)), detector.of_batch(views_of(900, 901, 902))):
        assert math.isfinite(found.score)
        assert 0 < found.p <= 1


def test_what_is_said():
    assert str(Novelty(KNOWN, "sql", 0.4312, 0.1)) == "known: sql (p=0.43)"
    assert str(Novelty(RELATED, "mbpp", 0.02, 0.1)) == "related: mbpp (p=0.02)"
    assert str(Novelty(NEW, "sql", 0.001, 0.1)) == "new (p=0.001)"
    assert str(Novelty(TOO_SHORT, "sql", 0.001, 0.1)) == "too short to say"
