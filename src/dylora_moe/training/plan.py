"""What a recipe would do, computed without training: parameters, passes, tokens, steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from dylora_moe.embedded import resolve_base
from dylora_moe.trace import ParameterReport

from .build import base_name, build_mixture
from .job import Job
from .recipe import Recipe
from .stages import thaw


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        name: of the stage.
        trainable: parameters that it trains.
        rows: examples (packed rows, when packing) in one epoch.
        tokens: in one epoch.
        steps: optimizer steps.
        rows_per_step: examples per optimizer step, over all processes.
        passes: forward passes of the base per step and micro-batch: 1.0 where every row is forced.
    """

    name: str
    trainable: int
    rows: int
    tokens: int
    steps: int
    rows_per_step: int
    passes: float

    @property
    def total_tokens(self) -> int:
        """Tokens seen in all steps, about."""
        return round(self.steps * self.rows_per_step * self.tokens / max(self.rows, 1))


@dataclass(frozen=True)
class Plan:
    """A whole run: its parameters and its stages."""

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
    config = AutoConfig.from_pretrained(resolve_base(base_name(recipe)))
    with torch.device("meta"):
        mixture = build_mixture(recipe, AutoModelForCausalLM.from_config(config))
    frozen, stages = set(mixture._frozen_experts), []
    for stage in job.stages:
        arguments = job.arguments(stage)
        stage.set_trainable(mixture)
        dataset = job.dataset(stage.domains)
        tokens = sum(min(len(ids), arguments.max_length or len(ids)) for ids in dataset["input_ids"])
        rows = len(dataset)
        if arguments.packing and arguments.max_length:
            rows = math.ceil(tokens / arguments.max_length)
        batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * job.world_size
        epoch = max(rows // batch if arguments.dataloader_drop_last else math.ceil(rows / batch), 1)
        steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(epoch * arguments.num_train_epochs)
        trainable = mixture.parameter_report().trainable
        passes = mixture.passes_per_step if stage.router else 1.0
        stages.append(StagePlan(stage.name, trainable, rows, tokens, steps, batch, passes))
    thaw(mixture, frozen)
    return Plan(mixture.parameter_report(), mixture.router_layer, stages)
