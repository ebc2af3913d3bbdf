"""Gradient checkpointing: the recompute of a layer sees what was in force in its own forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from .in_force import Holder


class KeepRouting:
    """Wraps a checkpoint function so that the recompute sees the routing of its own forward."""

    def __init__(self, checkpoint: Any, holder: Holder):
        self.checkpoint, self.holder = checkpoint, holder

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        now, reached = self.holder.now, self.holder.reached

        def with_routing(*inputs: Any, **options: Any) -> Any:
            nonlocal reached
            counts, reached = reached, None  # the forward counts, the recompute does not
            with self.holder.lock.turn(), self.holder.restored(now.again(), counts):
                return function(*inputs, **options)

        return self.checkpoint(with_routing, *args, **kwargs)


def checkpointable(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers can checkpoint; to be found once, since a pass should not walk all experts."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def keep_routing_in_checkpoints(modules: Iterable[nn.Module], holder: Holder) -> None:
    """Wrap the checkpoint function of each of the `checkpointable` modules once, however it was switched on.

    Raises:
        ValueError: reentrant checkpointing, which would silently lose the router's gradient.
    """
    for module in modules:
        function = module.__dict__.get("_gradient_checkpointing_func")
        if (
            function is None
            or isinstance(function, KeepRouting)
            or not getattr(module, "gradient_checkpointing", False)
        ):
            continue
        if getattr(function, "keywords", {}).get("use_reentrant") is not False:  # torch's default is True
            raise ValueError(
                "reentrant gradient checkpointing (torch's default) would silently lose the gradient of the routing "
                'weights; pass gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        cast(Any, module)._gradient_checkpointing_func = KeepRouting(function, holder)


def give_back_checkpoints(model: nn.Module) -> None:
    """Undo `keep_routing_in_checkpoints`."""
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, KeepRouting):
            cast(Any, module)._gradient_checkpointing_func = function.checkpoint
