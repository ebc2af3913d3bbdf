"""The trainer's arguments: the recipe's before our defaults."""

from __future__ import annotations

from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.run.job import Job
from runs import QUIET


def test_checkpointing_is_on_under_either_name(content):
    for key in ("activation_checkpointing", "gradient_checkpointing"):
        job = Job(parse_recipe(content(**{key: True})), QUIET)
        job.read_data()
        assert job.arguments(job.stages[0]).activation_checkpointing is True
