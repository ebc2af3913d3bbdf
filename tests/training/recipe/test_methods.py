"""Ways of training: the stages that each comes down to, and how a new one is added."""

from __future__ import annotations

import re

import pytest

from dylora_moe.routing.router import ROUTERS
from dylora_moe.schema import RecipeError
from dylora_moe.training.recipe import methods
from dylora_moe.training.recipe.methods import METHODS, Method, Stage
from dylora_moe.training.recipe.recipe import parse_recipe
from runs import SPECIALISTS, STAGED, small_recipe


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
    assert stage_names(content(**SPECIALISTS)) == ["specialists", "router"]
    frozen = content(**STAGED)
    frozen["experts"]["date"]["frozen"] = True
    assert stage_names(frozen) == ["expert-cart", "router", "joint"]


@pytest.mark.parametrize("name", METHODS)
def test_every_way_has_stages_with_names_of_their_own(content, name):
    alone = {"expert": "cart", "router_learning_rate": None, "domain_coefficient": 0}
    train = {"staged": STAGED, "specialists": SPECIALISTS, "expert": alone}
    recipe = content(**{"method": name, **train.get(name, {})}) | {"mixture": {}, "start": "runs/x"}
    stages = parse_recipe(recipe).stages
    assert len({stage.name for stage in stages}) == len(stages) > 0
    assert all(stage.experts or stage.router for stage in stages)


def test_specialists_train_every_expert_that_may_be_and_the_router_sees_all(content):
    recipe = content(**SPECIALISTS)
    recipe["experts"]["date"]["frozen"] = True
    recipe["experts"]["idle"] = {}
    specialists, router = parse_recipe(recipe).stages
    assert (specialists.experts, specialists.domains, specialists.steps) == (("cart",), ("cart",), None)
    assert (specialists.router, specialists.by_steps) == (False, False)
    assert (router.experts, router.domains, router.steps, router.by_steps) == ((), ("date", "cart"), 4, True)


CLOSED = {"router_learning_rate": None, "domain_coefficient": 0}
"""Without what is for a router that is trained."""


@pytest.mark.parametrize("method", ["specialists", "staged"])
def test_the_router_follows_in_closed_form_unless_it_is_to_be_trained(content, monkeypatch, method):
    own = {"method": method, **({"expert_steps": 2} if method == "staged" else {}), **CLOSED}
    monkeypatch.delitem(ROUTERS, "closed_form", raising=False)
    with pytest.raises(RecipeError, match=r"^train\.router: this version has no router in closed form"):
        parse_recipe(content(**own))
    monkeypatch.setitem(ROUTERS, "closed_form", ROUTERS["linear"])
    for given in ({}, {"router": "closed_form"}):
        recipe = parse_recipe(content(**own, **given))
        assert recipe.train.router == "closed_form"
        assert recipe.mixture_config().router_type == "closed_form"
        stage = recipe.stages[-1]
        assert (stage.name, stage.fits, stage.router, stage.by_steps) == ("fit", True, True, False)
        assert parse_recipe(recipe.to_dict()).stages == recipe.stages
    for given in ({"router_steps": 3}, {"router": "trained", "router_steps": 3}):
        recipe = parse_recipe(content(**own, **given))
        assert recipe.train.router == "trained"
        assert recipe.mixture_config().router_type == "mlp"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"router": "closed_form", "router_steps": 3}, "router_steps=3 with `router: closed_form`"),
        ({"router": "trained"}, "`router: trained` needs router_steps"),
        ({"router": "guessed"}, "train.router: expected one of 'trained', 'closed_form'"),
        ({"router_learning_rate": 1e-3}, "router_learning_rate is for the router, which `router: closed_form` does"),
        ({"temperature_start": 2.0}, "temperature_start is for the router, which `router: closed_form` does not"),
        ({"method": "joint", "router": "trained"}, "router is for `method: specialists or staged`; with `joint`"),
        ({"method": "joint", "router_steps": 3}, "router_steps is for `method: specialists or staged`; with `joint`"),
        ({"method": "staged", "expert_steps": 1, "joint_steps": 1}, "joint_steps: a router in closed form is not"),
        ({"method": "staged"}, "`method: staged` needs expert_steps"),
        ({"padding_free": True}, "train.padding_free: a flattened batch is one row of several domains"),
    ],
)
def test_what_does_not_go_with_a_way_is_refused(content, monkeypatch, train, message):
    monkeypatch.setitem(ROUTERS, "closed_form", ROUTERS["linear"])
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_recipe(content(**{"method": "specialists", **CLOSED, **train}))


def test_a_router_in_closed_form_and_one_that_is_trained_are_not_mixed_up(content, monkeypatch):
    monkeypatch.setitem(ROUTERS, "closed_form", ROUTERS["linear"])
    for train, kind in (
        ({"method": "specialists", **CLOSED}, "mlp"),
        (SPECIALISTS, "closed_form"),
        ({}, "closed_form"),
    ):
        recipe = content(**train)
        recipe["mixture"]["router_type"] = kind
        with pytest.raises(RecipeError, match=r"^mixture\.router_type: "):
            parse_recipe(recipe)


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
