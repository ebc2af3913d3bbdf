"""The router in closed form: against the formula written out, and what leaving a row out means."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.skills.closed_form import COVARIANCE_ROWS, MEAN_ROWS, SEQUENCE, SHRINKAGE, TOKEN, fit, left_out
from dylora_moe.skills.skill import PROMPT_SHARE, Skill
from topics import WIDTH, row_states, skill

EXACT = 1e-9  # float64 through an inverse
HALVES = 3e-2  # through an inverse, of kept rows in float16, as a share of the largest


def weights(row):
    """What the tokens of a row weigh: 1 together, the prompt its share."""
    p, c = int(row.prompt.sum()), int((~row.prompt).sum())
    if not p or not c:
        return torch.full((p + c,), 1 / (p + c), dtype=torch.float64)
    return row.prompt.double() * (PROMPT_SHARE / p) + (~row.prompt).double() * ((1 - PROMPT_SHARE) / c)


def deciding(row):
    return (row.states[row.prompt] if row.prompt.any() else row.states).double().mean(0)


def around(states, w):
    """The weighted mean of `states [T, D]` and their covariance around it."""
    w = w / w.sum()
    mean = w @ states
    return mean, sum(weight * torch.outer(state, state) for state, weight in zip(states - mean, w, strict=True))


def by_hand(groups, x, scored=SEQUENCE):
    """Log-densities `[T, E]` of `x` under normal distributions with the mean covariance, up to what all share."""
    of_tokens = [
        around(torch.cat([row.states for row in rows]).double(), torch.cat([weights(row) for row in rows]))
        for rows in groups
    ]
    of_rows = [
        around(torch.stack([deciding(row) for row in rows]), torch.ones(len(rows), dtype=torch.float64))
        for rows in groups
    ]
    means = [mean for mean, _ in of_tokens]
    within = torch.stack([covariance for _, covariance in of_tokens]).mean(0)
    within += SHRINKAGE * within.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    if scored == SEQUENCE:
        N = sum(len(rows) - 1 for rows in groups)
        within = torch.stack([covariance for _, covariance in of_rows]).mean(0) + COVARIANCE_ROWS / N * within
        for column, rows in enumerate(groups):
            n = len(rows)
            means[column] = (n * of_rows[column][0] + MEAN_ROWS * means[column]) / (n + MEAN_ROWS)
    apart = x.double()[:, None] - torch.stack(means)
    return -0.5 * (apart @ torch.linalg.inv(within) * apart).sum(-1)


def relative(scores):
    return scores - scores.mean(-1, keepdim=True)


GROUPS = [
    [row_states(seed, 0.0, length=5 + seed) for seed in range(4)],
    [row_states(10 + seed, 1.0, prompt=0) for seed in range(7)],
    [row_states(20 + seed, -1.0, length=20 + seed, prompt=3) for seed in range(5)],
]
SKILLS = {name: Skill.of(rows, WIDTH) for name, rows in zip("abc", GROUPS, strict=True)}


@pytest.mark.parametrize(("scored", "bound"), [(TOKEN, EXACT), (SEQUENCE, HALVES)])
def test_scores_are_the_log_densities(scored, bound):
    found = fit(SKILLS, scored=scored)
    x = torch.cat([row.states for rows in GROUPS for row in rows])
    scores = relative(x.double() @ found.weight.T + found.bias)
    expected = relative(by_hand(GROUPS, x, scored))
    assert (scores - expected).abs().max() <= bound * expected.abs().max()


def test_the_order_of_skills_makes_no_difference():
    one, other = fit(SKILLS), fit({name: SKILLS[name] for name in "cab"})
    assert one.names == other.names
    assert torch.equal(one.weight, other.weight)
    assert one.temperatures == other.temperatures


def test_leaving_a_row_out_is_nearly_fitting_without_it():
    """Exact but for how a row's other tokens vary and the size of one skill's covariance: most of what the row itself
    had changed is taken back."""
    names, errors, naive = list(SKILLS), [], []
    for name, rows in zip(names, GROUPS, strict=True):
        scores, columns = left_out(SKILLS)[name]
        assert list(columns) == names
        keys = SKILLS[name].views.keys.tolist()
        for row in rows:
            rest = [[other for other in group if other is not row] for group in GROUPS]
            expected = relative(by_hand(rest, deciding(row)[None]))[0]
            seen = relative(by_hand(GROUPS, deciding(row)[None]))[0]
            found = relative(scores[keys.index(row.row.key)])
            errors.append((found - expected).abs().max())
            naive.append((seen - expected).abs().max())
    assert sum(errors) < 0.3 * sum(naive)


def test_an_only_row_is_scored_with_itself():
    lonely = {"a": Skill.of([row_states(1)], WIDTH), "b": SKILLS["b"]}
    assert torch.isfinite(left_out(lonely)["a"][0]).all()


def test_texts_of_one_token_are_no_accident():
    """They do not vary at all, or only from row to row: there is nothing to shrink, and all to be taken back."""
    short = {name: Skill.of([row_states(seed, length=1, prompt=0)], WIDTH) for seed, name in enumerate("ab")}
    pairs = {
        name: Skill.of([row_states(n + seed, centre=n, length=1, prompt=0) for seed in range(2)], WIDTH)
        for n, name in enumerate("ab")
    }
    for skills in (short, pairs):
        found = fit(skills)
        assert torch.isfinite(found.weight).all()
        assert all(0 < temperature < 1e4 for temperature in found.temperatures.values())
        for scores, _ in left_out(skills).values():
            assert torch.isfinite(scores).all()


def test_the_temperature_makes_the_rows_most_likely():
    found = fit(SKILLS)
    scores = left_out(SKILLS)

    def likelihood(temperature):
        own = []
        for column, name in enumerate(found.names):
            rows = scores[name][0]
            total = sum(len(each) for each, _ in scores.values())
            target = torch.full_like(rows, 0.5 / (total + 1) / 2)
            target[:, column] = (total + 0.5) / (total + 1)
            own.append((target * (rows / temperature).log_softmax(-1)).sum(-1).mean())
        return float(torch.stack(own).mean())

    best = found.temperatures["sequence"]
    assert 0.01 < best < 100
    assert likelihood(best) >= max(likelihood(best * 1.02), likelihood(best / 1.02))


def test_one_skill_has_equal_scores():
    found = fit({"a": SKILLS["a"]})
    assert found.weight.abs().max() == 0
    assert found.temperatures == {"token": 1.0, "sequence": 1.0}


@pytest.mark.parametrize("count", [2, 5])
def test_every_skill_weighs_the_same(count):
    """The covariance of 80 rows counts as much as that of few."""
    few, many = skill(0, count), skill(200, 80, centre=1.0)
    within = (few.sums.covariance() + many.sums.covariance()) / 2
    within += SHRINKAGE * within.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    found = fit({"few": few, "many": many}, scored=TOKEN)
    expected = torch.linalg.solve(within, few.sums.mean - many.sums.mean)
    torch.testing.assert_close(found.weight[0] - found.weight[1], expected, rtol=EXACT, atol=EXACT)
    of_rows = (few.views.deciding.T.cov(correction=0) + many.views.deciding.T.cov(correction=0)) / 2
    within = of_rows + COVARIANCE_ROWS / (count + 80 - 2) * within
    found = fit({"few": few, "many": many})
    means = [
        (n * skill.views.deciding.mean(0) + MEAN_ROWS * skill.sums.mean) / (n + MEAN_ROWS)
        for n, skill in ((count, few), (80, many))
    ]
    expected = torch.linalg.solve(within, means[0] - means[1])
    torch.testing.assert_close(found.weight[0] - found.weight[1], expected, rtol=EXACT, atol=EXACT)


def test_rows_follow_the_experts_and_are_zero_without_a_skill():
    found = fit(SKILLS)
    order = [*reversed(found.names), "untaught"]
    weight, bias = found.rows_for(order)
    for row, name in enumerate(order[:-1]):
        column = found.names.index(name)
        assert torch.equal(weight[row], found.weight[column])
        assert bias[row] == found.bias[column]
    assert not weight[-1].any()
    assert bias[-1] == 0
