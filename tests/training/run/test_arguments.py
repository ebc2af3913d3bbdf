"""The trainer's arguments: the recipe's before our defaults."""

from __future__ import annotations

import logging

import pytest

from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.run.arguments import resolved
from dylora_moe.training.run.job import Job
from dylora_moe.training.trainer.trainer import MoETrainer
from runs import QUIET, STAGED, run


def test_checkpointing_is_on_under_either_name(content):
    for key in ("activation_checkpointing", "gradient_checkpointing"):
        job = Job(parse_recipe(content(**{key: True})), QUIET)
        job.read_data()
        assert job.arguments(job.stages[0]).activation_checkpointing is True


def test_a_resolved_recipe_resolves_to_itself(content):
    for train in ({"max_steps": 2}, {"gradient_checkpointing": True}, {"padding_free": True}, STAGED):
        values = resolved(parse_recipe(content(**train)), 256)
        assert resolved(parse_recipe(values), 256) == values
        assert values["train"]["learning_rate"] == 1e-2
        assert values["train"]["max_length"] == (None if "padding_free" in train else 256)


def test_a_resumed_run_warns_of_nothing(content, caplog, monkeypatch):
    """Intervals that are shares of a stage are no others when it is gone on with."""

    def cut(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(MoETrainer, "save_model", cut)
    with pytest.raises(KeyboardInterrupt):
        run(content(max_steps=8, save_steps=0.25))
    monkeypatch.undo()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        run(content(max_steps=8, save_steps=0.25), resume=True)
    assert not [message for message in caplog.messages if "save_steps" in message]
