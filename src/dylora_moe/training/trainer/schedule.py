"""Schedules over the steps of a stage: the two-phase learning rate and the router's temperature."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dylora_moe.model import DyLoraMoE
from dylora_moe.training.recipe.sections import TwoPhase


def two_phase_scheduler(phases: TwoPhase, optimizer: Optimizer, total: int, warmup: int = 0) -> LambdaLR:
    """The scheduler of a run of `total` steps, a multiplier on every parameter group's own rate."""
    return LambdaLR(optimizer, lambda step: phases.multiplier(step, total, warmup))


class TemperatureSchedule(TrainerCallback):
    """Cools the router geometrically from `start` to the temperature the mixture was configured with.

    A high temperature lets every expert learn from every token at first. The value hangs on the step alone, so that a
    resumed run goes on with it; when training ends, the mixture has its configured temperature.

    Args:
        mixture: whose `moe_config.temperature` is set before every step.
        start: the temperature of the first step.
        share: share of the steps after which the final temperature is reached, above 0 and at most 1.
    """

    def __init__(self, mixture: DyLoraMoE, start: float, share: float = 1.0):
        self.mixture, self.start, self.share = mixture, start, share
        self.end = mixture.moe_config.temperature

    def at(self, step: int, total: int) -> float:
        """The temperature of optimizer step `step` (from 0) of `total`."""
        done = min(step / max(self.share * total - 1, 1), 1.0)
        return self.end if done == 1 else self.start * (self.end / self.start) ** done

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.mixture.moe_config.temperature = self.at(state.global_step, state.max_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.mixture.moe_config.temperature = self.end
