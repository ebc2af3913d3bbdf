"""The documentation's recipes are recipes, and its rows are examples."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from dylora_moe.data.section import FILE_SUFFIXES, DataRecipe
from dylora_moe.data.sources import load_examples
from dylora_moe.schema import parse_yaml
from dylora_moe.training.recipe.combinations import _exclusions
from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.recipe.sections import TrainRecipe, TwoPhase
from dylora_moe.training.trainer.checkpoints import EXEMPT_FROM_RESUME

DOCS = Path(__file__).resolve().parents[1] / "docs"
DATA = (DOCS / "data.md").read_text(encoding="utf-8")
TRAINING = (DOCS / "training.md").read_text(encoding="utf-8")
PACKED = ({"packing": True}, {"padding_free": True})  # one line of the combinations, two keys


def blocks(text, language):
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found
    return found


@pytest.mark.parametrize("block", [*blocks(DATA, "yaml"), *blocks(TRAINING, "yaml")])
def test_every_recipe_is_valid(block, tmp_path):
    recipe = parse_yaml(block, "the page")
    for expert in recipe["experts"].values():
        for given in (expert["data"].get("train"), expert["data"].get("test")):
            for file in given if isinstance(given, list) else [given]:
                if isinstance(file, str):
                    (tmp_path / file).touch()
    assert list(parse_recipe(recipe, tmp_path).experts) == list(recipe["experts"])


@pytest.mark.parametrize("block", blocks(DATA, "json"))
def test_every_row_is_an_example(block, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(json.loads(block)))
    assert len(load_examples("a", DataRecipe(train=str(tmp_path / "d.jsonl")), "train")) == 1


def test_every_key_and_kind_of_file_is_described():
    words = set(re.findall(r"[\w.]+", DATA))
    assert {field.name for field in fields(DataRecipe)} <= words
    assert {suffix.removesuffix(".gz") for suffix in FILE_SUFFIXES} <= words


def test_every_recipe_file_and_every_key_of_training_is_named():
    words = set(re.findall(r"\w+", TRAINING))
    assert all(f"`{file.name}`" in TRAINING for file in (DOCS.parent / "recipes").glob("*.yaml"))
    described_with_the_data = {"mixing", "mixing_temperature", "too_long"}
    keys = {field.name for field in fields(TrainRecipe)} | {field.name for field in fields(TwoPhase)}
    assert keys - {"arguments"} - described_with_the_data <= words
    assert described_with_the_data <= set(re.findall(r"\w+", DATA))


def test_every_refused_combination_is_in_the_table():
    recipes = [parse_recipe({"experts": {"a": {"data": {"skill": "sql"}}}, "train": train}) for train in PACKED]
    refused = Counter(key for key, *_ in _exclusions(recipes[0])) | Counter(key for key, *_ in _exclusions(recipes[1]))
    table = TRAINING[TRAINING.index("## What cannot be combined") :]
    rows = Counter(re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE))
    assert Counter(re.sub(r"^experts\..*", "experts.NAME", key) for key in refused.elements()) == rows


def test_what_a_resumed_run_may_log_differently_is_listed():
    assert set(EXEMPT_FROM_RESUME) <= set(re.findall(r"`(\w+)`", TRAINING))
