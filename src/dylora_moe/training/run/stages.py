"""What a stage leaves trainable in a mixture."""

from __future__ import annotations

from dylora_moe.model import DyLoraMoE
from dylora_moe.training.recipe.methods import Stage


def set_trainable(mixture: DyLoraMoE, stage: Stage) -> None:
    """Freeze everything but what `stage` trains."""
    for name in mixture.expert_names:
        if name in stage.experts:
            mixture.unfreeze_expert(name)
        else:
            mixture.freeze_expert(name)
    mixture.router.requires_grad_(stage.by_steps)
    if stage.by_steps:
        mixture.start_routing()


def thaw(mixture: DyLoraMoE, frozen: set[str]) -> None:
    """Undo `set_trainable`: only the experts in `frozen` stay frozen."""
    for name in mixture.expert_names:
        if name not in frozen:
            mixture.unfreeze_expert(name)
    mixture.router.requires_grad_(mixture.moe_config.router_type != "closed_form")  # which is never trained
