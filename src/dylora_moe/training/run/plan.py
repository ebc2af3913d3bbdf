"""What a recipe would do, computed without training: parameters, passes, tokens, steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from dylora_moe.base.embedded import resolve_base
from dylora_moe.reports import ParameterReport
from dylora_moe.training.recipe.sections import Recipe
from dylora_moe.training.trainer.steps import batches_of, check_steps, rows_of

from .arguments import recipe_text
from .build import base_name, base_title, build_mixture, code_options
from .job import Job
from .stages import set_trainable, thaw


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        name: of the stage.
        trainable: parameters that it trains.
        rows: examples (packed rows, when packing) in one epoch.
        tokens: in one epoch.
        steps: optimizer steps.
        rows_per_step: examples per optimizer step, over all processes; the last step of an epoch may have fewer.
        tokens_per_step: about, as a mean over an epoch.
        passes: forward passes of the base per step and micro-batch: 1.0 where every row is forced.

    A stage that computes the router has rows, and neither steps nor tokens.
    """

    name: str
    trainable: int
    rows: int
    tokens: int
    steps: int
    rows_per_step: int
    tokens_per_step: float
    passes: float

    @property
    def total_tokens(self) -> int:
        """Tokens seen in all steps, about."""
        return round(self.steps * self.tokens_per_step)


@dataclass(frozen=True)
class Plan:
    """A whole run: its base, its resolved recipe, its parameters and its stages."""

    base: str
    recipe: str
    parameters: ParameterReport
    router_layer: int | str
    stages: list[StagePlan]


def plan(recipe: Recipe) -> Plan:
    """What `Job(recipe).run()` would do. Reads the data and the tokenizer; the base is built without its weights.

    Raises:
        DataError, RecipeError, ValueError: as the run itself would, before it trains.
    """
    job = Job(recipe, Console(quiet=True))
    job.read_data()
    options = code_options(recipe)
    config = AutoConfig.from_pretrained(resolve_base(base_name(recipe)), **options)
    with torch.device("meta"):
        mixture = build_mixture(recipe, AutoModelForCausalLM.from_config(config, **options))
    frozen, stages = set(mixture.frozen_experts), []
    for stage in job.stages:
        if stage.fits:
            rows = sum(len(job.train[name]) for name in stage.domains)
            stages.append(StagePlan(stage.name, 0, rows, 0, 0, 0, 0.0, mixture.passes_per_step))
            continue
        arguments = job.arguments(stage)
        set_trainable(mixture, stage)
        dataset = job.dataset(stage.domains)
        lengths = [min(len(ids), arguments.max_length or len(ids)) for ids in dataset["input_ids"]]
        rows, accumulated = rows_of(dataset, arguments), arguments.gradient_accumulation_steps
        check_steps(rows, arguments, job.world_size, f"stage {stage.name}")
        batch = arguments.per_device_train_batch_size * job.world_size
        batches = batches_of(rows, arguments, job.world_size)
        epoch = max(math.ceil(batches / accumulated), 1)
        steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(epoch * arguments.num_train_epochs)
        seen = min(batches * batch, rows) / max(rows, 1)  # the rest of an epoch is dropped
        tokens = sum(lengths)
        trainable = mixture.parameter_report().trainable
        passes = mixture.passes_per_step if stage.router else 1.0
        per_step = tokens * seen / epoch
        stages.append(StagePlan(stage.name, trainable, rows, tokens, steps, batch * accumulated, per_step, passes))
    thaw(mixture, frozen)
    text = recipe_text(recipe, job.context)
    return Plan(base_title(recipe), text, mixture.parameter_report(), mixture.router_layer, stages)
