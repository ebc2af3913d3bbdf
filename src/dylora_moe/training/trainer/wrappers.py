"""What TRL and accelerate put around a model's forward, taken off again."""

from __future__ import annotations

from dylora_moe.model import DyLoraMoE


def unwrap_head(mixture: DyLoraMoE) -> None:
    """Undo what SFTTrainer put around the base's forward; each trainer made on a model adds one more layer."""
    mixture.get_base_model().__dict__.pop("forward", None)


def unwrap_autocast(mixture: DyLoraMoE) -> None:
    """Undo what accelerate put around the mixture's forward for mixed precision; it would outlast the training."""
    mixture.__dict__.pop("forward", None)
    mixture.__dict__.pop("_original_forward", None)
