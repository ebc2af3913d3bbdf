"""The reference page names every key, and is what the dataclasses say today."""

from __future__ import annotations

import dataclasses
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from trl import SFTConfig

from dylora_moe.training.recipe.recipe import TRAIN_ELSEWHERE, library_fields
from dylora_moe.training.recipe.sections import BaseRecipe, DataRecipe, EvalRecipe, ExpertRecipe, Recipe, TrainRecipe
from dylora_moe.training.run.reference import documented, reference_page

PAGE = Path(__file__).resolve().parents[3] / "docs" / "recipe-reference.md"


def test_the_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    if any(f"{package} {version(package)}" not in text for package in ("peft", "trl", "transformers")):
        pytest.skip("made with other versions of the libraries")
    assert text == reference_page()


def test_every_key_has_a_row_and_a_meaning():
    rows = dict(re.findall(r"^\| `(\w+)` \|.* \| (.*) \|$", reference_page(), re.MULTILINE))
    own = {
        f.name
        for cls in (Recipe, BaseRecipe, ExpertRecipe, DataRecipe, TrainRecipe, EvalRecipe)
        for f in dataclasses.fields(cls)
    }
    older = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}  # names of activation_checkpointing
    assert (own - {"arguments"}) | library_fields(SFTConfig, {*TRAIN_ELSEWHERE, *older}) <= set(rows)
    assert all(rows.values())


def test_the_words_come_from_the_docstring():
    words = documented(EvalRecipe)
    assert words["batch_size"] == "rows per batch."
    assert words["metric"].endswith("`loss` is the mean loss per completion token.")
