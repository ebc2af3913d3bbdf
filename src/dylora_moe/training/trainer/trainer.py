"""Training a mixture with TRL's SFTTrainer: what TRL does well stays its own, the router's losses are added.

Shapes: B batch, S sequence, T tokens, n router outputs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from pickle import PicklingError
from typing import Any, ClassVar, cast

import torch
from datasets import concatenate_datasets
from safetensors import SafetensorError
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, has_length, rotate_checkpoints
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from dylora_moe.callers import OWN_TAG
from dylora_moe.checkpoint.files import CheckpointError
from dylora_moe.model import DyLoraMoE
from dylora_moe.training.recipe.sections import TwoPhase

from .callbacks import Speed, StarvedExperts
from .checkpoints import (
    RestoreAverages,
    StopOnSignal,
    checkpoint_to_resume,
    ended,
    last_complete,
    mark_complete,
    mark_incomplete,
    naming_damage,
    save_averages,
)
from .collator import DOMAIN, DomainCollator, padded
from .distributed import (
    average,
    check_processes,
    drop_unused,
    fsdp_on_cpu,
    load_optimizer,
    one_device,
    save_optimizer,
    shard_router,
    times_processes,
)
from .interrupted import Interrupted
from .router_losses import RouterLosses
from .schedule import two_phase_scheduler
from .steps import check_steps
from .token_means import TokenMeans
from .wrappers import unwrap_autocast, unwrap_head


class MoETrainer(SFTTrainer):
    """`trl.SFTTrainer` for a `DyLoraMoE`.

    The language-model loss is TRL's. The router's losses are computed once per optimizer step over all its
    micro-batches and processes: they are not linear in the tokens, so that a mean over micro-batches would be another
    loss. That is cheap, because the router's input is frozen and can be scored again.

    Examples may carry a `domain` column, the name of the expert whose data they are.

    Args:
        model: the mixture.
        domain_coefficient: weight of the cross-entropy of the router towards each example's domain.
        force_domains: force every row to the expert of its domain; the router is not trained then.
        router_learning_rate: of the router; default that of the experts.
        router_weight_decay: of the router; default that of the experts.
        two_phase: the learning rate's schedule, in place of `lr_scheduler_type`.
        collapse_steps: warn when an expert has had a load under 1 % for so many optimizer steps in a row.
        kwargs: passed to `SFTTrainer`.

    Raises:
        ValueError: `domain_coefficient` or `force_domains` without a `domain` column, or with an unknown domain;
            processes or FSDP other than asked for (see `distributed.check_processes`); not one optimizer step to make.
        CheckpointError: what is trained could not be saved to the output folder.
    """

    _tag_names: ClassVar[list[str]] = [*SFTTrainer._tag_names, OWN_TAG]

    def __init__(
        self,
        model: DyLoraMoE,
        *args: Any,
        domain_coefficient: float = 0.0,
        force_domains: bool = False,
        router_learning_rate: float | None = None,
        router_weight_decay: float | None = None,
        two_phase: TwoPhase | None = None,
        collapse_steps: int = 50,
        **kwargs: Any,
    ):
        if not isinstance(model, DyLoraMoE):
            raise TypeError(f"MoETrainer trains a DyLoraMoE, not {type(model).__name__}; use SFTTrainer.")
        self.mixture = model
        self.force_domains = force_domains
        self.router_learning_rate, self.router_weight_decay = router_learning_rate, router_weight_decay
        self.two_phase = two_phase
        self.starved = StarvedExperts(collapse_steps)
        self.router_losses = RouterLosses(model, domain_coefficient, self.starved)
        self.speed = Speed()
        self._forced: set[str] = set()
        arguments = kwargs.get("args")
        if arguments is not None and arguments.data_seed is None:
            arguments.data_seed = arguments.seed  # else the order of the data hangs on whoever seeded torch last
        if arguments is not None and arguments.eval_packing is None:
            arguments.eval_packing = False  # the rows of an evaluation are weighted one by one
        if arguments is not None:
            one_device(arguments)
        super().__init__(model, *args, **kwargs)
        check_processes(self)
        model.touch_all_experts = self.is_fsdp_enabled or self.is_deepspeed_enabled
        columns = getattr(self.train_dataset, "column_names", None) or []
        self.has_domains = DOMAIN in columns
        if (domain_coefficient or force_domains) and not self.has_domains:
            raise ValueError(
                f"the training data has no {DOMAIN!r} column (its columns: {', '.join(columns)}), which "
                "domain_coefficient and force_domains need."
            )
        if self.has_domains:
            self.data_collator = DomainCollator(self.data_collator, model.expert_names)
        if has_length(self.train_dataset):
            check_steps(len(cast(Any, self.train_dataset)), self.args, self.args.world_size)
        self._try_saving()

    def _try_saving(self) -> None:
        """Save everything once, before anything is trained that could then not be saved.

        Raises:
            CheckpointError: it cannot be.
        """
        if not self.args.should_save:
            return
        try:
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=self.args.output_dir) as folder:
                self._save(folder)
        except (OSError, SafetensorError, RuntimeError, PicklingError) as error:
            raise CheckpointError(
                f"{self.args.output_dir}: what is trained could not be saved: {error}. Nothing was trained."
            ) from error

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's `train`; `resume_from_checkpoint=True` takes the last whole checkpoint of the output folder.

        Raises:
            CheckpointError: nothing whole to resume from, or it could not be saved (the last whole one is intact).
            FloatingPointError: the loss is not finite; no optimizer step was made with it.
            Interrupted: SIGTERM or SIGINT; the step was finished and saved.
        """
        folder = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        if folder is not None and ended(folder):
            return self._take_over(folder)
        stop = StopOnSignal()
        self.add_callback(stop)
        if folder is not None:
            self.add_callback(RestoreAverages(self, self.starved, self.speed, folder))
        with self.mixture.recording() as records:
            self.router_losses.records = records
            try:
                result = super().train(None if folder is None else str(folder), *args, **kwargs)
            finally:
                stop.restore_handlers()
                self.remove_callback(StopOnSignal)
                self.remove_callback(RestoreAverages)
                unwrap_head(self.mixture)
                unwrap_autocast(self.mixture)
        if stop.received is not None:
            raise Interrupted(
                stop.received,
                "continue with --resume, or in Python with train(resume_from_checkpoint=True) (checkpoints in "
                f"{self.args.output_dir}).",
            )
        if self.state.global_step == 0:
            raise ValueError("no optimizer step was made: the training data gave no batch.")
        return result

    def _take_over(self, folder: Path) -> TrainOutput:
        """The outcome of a training whose last step is in `folder`; Trainer would make one step more."""
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        self.mixture.restore(folder)
        self._tr_loss = torch.zeros((), device=self.args.device)
        RestoreAverages(self, self.starved, self.speed, folder).on_train_begin(self.args, self.state, self.control)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.mixture.train()
        self.log({"train_loss": 0.0})  # closes the log as the end of a training does
        unwrap_head(self.mixture)
        return TrainOutput(self.state.global_step, 0.0, {})

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.is_fsdp_enabled and self.force_domains and self.accelerator.sync_gradients:
            drop_unused(self.mixture, self._forced)
            self._forced.clear()
        everywhere = average(loss)  # all processes stop if one must
        if not bool(torch.isfinite(everywhere)):
            last = last_complete(str(self.args.output_dir))
            raise FloatingPointError(
                f"the loss is {float(everywhere)} at step {self.state.global_step + 1}. A run keeps its recipe: lower "
                "train.learning_rate or set train.max_grad_norm in a new one with another --output, from the beginning "
                f"or with `start` at a checkpoint (the last whole one is {last or 'none'}, which may already hold bad "
                "weights; an earlier one is safer)."
            )
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # nothing goes before the new one is whole
        try:
            if self.args.should_save:
                mark_incomplete(folder)
            super()._save_checkpoint(model, trial)
            save_averages(self, self.starved, folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk arrives as any of these
            last = last_complete(str(self.args.output_dir))
            raise CheckpointError(
                f"{folder} could not be written: {error}. The last whole checkpoint is {last or 'none'}; once there is "
                "room, go on with --resume."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.mixture.restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.mixture.restore(str(self.state.best_model_checkpoint))

    def create_accelerator_and_postprocess(self) -> None:
        with fsdp_on_cpu(self.args):
            super().create_accelerator_and_postprocess()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=self.mixture.gathered())  # super() would gather the base as well
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_optimizer(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with naming_damage(checkpoint, "optimizer or scheduler"):
            if self.is_fsdp_enabled and checkpoint is not None:
                load_optimizer(self, checkpoint)
            else:
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with naming_damage(checkpoint, "random number"):
            super()._load_rng_state(checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `save_pretrained` writes the mixture's own card."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.is_fsdp_enabled:
            shard_router(self.mixture.router, self.accelerator, optimizer)
        own = {"lr": self.router_learning_rate, "weight_decay": self.router_weight_decay}
        own = {key: value for key, value in own.items() if value is not None}
        if own:
            router = {id(parameter) for parameter in self.mixture.router.parameters()}
            for group in list(optimizer.param_groups):
                params = [p for p in group["params"] if id(p) in router]
                if params:
                    group["params"] = [p for p in group["params"] if id(p) not in router]
                    options = {key: value for key, value in group.items() if key != "params"}
                    optimizer.add_param_group({**options, **own, "params": params})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.two_phase is not None and self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = two_phase_scheduler(
                self.two_phase, cast(Any, optimizer or self.optimizer), num_training_steps, warmup
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs, domains = self._split_domains(inputs)
        of_base = 0.0
        if self.label_smoother is not None and cast(SFTConfig, self.args).loss_type == "nll":
            loss, outputs = self._smoothed_loss(model, inputs, num_items_in_batch)
        else:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if return_outputs else (result, None)
            of_base = self._base_aux_loss()
        if self.mixture.training:
            loss = loss + self._router_loss(loss, of_base, domains, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _split_domains(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """The model's own inputs, and the domain of every token `[B, S]`."""
        inputs = dict(inputs)
        domains = inputs.pop(DOMAIN, None)
        if self.force_domains and domains is not None:
            names = self.mixture.expert_names
            if (domains != domains[:, :1]).logical_and(domains >= 0).any():
                raise ValueError(
                    "a row of packed or padding-free examples holds several domains, and a forced row has one expert: "
                    "train each expert on its own data, or set packing and padding_free to false."
                )
            inputs["experts"] = [names[i] for i in domains[:, 0].tolist()]
            self._forced.update(inputs["experts"])
        return inputs, domains

    def _smoothed_loss(self, model: Any, inputs: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
        """Label smoothing with one forward; TRL would run a second one for its metrics."""
        outputs = model(**inputs, use_cache=False)
        assert self.label_smoother is not None
        loss = self.label_smoother(outputs, inputs["labels"], shift_labels=True, num_items_in_batch=num_items)
        if self.args.average_tokens_across_devices and num_items is not None:
            loss = loss * self.accelerator.num_processes
        mask = inputs.get("attention_mask")
        if self.mixture.training:
            count = inputs["input_ids"].numel() if mask is None else mask.sum()
            count = torch.as_tensor(count, device=loss.device)
            self._total_train_tokens += int(torch.as_tensor(self.accelerator.gather_for_metrics(count)).sum())
        self._metrics["train" if self.mixture.training else "eval"]["num_tokens"] = [self._total_train_tokens]
        return loss, outputs

    def _base_aux_loss(self) -> float:
        """What TRL has just added for the base's own experts, with its coefficient; logged under a name of its own."""
        if not self.aux_loss_enabled:
            return 0.0
        metrics = self._metrics["train" if self.mixture.training else "eval"]
        *ours, value = metrics.pop("aux_loss")
        if ours:
            metrics["aux_loss"] = ours
        metrics["base_aux_loss"].append(value)
        return self.router_aux_loss_coef * value

    def _router_loss(
        self, base_loss: Tensor, of_base: float, domains: Tensor | None, num_items: Tensor | int | None
    ) -> Tensor:
        """The router's losses of the whole optimizer step, in its last micro-batch; zero before."""
        metrics = self._metrics["train"]
        parts = 1 if num_items is None else self.current_gradient_accumulation_steps  # a share of the step's loss
        metrics["lm_loss"].append(float(average(base_loss)) * parts - of_base)
        self.router_losses.collect(domains)
        zero = base_loss.new_zeros(())
        if not self.accelerator.sync_gradients:
            return zero
        loss, logged = self.router_losses.of_step()
        if loss is None:
            return zero
        for key, value in logged.items():
            metrics[key].append(value)
        # gradients are averaged over processes, and over micro-batches where the loss was not normalised by tokens
        loss = times_processes(loss)
        if num_items is None:
            loss = loss * self.current_gradient_accumulation_steps
        return loss.to(base_loss.device)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs, domains = self._split_domains(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        loss = self._means.add(outputs.log_probs, outputs.is_top1, outputs.label_mask, domains)
        return loss.to(self.args.device), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """TRL's loop; the loss is the mean over all tokens, of all examples and of those of each domain."""
        self._means = TokenMeans(self.accelerator.gather_for_metrics, self.mixture.expert_names)
        base: Any = self.mixture.get_base_model()
        bare = "forward" not in base.__dict__  # after training
        if bare:
            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        options = (prediction_loss_only, ignore_keys, metric_key_prefix)
        output: Any = super().evaluation_loop(dataloader, description, *options)
        if bare:
            unwrap_head(self.mixture)
        if self._means.rows:
            output.metrics.update(self._means.metrics(metric_key_prefix))
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        flat = self.data_collator
        self.data_collator = padded(flat)  # so that a row is an example
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = flat

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["tokens_per_second"] = self.speed.read(self._total_train_tokens)
        super().log(logs, start_time)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """TRL's preparation; when packing, each domain by itself, so that a packed row is of one domain."""
        rest = (processing_class, args, packing, formatting_func, dataset_name)
        if not packing or DOMAIN not in (dataset.column_names or []):
            return super()._prepare_dataset(dataset, *rest)
        domains, parts = dataset[DOMAIN], []
        for name in dict.fromkeys(domains):
            own = dataset.select([i for i, domain in enumerate(domains) if domain == name])
            packed: Any = super()._prepare_dataset(own, *rest)
            parts.append(packed.add_column(DOMAIN, [name] * len(packed)))
        return concatenate_datasets(parts).shuffle(seed=args.seed)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._signature_columns is not None and DOMAIN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, DOMAIN]
