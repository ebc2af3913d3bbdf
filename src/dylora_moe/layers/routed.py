"""Routed LoRA layers: stock PEFT layers whose class is swapped for one that mixes the experts per token.

Parameters, names, state dict, merging and quantized variants stay PEFT's. Where nothing is in force a routed layer is
PEFT's layer, bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper, _ConvNd
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from dylora_moe.config import check_mixable
from dylora_moe.mixing import reference_mixture

from .groups import Group, carried, group_of, mix_group, siblings_of
from .in_force import Holder


class RoutedLayer:
    """Turns a PEFT LoRA layer into a routed one when put before its class; see `routed_class`."""

    holder: Holder
    routing_name: str

    @property
    def active_adapters(self) -> list[str]:
        forced = self.holder.now.forced
        if forced is not None:
            return list(forced)
        active = cast(LoraLayer, self).active_adapter  # super() of a property does not compile
        return [active] if isinstance(active, str) else active

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, now = cast(LoraLayer, self), self.holder.now
        if not now.anything or layer.disable_adapters:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # the class behind it is PEFT's
        names, weights, generation = now.names, now.weights, self.holder.generation
        reached = self.holder.reached
        if reached is not None and carried(layer, names if now.forced is None else now.forced):
            reached[self.routing_name] = reached.get(self.routing_name, 0) + 1
        if generation is not None and generation.folded and self.routing_name in generation.folded:
            return layer.base_layer(x, *args, **kwargs)
        if weights is None:
            names = now.forced or ()
            if not layer.merged:
                return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # as above
            weights = x.new_ones(1, 1, len(names), dtype=torch.float32)
        elif not (args or kwargs):
            if self.routing_name in now.waiting and now.waiting[self.routing_name][0] is x:
                return now.waiting.pop(self.routing_name)[1]
            group = self._group(names)
            if group is not None:
                return mix_group(group, x, now, generation) if group.members else layer.base_layer(x)
        return reference_mixture(layer, x, weights.to(x.device), names, **kwargs)

    def _group(self, names: tuple[str, ...]) -> Group | None:
        """This layer and those fed by the same input, as far as fast forms serve them; None if not even this one."""
        generation, packed = self.holder.generation, None
        compiling = torch.compiler.is_compiling()  # a graph must not depend on what one call keeps
        if generation is not None and not compiling and not torch.is_grad_enabled():
            packed = generation.packed
        key = (self.routing_name, names, cast(nn.Module, self).training)
        if packed is not None and key in packed:
            return packed[key]
        group = None
        if self.holder.now.form != "reference":
            group = group_of(cast(LoraLayer, self), names, self.holder.layers)
        if packed is not None:
            packed[key] = group
        return group

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare_instance, (type(self).__mro__[2],), cast(nn.Module, self).__dict__


@functools.cache
def routed_class(peft_class: type) -> type:
    """The routed subclass of one PEFT layer class, made once."""
    return type(f"Routed{peft_class.__name__}", (RoutedLayer, peft_class), {"__module__": __name__})


def _bare_instance(peft_class: type) -> nn.Module:
    routed = routed_class(peft_class)
    return cast(Any, routed).__new__(routed)


def route_layers(model: LoraModel, holder: Holder) -> None:
    """Swap the class of every LoRA layer of `model` and hand it `holder`; layers swapped before are left alone.

    Raises:
        ValueError: the model holds something that cannot be mixed per token; nothing is changed then.
    """
    layers = []
    for name, config in model.peft_config.items():
        check_mixable(cast(LoraConfig, config), name)
    for path, module in model.model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{path} is kept whole per adapter (modules_to_save); it cannot be mixed per token.")
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module, (_ConvNd, ParamWrapper, MultiheadAttention)):
            raise ValueError(
                f"{path} ({type(module).__name__}) cannot be mixed per token; leave it out of target_modules."
            )
        if "forward" in module.__dict__:
            raise ValueError(
                f"{path}: something replaced its `forward` (accelerate's hooks do); dispatch or hook the base before "
                "adding adapters, or remove the hook."
            )
        layers.append((path, module))
    for path, module in layers:
        if not isinstance(module, RoutedLayer):
            module.__class__ = routed_class(type(module))
            module.holder, module.routing_name = holder, path
    by_name = holder.layers.by_name = dict(layers)
    holder.layers.siblings = {path: siblings_of(path, by_name) for path in by_name}


def check_not_bypassed(holder: Holder) -> None:
    """Raise `ValueError` if something put a `forward` of its own on a layer, behind which no expert is reached."""
    for layer in holder.layers:
        if "forward" in layer.__dict__:
            raise ValueError(
                f"{layer.routing_name}: something replaced the layer's `forward` (accelerate's hooks do), which would "
                "silently bypass the experts; dispatch or hook the base before the mixture is built."
            )
