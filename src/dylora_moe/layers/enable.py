"""`enable_routing`: the mixing, and nothing else, for any stock PEFT LoRA model.

Shapes: B batch, S sequence, E active adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from dylora_moe.arguments import check_weights, input_shape
from dylora_moe.base.loading import accept_in_pipelines

from .in_force import Generation, Holder, InForce
from .recompute import checkpointable, keep_routing_in_checkpoints
from .routed import route_layers


class RoutedPeftModel:
    """Turns a PEFT model into one that takes `routing_weights=` when put before its class."""

    holder: Holder

    def forward(self, *args: Any, routing_weights: Tensor | None = None, **kwargs: Any) -> Any:
        with self._given(routing_weights, args, kwargs, generating=False):
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # the class behind it is PEFT's

    def generate(self, *args: Any, routing_weights: Tensor | None = None, **kwargs: Any) -> Any:
        with self._given(routing_weights, args, kwargs, generating=True):
            return super().generate(*args, **kwargs)  # type: ignore[misc]  # as above

    @contextmanager
    def _given(self, weights: Tensor | None, args: Any, kwargs: Any, generating: bool) -> Iterator[None]:
        if weights is not None and kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names and routing_weights both choose adapters; pass one of the two.")
        holder, model = self.holder, cast(Any, self)
        with holder.lock.turn(), holder.restored(holder.now, holder.reached):
            if weights is None:
                holder.rest()
                yield
                return
            batch, length = input_shape(args, kwargs)
            names = tuple(model.base_model.active_adapters)
            weights = check_weights(weights, len(names), batch, None if generating else length)
            route_layers(model.base_model, holder)  # adapters added since
            keep_routing_in_checkpoints(checkpointable(model), holder)
            holder.put(InForce(names, weights))
            outer, holder.generation = holder.generation, Generation() if generating else None
            try:
                yield
            finally:
                holder.generation = outer

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare_peft_model, (type(self).__mro__[2],), cast(nn.Module, self).__dict__


@functools.cache
def _routed_peft_class(peft_class: type) -> type:
    return type(f"Routed{peft_class.__name__}", (RoutedPeftModel, peft_class), {"__module__": __name__})


def _bare_peft_model(peft_class: type) -> nn.Module:
    routed = _routed_peft_class(peft_class)
    return cast(Any, routed).__new__(routed)


def enable_routing(peft_model: PeftModel) -> PeftModel:
    """Let a stock PEFT LoRA model take `routing_weights=` in `forward` and `generate`.

    The weights, `[E]`, `[B, E]` or (in `forward`) `[B, S, E]`, belong to the active adapters in the order of
    `peft_model.base_model.active_adapters` at the call; each adapted layer then returns its base output plus the
    weighted sum of the adapters' deltas. The weights receive gradients. Without the argument the model is bit for
    bit what it was.

    Args:
        peft_model: a `PeftModel` with LoRA adapters; changed in place.

    Returns:
        The same model, for chaining.

    Raises:
        TypeError: not a `PeftModel` with LoRA adapters.
        ValueError: it holds something that cannot be mixed per token (`modules_to_save`, `bias="all"`, convolutions,
            `target_parameters`).
    """
    if not isinstance(peft_model, PeftModel) or not isinstance(peft_model.base_model, LoraModel):
        raise TypeError(f"enable_routing needs a PeftModel with LoRA adapters, not {type(peft_model).__name__}.")
    if isinstance(getattr(peft_model, "holder", None), Holder):
        return peft_model
    holder = Holder(resting=InForce())
    route_layers(peft_model.base_model, holder)
    peft_model.holder = holder  # type: ignore[assignment]
    peft_model.__class__ = _routed_peft_class(type(peft_model))
    accept_in_pipelines(type(peft_model))
    return peft_model
