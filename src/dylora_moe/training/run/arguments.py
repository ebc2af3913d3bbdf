"""The trainer's arguments, from a recipe and our defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig

from dylora_moe.training.recipe.sections import SECRETS, Recipe

DEFAULT_ARGUMENTS = {
    "learning_rate": 1e-3,
    "logging_steps": 5,
    "save_strategy": "steps",
    "save_steps": 0.25,  # of the stage
    "save_total_limit": 2,
    "report_to": "none",
    "activation_checkpointing": False,
    "bf16": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}
"""Where a recipe's `train` differs from the defaults of `trl.SFTConfig`."""


def trainer_arguments(recipe: Recipe, folder: Path, context: int, steps: int | None = None) -> SFTConfig:
    """The arguments of one trainer.

    Args:
        recipe: what it sets under `train` goes before our defaults.
        folder: of the stage's checkpoints.
        context: the longest sequence the base was made for, in tokens.
        steps: optimizer steps; default what the recipe's `max_steps` or `num_train_epochs` say.

    Raises:
        ValueError: a value that TRL or transformers refuse.
    """
    arguments = resolved_arguments(recipe, context)
    arguments.setdefault("use_cpu", not torch.accelerator.is_available())
    if steps is not None:
        arguments["max_steps"] = steps
    return SFTConfig(output_dir=str(folder), seed=recipe.seed, **arguments)


def resolved_arguments(recipe: Recipe, context: int) -> dict[str, Any]:
    """The fields of `SFTConfig` that the recipe sets or that differ from its defaults, whatever the machine."""
    given = recipe.train.arguments
    arguments = {**DEFAULT_ARGUMENTS, **given}
    if "gradient_checkpointing" in given:  # the older name, which our default for the newer one would outdo
        arguments = {**arguments, "activation_checkpointing": given["gradient_checkpointing"], **given}
    arguments.setdefault("max_length", None if arguments.get("padding_free") else context)
    return arguments


def resolved(recipe: Recipe, context: int) -> dict[str, Any]:
    """The recipe as plain values with everything that the run uses, no secrets; a recipe itself."""
    values = recipe.to_dict()
    arguments = resolved_arguments(recipe, context)
    values["train"].update({key: value for key, value in arguments.items() if key not in SECRETS})
    return values


def recipe_text(recipe: Recipe, context: int) -> str:
    """The resolved recipe as YAML; what this machine decides is a comment."""
    text = yaml.safe_dump(resolved(recipe, context), sort_keys=False, allow_unicode=True)
    decided = "use_cpu" not in recipe.train.arguments and not torch.accelerator.is_available()
    return text + ("# On this machine, which has no accelerator, also: train.use_cpu: true\n" if decided else "")


def keep_intervals(arguments: TrainingArguments, checkpoint: Path) -> None:
    """Give intervals that are shares of a stage in the steps that its checkpoint counted them to be.

    Trainer compares the two when it resumes, and would call the same interval a difference.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    for key in ("logging_steps", "eval_steps", "save_steps"):
        if (getattr(arguments, key) or 1) < 1:
            setattr(arguments, key, getattr(state, key))
