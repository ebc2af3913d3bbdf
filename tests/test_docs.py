"""The documentation's recipes are recipes, and its rows are examples."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import pytest

from dylora_moe.data.section import FILE_SUFFIXES, DataRecipe
from dylora_moe.data.sources import load_examples
from dylora_moe.schema import parse_yaml
from dylora_moe.training.recipe import combinations
from dylora_moe.training.recipe.combinations import _exclusions
from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.recipe.sections import TrainRecipe, TwoPhase
from dylora_moe.training.trainer.checkpoints import EXEMPT_FROM_RESUME
from pages import PAGES, ROOT, blocks

DOCS = ROOT / "docs"
DATA = (DOCS / "data.md").read_text(encoding="utf-8")
TRAINING = (DOCS / "training.md").read_text(encoding="utf-8")
PACKED = ({"packing": True}, {"padding_free": True})  # one line of the combinations, two keys


RECIPES = [block for file in PAGES for block in blocks(file, "yaml")]
ROWS = [block for file in PAGES for block in blocks(file, "json")]
INSTALLED = SimpleNamespace(util=SimpleNamespace(find_spec=lambda module: module))


@pytest.mark.parametrize("block", RECIPES, ids=lambda block: block.page)
def test_every_recipe_is_valid(block, tmp_path, monkeypatch):
    monkeypatch.setattr(combinations, "importlib", INSTALLED)  # bitsandbytes
    recipe = parse_yaml(block.text, block.page)
    for expert in recipe["experts"].values():
        for given in (expert["data"].get("train"), expert["data"].get("test")):
            for file in given if isinstance(given, list) else [given]:
                if isinstance(file, str):
                    (tmp_path / file).touch()
    assert list(parse_recipe(recipe, tmp_path).experts) == list(recipe["experts"])


@pytest.mark.parametrize("block", ROWS, ids=lambda block: block.page)
def test_every_row_is_an_example(block, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(json.loads(block.text)))
    assert len(load_examples("a", DataRecipe(train=str(tmp_path / "d.jsonl")), "train")) == 1


def test_every_link_leads_somewhere():
    for file in PAGES:
        text = file.read_text(encoding="utf-8")
        for target, _, heading in re.findall(r"\]\((?!http)([^)#\s]*)(#([^)\s]+))?\)", text):
            page = (file.parent / target).resolve() if target else file
            assert page.exists(), f"{file.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
                assert heading in anchors, f"{file.name}: {target}#{heading}"


def test_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(docs/{file.name}" in readme for file in DOCS.glob("*.md"))


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
