"""Plain values to typed ones: YAML as in YAML 1.2, and fields whose values are the rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from dylora_moe.schema import RecipeError, build, choice, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.5E4", 1.5e4), ("-2e+1", -20.0), ("7", 7), ("1e-3x", "1e-3x"), ("e3", "e3")]
)
def test_numbers_are_read_as_in_yaml_1_2(text, value):
    result = parse_yaml(f"x: {text}", "the text")["x"]
    assert result == value
    assert type(result) is type(value)


@dataclass(frozen=True)
class Tea:
    leaf: str = choice(("green", "black"), "green")


def test_a_choice_is_one_of_the_names_in_its_table():
    assert build(Tea, {}).leaf == "green"
    assert build(Tea, {"leaf": "black"}).leaf == "black"
    for wrong in ("red", 3, None):
        with pytest.raises(RecipeError, match=rf"^leaf: expected one of 'green', 'black', got {wrong!r}\.$"):
            build(Tea, {"leaf": wrong})
