"""The documentation's recipes are recipes, and its rows are examples."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dylora_moe.training.recipe import DataRecipe, parse_recipe
from dylora_moe.training.sections import FILE_SUFFIXES
from dylora_moe.training.sources import load_examples

DATA = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language):
    found = re.findall(rf"^```{language}\n(.*?)^```", DATA, re.DOTALL | re.MULTILINE)
    assert found
    return found


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_recipe_is_valid(block, tmp_path):
    recipe = yaml.safe_load(block)
    for expert in recipe["experts"].values():
        for file in (expert["data"].get("train"), expert["data"].get("test")):
            if isinstance(file, str):
                (tmp_path / file).touch()
    assert list(parse_recipe(recipe, tmp_path).experts) == list(recipe["experts"])


@pytest.mark.parametrize("block", blocks("json"))
def test_every_row_is_an_example(block, tmp_path):
    (tmp_path / "d.jsonl").write_text(block)
    assert len(load_examples("a", DataRecipe(train=str(tmp_path / "d.jsonl")), "train")) == 1


def test_every_key_and_kind_of_file_is_described():
    words = set(re.findall(r"[\w.]+", DATA))
    assert {field.name for field in fields(DataRecipe)} <= words
    assert {suffix.removesuffix(".gz") for suffix in FILE_SUFFIXES} <= words
