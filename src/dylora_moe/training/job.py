"""The main job: from a recipe to a trained, measured and saved mixture."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from dylora_moe.embedded import resolve_base
from dylora_moe.evaluation.held_out import answers, by_domain, completion_loss, exact_match
from dylora_moe.model import DyLoraMoE

from .callbacks import ProgressBar
from .data import Example, TooLong, fit_to_length, mix, to_dataset
from .recipe import Recipe
from .sections import MIXING_TEMPERATURE
from .sources import load_recipe_examples
from .trainer import MoETrainer, unwrap_head

RESULTS_FILE = "results.json"
RECIPE_FILE = "recipe.yaml"
ROUTINGS = ("mixture", "top1", "top2")


@dataclass
class Results:
    """What a run measured.

    Attributes:
        metric: `exact_match` (shares) or `loss` (nats per completion token).
        columns: column (`base`, `mixture` for dense weights, `top1`, `top2`, `single`) → domain → value.
        load: domain → expert → share of the tokens, under the default routing.
        reloaded_identical: whether the saved checkpoint, loaded again, gave the same answers.
        seconds: phase → wall time.
        output: the checkpoint's folder.
    """

    metric: str
    output: str
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    load: dict[str, dict[str, float]] = field(default_factory=dict)
    reloaded_identical: bool | None = None
    passes_per_step: float = 1.0
    parameters: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `results.json`."""
        return {
            **self.columns,
            "load": self.load,
            "metric": self.metric,
            "reloaded_identical": self.reloaded_identical,
            "passes_per_step": self.passes_per_step,
            "parameters": self.parameters,
            "phases": {name: round(value, 2) for name, value in self.seconds.items()},
            "seconds": round(sum(self.seconds.values()), 2),
        }


class Job:
    """One run of a recipe; `run()` does everything.

    Args:
        recipe: what to do.
        console: where progress is shown.
    """

    def __init__(self, recipe: Recipe, console: Console | None = None):
        self.recipe, self.console = recipe, console or Console()
        self.output = Path(recipe.output)
        self.results = Results(recipe.eval.metric, str(self.output))

    def run(self) -> Results:
        """Train, measure, save, reload and compare.

        Raises:
            DataError: data that cannot be used; nothing has been trained or written then.
            ValueError: settings that do not fit the base.
        """
        recipe = self.recipe
        set_seed(recipe.seed)
        if self.output.is_file():
            raise ValueError(f"output: {self.output} is a file; give a folder.")
        with self._phase("data"):
            train, test = load_recipe_examples(recipe)
        with self._phase("load"):
            base, self.tokenizer = load_base_and_tokenizer(recipe)
            too_long = recipe.train.too_long
            train = {name: self._fitting(name, examples, too_long, "training") for name, examples in train.items()}
            if recipe.eval.metric == "loss":  # a row that was cut could have lost its answer
                fitting = [self._fitting(n, rows, "drop", "held-out") for n, rows in by_domain(test).items()]
                test = [example for examples in fitting for example in examples]
        with self._phase("evaluate base"):
            self.results.columns["base"] = self._measure(base, test, "base")
        with self._phase("build"):
            set_seed(recipe.seed)
            mixture = build_mixture(recipe, base)
        with self._phase("train"):
            self._train(mixture, train)
        self.results.passes_per_step = mixture.passes_per_step
        report = mixture.parameter_report()
        self.results.parameters = {**report.experts, "router": report.router, "base": report.base}
        default_k = mixture.moe_config.top_k
        ks = {"mixture": mixture.router.num_outputs, "top1": 1, "top2": min(2, mixture.router.num_outputs)}
        for name in ROUTINGS:
            with self._phase(f"evaluate {name}"):
                mixture.moe_config.top_k = ks[name]
                self.results.columns[name] = self._measure(mixture, test, name)
        mixture.moe_config.top_k = default_k
        with self._phase("save and reload"):
            self._load_per_domain(mixture, test)
            mixture.save_pretrained(self.output, results=self.results.columns)
            self.tokenizer.save_pretrained(self.output)
            self.results.reloaded_identical = self._reloads(mixture, test)
        if recipe.eval.baseline:
            with self._phase("single LoRA"):
                self.results.columns["single"] = self._single(mixture, train, test)
        self._write()
        return self.results

    # ------------------------------------------------------------------ phases

    def _fitting(self, name: str, examples: list[Example], too_long: TooLong, what: str) -> list[Example]:
        length = self.recipe.train.arguments.get("max_length") or self.context
        what = f"the {what} data of {name!r}"
        return fit_to_length(examples, self.tokenizer, length, too_long, self.recipe.base.chat, what)

    def examples_to_try(self) -> list[str]:
        """A held-out prompt of each domain."""
        return [examples[0].question for examples in by_domain(load_recipe_examples(self.recipe)[1]).values()]

    @property
    def context(self) -> int:
        """The longest sequence the base was made for, in tokens."""
        return self.tokenizer.model_max_length

    def _train(self, mixture: DyLoraMoE, train: dict[str, list[Example]]) -> None:
        recipe = self.recipe.train
        if recipe.method == "staged":
            rest = {"domain_coefficient": 0.0, "router_learning_rate": None}
            self._fit(mixture, train, "experts", max_steps=recipe.expert_steps, force_domains=True, **rest)
            frozen = [name for name in mixture.expert_names if name not in mixture._frozen_experts]
            for name in frozen:
                mixture.freeze_expert(name)
            self._fit(mixture, train, "router", max_steps=recipe.router_steps)
            for name in frozen:
                mixture.unfreeze_expert(name)
        else:
            self._fit(mixture, train, "mixture")

    def _fit(
        self,
        mixture: DyLoraMoE,
        train: dict[str, list[Example]],
        title: str,
        max_steps: int | None = None,
        **options: Any,
    ) -> None:
        settings = self.recipe.train
        options = {
            "domain_coefficient": settings.domain_coefficient,
            "router_learning_rate": settings.router_learning_rate,
            **options,
        }
        trainer = MoETrainer(
            mixture,
            args=self._arguments(max_steps),
            train_dataset=self._dataset(train),
            processing_class=self.tokenizer,
            callbacks=[ProgressBar(self.console, title)],
            **options,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def _single(self, mixture: DyLoraMoE, train: dict[str, list[Example]], test: list[Example]) -> dict[str, float]:
        """A single LoRA of the summed rank on the same layers and data, with the same settings."""
        set_seed(self.recipe.seed)
        config = single_lora_config(mixture)
        base, _ = load_base_and_tokenizer(self.recipe)
        model: Any = get_peft_model(base, config)
        trainer = SFTTrainer(
            model,
            args=self._arguments(None),
            train_dataset=self._dataset(train).remove_columns("domain"),
            processing_class=self.tokenizer,
            callbacks=[ProgressBar(self.console, "single LoRA")],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.get_base_model().__dict__.pop("forward", None)
        return self._measure(model, test, "single")

    def _arguments(self, max_steps: int | None) -> SFTConfig:
        arguments = {
            "learning_rate": 1e-3,
            "logging_steps": 5,
            "save_strategy": "no",
            "report_to": "none",
            "activation_checkpointing": False,
            "bf16": False,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            **self.recipe.train.arguments,
        }
        arguments.setdefault("max_length", self.context)
        if max_steps is not None:
            arguments["max_steps"] = max_steps
        return SFTConfig(output_dir=str(self.output), seed=self.recipe.seed, **arguments)

    def _dataset(self, train: dict[str, list[Example]]) -> Any:
        settings = self.recipe.train
        weights = {name: expert.data.weight for name, expert in self.recipe.experts.items()}
        temperature = settings.mixing_temperature or MIXING_TEMPERATURE
        mixed = mix(train, settings.mixing, self.recipe.seed, weights, temperature)
        completion_only = settings.arguments.get("completion_only_loss") is not False
        return to_dataset(mixed, self.tokenizer, self.recipe.base.chat, completion_only)

    # ------------------------------------------------------------------ measuring

    def _measure(self, model: Any, test: list[Example], title: str) -> dict[str, float]:
        if not test:
            return {}
        if self.recipe.eval.metric == "exact_match":
            return exact_match(self._answers(model, test, title), test)
        result = {}
        with self._bar(f"evaluate {title}", len(test)) as progress:
            for examples in by_domain(test).values():
                length = self.recipe.train.arguments.get("max_length") or self.context
                result |= completion_loss(
                    model, self.tokenizer, examples, max_length=length, progress=progress, **self._options()
                )
        return result

    def _answers(self, model: Any, test: list[Example], title: str) -> list[str]:
        texts: list[str] = []
        with self._bar(f"evaluate {title}", len(test)) as progress:
            for examples in by_domain(test).values():
                options = {**self._options(), "max_new_tokens": self.recipe.eval.max_new_tokens}
                texts += answers(model, self.tokenizer, examples, progress=progress, **options)
        return texts

    def _options(self) -> dict[str, Any]:
        return {"batch_size": self.recipe.eval.batch_size, "chat": self.recipe.base.chat}

    def _load_per_domain(self, mixture: DyLoraMoE, test: list[Example]) -> None:
        for domain, examples in by_domain(test).items():
            with mixture.trace() as trace:
                completion_loss(mixture, self.tokenizer, examples[:32], **self._options())
            self.results.load[domain] = {name: round(share, 4) for name, share in trace.load().items()}

    def _reloads(self, mixture: DyLoraMoE, test: list[Example], per_domain: int = 4) -> bool:
        """Whether the saved checkpoint answers as the mixture in memory does."""
        sample = [example for examples in by_domain(test).values() for example in examples[:per_domain]]
        if not sample:
            return True
        again = DyLoraMoE.from_pretrained(str(self.output), dtype=getattr(torch, self.recipe.base.dtype))
        return self._answers(mixture, sample, "saved") == self._answers(again, sample, "reloaded")

    def _write(self) -> None:
        file = self.output / RESULTS_FILE
        file.write_text(json.dumps(self.results.to_dict(), indent=2) + "\n", encoding="utf-8")
        text = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        (self.output / RECIPE_FILE).write_text(text, encoding="utf-8")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.results.seconds[name] = time.perf_counter() - started

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Any]:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.advance(task, done)


def load_base_and_tokenizer(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's base and its tokenizer, whose `model_max_length` is the base's context."""
    path = resolve_base(recipe.base.model)
    revision = {"revision": recipe.base.revision} if recipe.base.revision else {}
    tokenizer = AutoTokenizer.from_pretrained(path, **revision)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, recipe.base.dtype), **revision)
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if context:
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return base, tokenizer


def build_mixture(recipe: Recipe, base: PreTrainedModel) -> DyLoraMoE:
    """The untrained mixture of a recipe on `base`."""
    config = recipe.mixture_config()
    own = {name: config.expert_config(**expert.lora) for name, expert in recipe.experts.items() if expert.lora}
    mixture = DyLoraMoE.from_base(base, config, own)
    folder = Path(recipe.base.model)
    mixture.base_name = str(folder.resolve()) if folder.is_dir() else recipe.base.model
    return mixture


def single_lora_config(mixture: DyLoraMoE) -> LoraConfig:
    """A single LoRA on the mixture's layers whose rank is the sum of the experts' and whose scaling is the same."""
    config = mixture.moe_config
    targets = sorted({layer.routing_name for layer in mixture._layers})
    total = sum(mixture.lora_config(name).r for name in mixture.expert_names)
    return config.expert_config(
        r=total,
        lora_alpha=config.lora_alpha * total / config.r,
        target_modules=targets,
        layers_to_transform=None,
        exclude_modules=None,
    )


__all__ = ["Job", "Results", "build_mixture", "load_base_and_tokenizer", "single_lora_config", "unwrap_head"]
