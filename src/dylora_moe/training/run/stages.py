"""What a recipe's way of training comes down to: stages, each a run of the trainer on some experts and some data."""

from __future__ import annotations

from dataclasses import dataclass

from dylora_moe.model import DyLoraMoE
from dylora_moe.training.recipe.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One run of the trainer.

    Args:
        name: of its folder and its rows in the history.
        experts: those that train.
        router: whether the router trains; if not, every row is forced to the expert of its domain.
        domains: the experts whose data it sees.
        steps: optimizer steps; default what the recipe's `max_steps` or `num_train_epochs` say.
    """

    name: str
    experts: tuple[str, ...]
    router: bool
    domains: tuple[str, ...]
    steps: int | None = None

    def set_trainable(self, mixture: DyLoraMoE) -> None:
        """Freeze everything but what this stage trains."""
        for name in mixture.expert_names:
            if name in self.experts:
                mixture.unfreeze_expert(name)
            else:
                mixture.freeze_expert(name)
        mixture.router.requires_grad_(self.router)
        if self.router:
            mixture.start_routing()


def thaw(mixture: DyLoraMoE, frozen: set[str]) -> None:
    """Undo `Stage.set_trainable`: only the experts in `frozen` stay frozen."""
    for name in mixture.expert_names:
        if name not in frozen:
            mixture.unfreeze_expert(name)
    mixture.router.requires_grad_(True)


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in the order they run."""
    train = recipe.train
    domains = tuple(recipe.data)
    free = tuple(name for name, expert in recipe.experts.items() if not expert.frozen)
    if train.method == "joint":
        return [Stage("joint", free, True, domains)]
    if train.method == "router":
        return [Stage("router", (), True, domains)]
    if train.method == "expert":
        assert train.expert is not None
        return [expert_stage(train.expert)]
    stages = [expert_stage(name, train.expert_steps) for name in domains if name in free]
    stages.append(Stage("router", (), True, domains, train.router_steps))
    if train.joint_steps is not None:
        stages.append(Stage("joint", free, True, domains, train.joint_steps))
    return stages


def expert_stage(name: str, steps: int | None = None) -> Stage:
    """One expert alone on its own data."""
    return Stage(f"expert-{name}", (name,), False, (name,), steps)
