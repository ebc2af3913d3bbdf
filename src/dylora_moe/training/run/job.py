"""The main job: from a recipe to a trained, measured and saved mixture."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any, cast

import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from dylora_moe.checkpoint.files import CheckpointError, write_file
from dylora_moe.data.examples import MIXING_TEMPERATURE, Example, TooLong, fingerprint, fit_to_length, mix, to_dataset
from dylora_moe.evaluation.held_out import Measured, by_domain
from dylora_moe.evaluation.metrics import METRICS
from dylora_moe.model import DyLoraMoE
from dylora_moe.training.recipe.methods import Stage
from dylora_moe.training.recipe.sections import Recipe
from dylora_moe.training.trainer.callbacks import ProgressBar
from dylora_moe.training.trainer.checkpoints import last_complete
from dylora_moe.training.trainer.distributed import one_device
from dylora_moe.training.trainer.schedule import TemperatureSchedule
from dylora_moe.training.trainer.steps import check_steps, rows_of
from dylora_moe.training.trainer.trainer import MoETrainer

from .arguments import keep_intervals, resolved_arguments, trainer_arguments
from .build import (
    base_of,
    base_title,
    build_mixture,
    load_recipe_examples,
    load_tokenizer,
    loading_options,
    single_lora_config,
)
from .fit import fit_router
from .folder import HISTORY_FILE, RESULTS_FILE, TRAINED, RunFolder, finish, is_finished, load_finished
from .lock import FolderLock
from .measure import Measurement
from .results import Results
from .single import single_rate
from .stages import set_trainable, thaw

PARENT_VARIABLE = "DYLORA_MOE_PARENT"
"""Environment variable of a stage's job: the id of the process that started it and holds the run's lock."""


class Job:
    """One run of a recipe; `run()` does everything.

    Started as one of several processes (torchrun, accelerate), all train and the first one measures and writes.

    Args:
        recipe: what to do.
        console: where progress is shown.
    """

    def __init__(self, recipe: Recipe, console: Console | None = None):
        self.recipe, self.console = recipe, console or Console(emoji=False)
        self.world_size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.folder = RunFolder(recipe, self.world_size)
        self.stages = recipe.stages
        self.results = Results(recipe.eval.metric, str(self.folder.path))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and measures."""
        return self.rank == 0

    def run(self, resume: bool = False, only: str | None = None) -> Results | None:
        """Train, measure, save, reload and compare.

        Args:
            resume: go on from the last whole checkpoint of the run in the output folder.
            only: train this stage and stop, for stages that run as jobs of their own.

        Returns:
            the results; None in all processes but the first, and with `only`.

        Raises:
            DataError: data that cannot be used; nothing has been trained or written then.
            RecipeError: `resume` or `only` with another recipe or other data.
            CheckpointError: nothing to resume, or the folder cannot be written.
            ValueError: settings that do not fit the base; `only` a stage that goes on from one that is not finished;
                another process trains in the folder.
        """
        set_seed(self.recipe.seed)
        if self.recipe.eval.baseline and self.world_size > 1:
            raise ValueError("eval.baseline trains a second model in one process; leave it out with several.")
        alone = None if only is None else self._stage(only)
        with self._phase("data"):
            self.read_data()
        with self.locked(alone):
            if alone is not None:
                self._run_alone(alone)
                return None
            mixture = self._run_all(resume)
            if not self.is_main:
                return None
            thaw(mixture, self.frozen)
            return self._finish(mixture)

    def begin(self, resume: bool = False) -> None:
        """Read the data and begin the run's folder, or check that the run there can be gone on with."""
        with self._phase("data"):
            self.read_data()
        self.folder.check(resume, self.rows, self.context)
        self._check_steps()
        if not resume:
            self._start()

    @contextmanager
    def locked(self, alone: Stage | None = None) -> Iterator[None]:
        """Keep other processes from training this run within the block, or only this stage of it.

        Raises:
            ValueError: one does; the message has its id.
            CheckpointError: the folder cannot be written.
        """
        with ExitStack() as stack:
            if self.is_main:
                try:
                    if PARENT_VARIABLE not in os.environ:
                        stack.enter_context(self.folder.lock.hold(shared=alone is not None))
                    if alone is not None:
                        stack.enter_context(FolderLock(self.folder.stage(alone)).hold())
                except OSError as error:
                    raise CheckpointError(f"{self.folder.path} cannot be written: {error}.") from error
            yield

    @property
    def prompt_to_try(self) -> str:
        """A prompt to begin with: the shortest of each domain's first, held-out ones rather than trained ones."""
        domains = by_domain(self.test) or self.train
        return min((examples[0].question for examples in domains.values()), key=len)

    # ------------------------------------------------------------------ data

    def read_data(self) -> None:
        """Read and check all examples: mistakes show here, before anything is written or a model is loaded."""
        if hasattr(self, "tokenizer"):
            return
        self.console.print(f"Base: {base_title(self.recipe)}", highlight=False, markup=False)
        self.train, self.test = load_recipe_examples(self.recipe)
        self.tokenizer = load_tokenizer(self.recipe)
        too_long, held_out = self.recipe.train.too_long, self.recipe.train.validation
        self.train = {name: self._fitting(name, rows, too_long, "training") for name, rows in self.train.items()}
        if not METRICS[self.recipe.eval.metric].generates:  # a row that was cut could have lost its answer
            fitting = [self._fitting(name, rows, "drop", "held-out") for name, rows in by_domain(self.test).items()]
            self.test = [example for rows in fitting for example in rows]
        self.rows = {name: fingerprint(rows) for name, rows in self.train.items()}
        self.validation = {name: rows[-held_out:] for name, rows in self.train.items() if held_out}
        if held_out:
            self.train = {name: rows[:-held_out] for name, rows in self.train.items()}
            empty = [name for name, rows in self.train.items() if not rows]
            if empty:
                raise ValueError(f"train.validation={held_out} leaves no training examples for {', '.join(empty)}.")

    def _check_steps(self) -> None:
        """Raise `ValueError` where a stage would end without one optimizer step."""
        for stage in self.stages:
            if stage.fits:
                continue
            arguments = self.arguments(stage)
            whole_batches = arguments.dataloader_drop_last  # else every row is seen
            rows = rows_of(self.dataset(stage.domains), arguments) if whole_batches else 1
            check_steps(rows, arguments, self.world_size, f"stage {stage.name}")

    def _fitting(self, name: str, examples: list[Example], too_long: TooLong, what: str) -> list[Example]:
        length = self.recipe.train.arguments.get("max_length") or self.context
        what = f"the {what} data of {name!r}"
        return fit_to_length(examples, self.tokenizer, length, too_long, self.recipe.base.chat, what)

    def dataset(self, domains: tuple[str, ...]) -> Any:
        """The tokenised, mixed training examples of some domains."""
        settings = self.recipe.train
        data = {name: examples for name, examples in self.train.items() if name in domains}
        weights = {name: self.recipe.data[name].weight for name in data}
        temperature = settings.mixing_temperature or MIXING_TEMPERATURE
        return self._tokenised(mix(data, settings.mixing, self.recipe.seed, weights, temperature))

    def _tokenised(self, examples: list[Example]) -> Any:
        completion_only = self.recipe.train.arguments.get("completion_only_loss") is not False
        return to_dataset(examples, self.tokenizer, self.recipe.base.chat, completion_only)

    @property
    def context(self) -> int:
        """The longest sequence the base was made for, in tokens."""
        return self.tokenizer.model_max_length

    # ------------------------------------------------------------------ training

    def _run_all(self, resume: bool) -> DyLoraMoE:
        """Train all stages that are not finished; the mixture with their outcome."""
        if self.is_main:
            self.folder.check(resume, self.rows, self.context)
        self._join(self.stages[0])
        self._check_steps()
        with self._phase("load"):
            mixture = self._build()
            trainer = None if resume else self._trainer(mixture, self.stages[0])  # no way begins with a fit
        if not resume:
            if self.is_main:  # what can be refused has been: an earlier run may go
                self._start()
            self._wait()
        for stage in self.stages:
            with self._phase(f"train {stage.name}"):
                mixture, trainer = self._run_stage(mixture, stage, resume, trainer), None
        self._leave()
        return mixture

    def _run_alone(self, stage: Stage) -> None:
        """Train one stage of a run that was begun, on top of what the stages before it trained."""
        self.folder.check(True, self.rows, self.context)
        missing = [earlier.name for earlier in self._before(stage) if not is_finished(self.folder.stage(earlier))]
        if missing:
            raise ValueError(
                f"stage {stage.name} goes on from {', '.join(missing)}, which is not finished; train that first with "
                f"--stage {missing[0]}, or everything with --resume."
            )
        if is_finished(self.folder.stage(stage)):
            self.console.print(f"Stage {stage.name} is already finished.", highlight=False)
            return
        self._join(stage)
        mixture = self._build()
        for earlier in self._before(stage):
            self._take_over(mixture, earlier)
        self._run_stage(mixture, stage, resume=True)
        self._leave()

    def _stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"no stage {name!r}; the stages are {', '.join(stage.name for stage in self.stages)}.")

    def _before(self, stage: Stage) -> list[Stage]:
        """The stages that `stage` goes on from; an expert's does from none."""
        return self.stages[: self.stages.index(stage)] if stage.router else []

    def _start(self) -> None:
        if self.folder.start(self.rows, self.context):
            self.console.print(f"The finished run in {self.folder.path} is replaced.", highlight=False)

    def _join(self, stage: Stage) -> None:
        if self.world_size > 1:
            _ = self.arguments(stage).device  # joins the processes
            dist.barrier()

    def _wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def _leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()

    def _build(self) -> DyLoraMoE:
        base = base_of(self.recipe)
        set_seed(self.recipe.seed)
        mixture = build_mixture(self.recipe, base)
        self.frozen = set(mixture.frozen_experts)
        return mixture

    def _run_stage(
        self, mixture: DyLoraMoE, stage: Stage, resume: bool, trainer: MoETrainer | None = None
    ) -> DyLoraMoE:
        """Train a stage, with `trainer` if it was made before, or take over its outcome; the mixture with it."""
        folder = self.folder.stage(stage)
        if not is_finished(folder) and stage.fits:
            if self.is_main:
                self._fit(mixture, stage)
            if self.world_size == 1:
                return mixture
            self._wait()
        elif not is_finished(folder):
            trainer = trainer or self._trainer(mixture, stage)
            checkpoint = last_complete(folder) if resume else None
            if checkpoint is not None:
                keep_intervals(cast(SFTConfig, trainer.args), checkpoint)
            trainer.train(resume_from_checkpoint=checkpoint is not None)
            try:
                trainer.save_model(str(folder / TRAINED))
                if self.is_main:
                    finish(folder, stage, trainer.state.log_history)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{folder} could not be written: {error}. Once there is room, go on with --resume."
                ) from error
            if self.world_size == 1:
                return mixture
            dist.barrier()
            mixture = self._build()  # what was wrapped or sharded stays behind
            for earlier in self.stages[: self.stages.index(stage)]:
                if is_finished(self.folder.stage(earlier)):  # not those beside a stage that runs alone
                    self._take_over(mixture, earlier)
        self._take_over(mixture, stage)
        return mixture

    def _fit(self, mixture: DyLoraMoE, stage: Stage) -> None:
        """Compute the router from the training examples, and keep the outcome as that of a trained stage."""
        folder = self.folder.stage(stage)
        thaw(mixture, self.frozen)
        fit_router(mixture, {name: self.train[name] for name in stage.domains}, self.tokenizer)
        try:
            mixture.save_pretrained(folder / TRAINED)
            finish(folder, stage, [])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} could not be written: {error}. Once there is room, go on with --resume."
            ) from error

    def _take_over(self, mixture: DyLoraMoE, stage: Stage) -> None:
        """Put what a finished stage trained into the mixture."""
        if stage.by_steps:
            mixture.start_routing()
        load_finished(mixture, self.folder.stage(stage), stage)

    def _trainer(self, mixture: DyLoraMoE, stage: Stage) -> MoETrainer:
        set_trainable(mixture, stage)
        settings = self.recipe.train
        options: dict[str, Any] = {"force_domains": True}
        callbacks: list[TrainerCallback] = []
        if stage.router:
            options = {
                "domain_coefficient": settings.domain_coefficient,
                "router_learning_rate": settings.router_learning_rate,
                "router_weight_decay": settings.router_weight_decay,
                "collapse_steps": settings.collapse_steps,
            }
            if settings.temperature_start is not None:
                callbacks.append(TemperatureSchedule(mixture, settings.temperature_start, settings.temperature_share))
        if settings.early_stopping_patience is not None:
            patience = (settings.early_stopping_patience, settings.early_stopping_threshold)
            callbacks.append(EarlyStoppingCallback(*patience))
        validation = [e for name, examples in self.validation.items() if name in stage.domains for e in examples]
        arguments = self.arguments(stage)
        trainer = MoETrainer(
            mixture,
            args=arguments,
            train_dataset=self.dataset(stage.domains),
            eval_dataset=self._tokenised(validation) if validation else None,
            processing_class=self.tokenizer,
            two_phase=settings.two_phase,
            callbacks=[*callbacks, *self._bars(arguments, stage.name)],
            **options,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def arguments(self, stage: Stage) -> SFTConfig:
        """The trainer's arguments for a stage."""
        return trainer_arguments(self.recipe, self.folder.stage(stage), self.context, stage.steps)

    def _bars(self, arguments: SFTConfig, title: str) -> list[TrainerCallback]:
        return [ProgressBar(self.console, title)] if arguments.disable_tqdm and self.is_main else []

    # ------------------------------------------------------------------ measuring

    def _finish(self, mixture: DyLoraMoE) -> Results:
        results = self.results
        results.passes_per_step = mixture.passes_per_step
        report = mixture.parameter_report()
        results.parameters = {**report.experts, "router": report.router, "base": report.base}
        if not self.test:
            self.console.print(
                "Nothing was measured: no expert has held-out data (`test`, or `test_split` of a data set).",
                highlight=False,
                markup=False,
            )
        measurement = Measurement(self.recipe, self.tokenizer, self.test, self.console)
        with self._phase("evaluate base"):
            results.add("base", measurement.column(mixture, "base", experts="base"))
        with self._phase("evaluate mixture"):
            for name, column in measurement.routings(mixture):
                results.add(name, column)
        with self._phase("save and reload"):
            routing = measurement.routing(mixture)
            results.load = {domain: row.pop("load") for domain, row in routing.items()}
            results.routing = routing
            metric = METRICS[results.metric].sentence
            mixture.save_pretrained(self.folder.path, results=results.columns, metric=metric)
            self.tokenizer.save_pretrained(self.folder.path)
            again = DyLoraMoE.from_pretrained(str(self.folder.path), **loading_options(self.recipe))
            results.reloaded_identical = measurement.same_answers(mixture, again)
            del again
        if self.recipe.eval.baseline:
            with self._phase("single LoRA"):
                results.add("single", self._single(mixture, measurement))
        write_file(self.folder.path / HISTORY_FILE, json.dumps(self.folder.history(self.stages), indent=1) + "\n")
        write_file(self.folder.path / RESULTS_FILE, json.dumps(results.to_dict(), indent=2) + "\n")
        return results

    def _single(self, mixture: DyLoraMoE, measurement: Measurement) -> dict[str, Measured]:
        """A single LoRA of the summed rank on the same layers and data, for as many steps, at a rate for its rank."""
        config, metric = single_lora_config(mixture), METRICS[self.recipe.eval.metric]
        experts = resolved_arguments(self.recipe, self.context)["learning_rate"]
        rate = single_rate(self.recipe.eval.baseline_learning_rate, experts, config.r, len(mixture.expert_names))
        columns = {each: self._single_at(each, config, measurement) for each in rate.rates}
        if self.test:
            means = {each: fmean(found.value for found in column.values()) for each, column in columns.items()}
            rate.choose(means, metric.higher_is_better)
        self.results.baseline = rate.to_dict()
        said = f"{rate}."[0].upper() + f"{rate}."[1:]
        self.console.print(said, highlight=False, markup=False)
        if rate.warning is not None:
            self.console.print(f"Warning: {rate.warning}", highlight=False, markup=False)
        return columns[rate.chosen]

    def _single_at(self, rate: float, config: LoraConfig, measurement: Measurement) -> dict[str, Measured]:
        set_seed(self.recipe.seed)
        model: Any = get_peft_model(base_of(self.recipe), config)
        domains = tuple(self.train)
        arguments = self.arguments(Stage("single", (), False, domains, self._all_steps()))
        arguments.learning_rate = rate
        one_device(arguments)
        trainer = SFTTrainer(
            model,
            args=arguments,
            train_dataset=self.dataset(domains).remove_columns("domain"),
            processing_class=self.tokenizer,
            callbacks=self._bars(arguments, "single LoRA"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.get_base_model().__dict__.pop("forward", None)
        return measurement.column(model, "single LoRA")

    def _all_steps(self) -> int | None:
        """The optimizer steps of all stages; None where epochs say how many."""
        whole = self.recipe.train.arguments.get("max_steps") or 0
        steps = [stage.steps or whole for stage in self.stages if not stage.fits]
        return sum(steps) if min(steps) > 0 else None

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.results.seconds[name] = self.results.seconds.get(name, 0.0) + time.perf_counter() - started
