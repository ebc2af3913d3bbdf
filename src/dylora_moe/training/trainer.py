"""Training a mixture with TRL's SFTTrainer: what TRL does well stays its own, the router's losses are added.

Shapes: B batch, S sequence, T tokens, n router outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from dylora_moe import routing
from dylora_moe.files import CheckpointError
from dylora_moe.model import DyLoraMoE
from dylora_moe.passes import RouterRecord
from dylora_moe.sharding import gather

from .checkpoints import (
    COMPLETE_FILE,
    Interrupted,
    RestoreAverages,
    StopOnSignal,
    last_complete,
    mark_complete,
    mark_incomplete,
    restore,
    save_averages,
)
from .distributed import (
    average,
    check_processes,
    drop_unused,
    fsdp_on_cpu,
    load_optimizer,
    mean_over_processes,
    save_optimizer,
    shard_router,
    times_processes,
)

DOMAIN = "domain"


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
        kwargs: passed to `SFTTrainer`.

    Raises:
        ValueError: `domain_coefficient` or `force_domains` without a `domain` column, or with an unknown domain;
            processes or FSDP other than asked for (see `distributed.check_processes`).
    """

    def __init__(
        self,
        model: DyLoraMoE,
        *args: Any,
        domain_coefficient: float = 0.0,
        force_domains: bool = False,
        router_learning_rate: float | None = None,
        **kwargs: Any,
    ):
        if not isinstance(model, DyLoraMoE):
            raise TypeError(f"MoETrainer trains a DyLoraMoE, not {type(model).__name__}; use SFTTrainer.")
        self.mixture = model
        self.domain_coefficient, self.force_domains = domain_coefficient, force_domains
        self.router_learning_rate = router_learning_rate
        self._records: list[RouterRecord] = []
        self._domains: list[Tensor] = []
        self._forced: set[str] = set()
        arguments = kwargs.get("args")
        if arguments is not None and arguments.data_seed is None:
            arguments.data_seed = arguments.seed  # else the order of the data hangs on whoever seeded torch last
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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's `train`; `resume_from_checkpoint=True` takes the last whole checkpoint of the output folder.

        Raises:
            CheckpointError: nothing whole to resume from, or it could not be saved (the last whole one is intact).
            FloatingPointError: the loss is not finite; no optimizer step was made with it.
            Interrupted: SIGTERM or SIGINT; the step was finished and saved.
        """
        folder = self._resume_folder(resume_from_checkpoint)
        stop = StopOnSignal()
        self.add_callback(stop)
        if folder is not None:
            self.add_callback(RestoreAverages(self, folder))
        with self.mixture.recording() as records:
            self._records = records
            try:
                result = super().train(None if folder is None else str(folder), *args, **kwargs)
            finally:
                stop.restore_handlers()
                self.remove_callback(StopOnSignal)
                self.remove_callback(RestoreAverages)
                unwrap_head(self.mixture)
        if stop.received is not None:
            raise Interrupted(stop.received, str(self.args.output_dir))
        return result

    def _resume_folder(self, asked: str | bool | None) -> Path | None:
        if not asked:
            return None
        folder = last_complete(str(self.args.output_dir)) if asked is True else Path(str(asked))
        if folder is None:
            raise CheckpointError(f"{self.args.output_dir} holds no whole checkpoint to resume from.")
        if not (folder / COMPLETE_FILE).is_file():
            raise CheckpointError(
                f"{folder} was not written to its end ({COMPLETE_FILE!r} is missing); resume an older one."
            )
        return folder

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.is_fsdp_enabled and self.force_domains and self.accelerator.sync_gradients:
            drop_unused(self.mixture, self._forced)
            self._forced.clear()
        everywhere = average(loss)  # all processes stop if one must
        if not bool(torch.isfinite(everywhere)):
            last = last_complete(str(self.args.output_dir))
            raise FloatingPointError(
                f"the loss is {float(everywhere)} at step {self.state.global_step + 1}. Lower train.learning_rate or "
                f"set train.max_grad_norm; the last whole checkpoint is {last or 'none (set train.save_strategy)'}."
            )
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # nothing goes before the new one is whole
        try:
            if self.args.should_save:
                mark_incomplete(folder)
            super()._save_checkpoint(model, trial)
            save_averages(self, folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk arrives as any of these
            last = last_complete(str(self.args.output_dir))
            raise CheckpointError(
                f"{folder} could not be written: {error}. The last whole checkpoint is {last or 'none'}."
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
        restore(self.mixture, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        restore(self.mixture, str(self.state.best_model_checkpoint))

    def create_accelerator_and_postprocess(self) -> None:
        with fsdp_on_cpu(self.args):
            super().create_accelerator_and_postprocess()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=gather(self.mixture))  # super() would gather the base as well
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_optimizer(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled and checkpoint is not None:
            load_optimizer(self, checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `save_pretrained` writes the mixture's own card."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.is_fsdp_enabled:
            shard_router(self, optimizer)
        if self.router_learning_rate is not None:
            router = {id(parameter) for parameter in self.mixture.router.parameters()}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in router]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in router]
                    options = {key: value for key, value in group.items() if key != "params"}
                    optimizer.add_param_group({**options, "params": own, "lr": self.router_learning_rate})
        return optimizer

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        domains = inputs.pop(DOMAIN, None)
        if self.force_domains and domains is not None:
            names = self.mixture.expert_names
            inputs["experts"] = [names[i] for i in domains.tolist()]
            self._forced.update(inputs["experts"])
        if self.label_smoother is not None and cast(SFTConfig, self.args).loss_type == "nll":
            loss, outputs = self._smoothed_loss(model, inputs, num_items_in_batch)
        else:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if return_outputs else (result, None)
        if self.mixture.training:
            loss = loss + self._router_loss(loss, domains, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

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

    def _router_loss(self, lm_loss: Tensor, domains: Tensor | None, num_items: Tensor | int | None) -> Tensor:
        """The router's losses of the whole optimizer step, in its last micro-batch; zero before."""
        metrics = self._metrics["train"]
        parts = 1 if num_items is None else self.current_gradient_accumulation_steps  # a share of the step's loss
        metrics["lm_loss"].append(float(average(lm_loss)) * parts)
        if len(self._records) > len(self._domains) and domains is not None:
            self._domains.append(domains)
        zero = lm_loss.new_zeros(())
        if not self.accelerator.sync_gradients or not self._records:
            return zero
        records, self._domains, per_record = list(self._records), [], self._domains
        self._records.clear()
        if not any(p.requires_grad for p in self.mixture.router.parameters()):
            return zero
        scores = torch.cat([record.score(self.mixture.router) for record in records])
        loss, balance = self.mixture.auxiliary_losses(scores, mean=mean_over_processes)
        if self.domain_coefficient:
            target = torch.cat([_per_token(r, d) for r, d in zip(records, per_record, strict=True)])
            each = F.cross_entropy(scores, target, reduction="none").unsqueeze(-1)
            domain_loss = mean_over_processes(each, None).squeeze(-1)
            loss = loss + self.domain_coefficient * domain_loss
            metrics["router/domain_loss"].append(float(domain_loss.detach()))
        metrics["aux_loss"].append(float(loss.detach()))
        metrics["router/balance"].append(float(balance.detach()))
        with torch.no_grad():
            shares = self.mixture._policy(scores)
            entropy = mean_over_processes(routing.entropy(shares)[:, None], None)
            metrics["router/entropy"].append(float(entropy))
            load = mean_over_processes(shares, None)
            for name, share in zip(self.mixture._output_names(), load.tolist(), strict=True):
                metrics[f"router/load/{name}"].append(share)
        # gradients are averaged over processes, and over micro-batches where the loss was not normalised by tokens
        loss = times_processes(loss)
        if num_items is None:
            loss = loss * self.current_gradient_accumulation_steps
        return loss.to(lm_loss.device)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._signature_columns is not None and DOMAIN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, DOMAIN]


class DomainCollator:
    """Wraps a collator: examples' `domain` names become one tensor `[B]` of expert indices.

    Raises:
        ValueError: a domain that is no expert.
    """

    def __init__(self, collator: Any, names: list[str]):
        self.collator, self.names = collator, names

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [dict(example) for example in examples]
        domains = [example.pop(DOMAIN, None) for example in examples]
        unknown = sorted({str(domain) for domain in domains if domain not in self.names})
        if unknown:
            raise ValueError(f"domain {', '.join(unknown)} is no expert; the experts are {', '.join(self.names)}.")
        batch = self.collator(examples)
        batch[DOMAIN] = torch.tensor([self.names.index(domain) for domain in domains])
        return batch


def unwrap_head(mixture: DyLoraMoE) -> None:
    """Undo what SFTTrainer put around the base's forward; each trainer made on a model adds one more layer."""
    mixture.get_base_model().__dict__.pop("forward", None)


def _per_token(record: RouterRecord, domains: Tensor) -> Tensor:
    """The domain `[B]` of every token that counts in a record."""
    spread = domains.to(record.hidden.device)[:, None].expand(record.hidden.shape[:2])
    return spread.flatten() if record.mask is None else spread[record.mask]
