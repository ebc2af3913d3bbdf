"""How far two skills are apart, against the definition on D×D matrices and against random deals of the rows."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.skills.separation import SAME, SHRINKAGE, nearest, separation
from topics import WIDTH, skill


def rows(count: int, seed: int, centre: float = 0.0, width: int = WIDTH) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 2.0, width, dtype=torch.float64)
    return torch.randn(count, width, generator=made, dtype=torch.float64) * scale + centre


def by_definition(one: torch.Tensor, other: torch.Tensor) -> float:
    both = torch.cat([one, other])
    N, C = len(both), torch.cov(both.T)
    S = C + SHRINKAGE * C.trace() / len(C) * torch.eye(len(C), dtype=C.dtype)
    d = one.mean(0) - other.mean(0)
    q, expected = len(one) * len(other) / N * d @ torch.linalg.solve(S, d), torch.linalg.solve(S, C).trace()
    return float((q / (1 - q / (N - 1))) / (expected / (1 - expected / (N - 1))))


@pytest.mark.parametrize(("n", "m", "width"), [(30, 20, 12), (5, 7, 40), (1, 4, 12), (1, 1, 12)])
def test_it_is_what_it_is_defined_to_be(n, m, width):
    one, other = rows(n, 0, width=width), rows(m, 1, 0.5, width)
    assert separation(one, other) == pytest.approx(by_definition(one, other), rel=1e-9)
    assert separation(other, one) == pytest.approx(separation(one, other), rel=1e-9)


def test_with_many_rows_and_little_shrinkage_it_is_t_squared_over_d(monkeypatch):
    monkeypatch.setattr("dylora_moe.skills.separation.SHRINKAGE", 1e-12)
    one, other = rows(600, 0), rows(400, 1, 0.05)
    within = (599 * torch.cov(one.T) + 399 * torch.cov(other.T)) / 998
    d = one.mean(0) - other.mean(0)
    hotelling = 600 * 400 / 1000 * d @ torch.linalg.solve(within, d)
    assert separation(one, other) == pytest.approx(float(hotelling) / WIDTH, rel=0.02)  # of D / N


@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize("width", [WIDTH, 200])
def test_rows_of_one_kind_are_the_same_however_few(count, width):
    kind = rows(2 * count, 3, width=width)
    deals = [torch.randperm(len(kind), generator=torch.Generator().manual_seed(seed)) for seed in range(60)]
    found = torch.tensor([separation(kind[deal[:count]], kind[deal[count:]]) for deal in deals])
    assert float(found.median()) == pytest.approx(1, abs=0.25)
    assert float((found < SAME).double().mean()) >= 0.85
    assert separation(kind[:count], rows(count, 4, 1.0, width)) > float(found.max())


def test_the_nearest_skill_is_named():
    skills = {"a": skill(0, 8, 0.0), "b": skill(20, 8, 3.0), "c": skill(40, 8, 5.0)}
    found = nearest(skills, skills)
    assert {name: other for name, (other, _) in found.items()} == {"a": "b", "b": "c", "c": "b"}
    assert found["b"][1] == found["c"][1] < found["a"][1]
    assert nearest(skills, ["c"]) == {"c": found["c"]}
    assert nearest({"a": skills["a"]}, ["a"]) == {}
    same = nearest({"a": skills["a"], "again": skills["a"]}, ["a"])
    assert same["a"] == ("again", pytest.approx(0, abs=1e-6))


def test_rows_without_any_difference():
    assert separation(torch.ones(2, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)) == 0
