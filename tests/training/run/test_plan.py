"""The plan says what the run then does."""

from __future__ import annotations

import pytest

from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.run.plan import plan
from runs import STAGED, run


@pytest.mark.parametrize(
    "train",
    [
        pytest.param({"gradient_accumulation_steps": 3}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 3, "dataloader_drop_last": True, "per_device_train_batch_size": 5},
        pytest.param({"packing": True, "max_length": 128, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_plan_counts_the_steps_and_tokens_that_run(content, train):
    """One epoch; the tokens are those that the trainer counted."""
    recipe = content(num_train_epochs=1, logging_steps=1, **train)
    [stage] = plan(parse_recipe(recipe)).stages
    job = run(recipe)
    rows = [row for row in job.folder.history(job.stages) if "loss" in row]
    assert len(rows) == stage.steps
    assert rows[-1]["num_tokens"] == pytest.approx(
        stage.total_tokens, rel=0.1 if "dataloader_drop_last" in train else 0
    )


def test_a_run_without_a_step_is_refused_before_it_starts(content, tmp_path):
    """The second stage makes none: neither is the first one trained."""
    few = {"per_device_train_batch_size": 4, "dataloader_drop_last": True}
    recipe = content(**STAGED, **few)
    next(reversed(recipe["experts"].values()))["data"]["train"] = 3
    for start in (lambda: plan(parse_recipe(recipe)), lambda: run(recipe)):
        with pytest.raises(ValueError, match="stage expert-cart would make no optimizer step: 3 rows do not fill"):
            start()
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
