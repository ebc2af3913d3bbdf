"""Ways of training: the stages that each comes down to, and how a new one is added."""

from __future__ import annotations

import pytest

from dylora_moe.schema import RecipeError
from dylora_moe.training.recipe import methods
from dylora_moe.training.recipe.methods import METHODS, Method, Stage
from dylora_moe.training.recipe.recipe import parse_recipe
from runs import STAGED, small_recipe


@pytest.fixture
def content(tmp_path):
    """A recipe as plain values; keyword arguments are keys of `train`."""
    return lambda **train: small_recipe("embedded", tmp_path, **train)


def stage_names(content: dict) -> list[str]:
    return [stage.name for stage in parse_recipe(content).stages]


def test_stages_of_every_method(content):
    assert stage_names(content(max_steps=2)) == ["joint"]
    assert stage_names(content(**STAGED)) == ["expert-date", "expert-cart", "router", "joint"]
    assert stage_names({**content(method="router"), "mixture": {}, "start": "runs/x"}) == ["router"]
    alone = content(method="expert", expert="cart")
    for key in ("router_learning_rate", "domain_coefficient"):
        del alone["train"][key]
    assert stage_names(alone) == ["expert-cart"]
    frozen = content(**STAGED)
    frozen["experts"]["date"]["frozen"] = True
    assert stage_names(frozen) == ["expert-cart", "router", "joint"]


@pytest.mark.parametrize("name", METHODS)
def test_every_way_has_stages_with_names_of_their_own(content, name):
    train = {"staged": STAGED, "expert": {"expert": "cart", "router_learning_rate": None, "domain_coefficient": 0}}
    recipe = content(**{"method": name, **train.get(name, {})}) | {"mixture": {}, "start": "runs/x"}
    stages = parse_recipe(recipe).stages
    assert len({stage.name for stage in stages}) == len(stages) > 0
    assert all(stage.experts or stage.router for stage in stages)


def test_a_row_in_the_table_is_a_way_in_recipes(content, monkeypatch):
    """What the recipe refuses of it follows from the row; only its name is fixed when the sections are made."""
    twice = Method(
        lambda way, roster: [Stage(f"joint-{i}", roster.free, True, roster.with_data) for i in range(2)],
        lambda way, roster: [("experts", len(roster.trained) < 2, "two are needed.")],
    )
    monkeypatch.setitem(methods.METHODS, "joint", twice)
    assert stage_names(content(max_steps=2)) == ["joint-0", "joint-1"]
    one = content(max_steps=2)
    del one["experts"]["cart"]
    with pytest.raises(RecipeError, match=r"^experts: two are needed\."):
        parse_recipe(one)
