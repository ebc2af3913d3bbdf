"""The trainer's arguments, from a recipe and our defaults."""

from __future__ import annotations

from pathlib import Path

import torch
from trl import SFTConfig

from dylora_moe.training.recipe.sections import Recipe

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
    given = recipe.train.arguments
    arguments = {**DEFAULT_ARGUMENTS, **given}
    if "gradient_checkpointing" in given:  # the older name, which our default for the newer one would outdo
        arguments = {**arguments, "activation_checkpointing": given["gradient_checkpointing"], **given}
    arguments.setdefault("max_length", None if arguments.get("padding_free") else context)
    arguments.setdefault("use_cpu", not torch.accelerator.is_available())
    if steps is not None:
        arguments["max_steps"] = steps
    return SFTConfig(output_dir=str(folder), seed=recipe.seed, **arguments)
