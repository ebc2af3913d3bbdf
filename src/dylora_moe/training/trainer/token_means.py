"""Evaluation metrics in which every token weighs the same, whatever the batches.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from .collator import padded

if TYPE_CHECKING:
    from dylora_moe.model import DyLoraMoE


class TokenMeans:
    """Sums of loss and accuracy per example, gathered from all processes.

    Args:
        gather: joins a tensor `[B]` of every process and drops the rows that only fill up the last batch.
        names: of the domains, by index.
    """

    def __init__(self, gather: Callable[[Tensor], Any], names: Sequence[str]):
        self.gather, self.names = gather, names
        self.rows: list[Tensor] = []

    def add(self, log_probs: Tensor, is_top1: Tensor, label_mask: Tensor, domains: Tensor | None) -> Tensor:
        """Add a batch (`[B, S]` each; `log_probs` and `is_top1` are zero where `label_mask` is); returns its loss."""
        own = torch.full_like(label_mask[:, 0], -1, dtype=torch.long) if domains is None else domains[:, 0]
        columns = [-log_probs.double().sum(-1), is_top1.double().sum(-1), label_mask.double().sum(-1), own.double()]
        rows = self.gather(torch.stack(columns, 1)).cpu()
        self.rows.append(rows)
        return rows[:, 0].sum() / rows[:, 2].sum().clamp(min=1)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Mean loss and accuracy over the tokens of all examples, and mean loss over those of each domain."""
        rows = torch.cat(self.rows)
        nll, correct, count = rows[:, 0], rows[:, 1], rows[:, 2]
        result = {
            f"{prefix}_loss": float(nll.sum() / count.sum()),
            f"{prefix}_mean_token_accuracy": float(correct.sum() / count.sum()),
        }
        for index in rows[:, 3].long().unique().tolist():
            if index >= 0:
                inside = rows[:, 3] == index
                result[f"{prefix}_loss/{self.names[index]}"] = float(nll[inside].sum() / count[inside].sum())
        return result


class TokenWeightedEvaluation(SFTTrainer):
    """The part of `MoETrainer` that evaluates: routed as in use, by domain, every token weighing the same."""

    if TYPE_CHECKING:
        mixture: DyLoraMoE
        _split_domains: Callable[[dict[str, Any]], tuple[dict[str, Any], Tensor | None]]

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


def unwrap_head(mixture: DyLoraMoE) -> None:
    """Undo what SFTTrainer put around the base's forward; each trainer made on a model adds one more layer."""
    mixture.get_base_model().__dict__.pop("forward", None)


def unwrap_autocast(mixture: DyLoraMoE) -> None:
    """Undo what accelerate put around the mixture's forward for mixed precision; it would outlast the training."""
    mixture.__dict__.pop("forward", None)
    mixture.__dict__.pop("_original_forward", None)
