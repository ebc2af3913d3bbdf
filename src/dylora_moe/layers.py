"""Routed LoRA layers: stock PEFT layers whose class is swapped for one that mixes the experts per token.

Parameters, names, state dict, merging and quantized variants stay PEFT's. With no routing in force a routed layer is
PEFT's layer, bit for bit.

Shapes: B batch, S sequence, T = B·S tokens, D in, O out, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper, _ConvNd
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import check_mixable
from .mixing.align import align_weights
from .mixing.dense import DenseMixture, compute_dtype, dense_mixture, expand, pack
from .mixing.reference import reference_mixture
from .request import CallLock, check_weights, input_shape


@dataclass
class Routing:
    """What is in force right now, shared by all routed layers of a model.

    Attributes:
        names: the experts that the columns of `weights` belong to.
        weights: `[B, S or 1, E]`, or None if no mixing is in force.
        forced: PEFT's own forward with exactly these adapters active ([] for the base), or None.
        packed: concatenated matrices by layer, dtype and experts, for the length of one `generate` call; None outside.
            They can not outlive it, so no optimizer step, load or `.data` write can make them stale.
        reached: how often each layer applied a routing, by name, while somebody traces; None otherwise.
        lock: held by the thread whose routing is in force; threads that share a model take turns.
    """

    names: tuple[str, ...] = ()
    weights: Tensor | None = None
    forced: list[str] | None = None
    packed: dict[tuple[Any, ...], tuple[Tensor, Tensor]] | None = field(default=None, repr=False)
    reached: dict[str, int] | None = None
    lock: CallLock = field(default_factory=CallLock, repr=False)

    @property
    def in_force(self) -> bool:
        """Whether layers must do anything but call PEFT's own forward."""
        return self.weights is not None or self.forced is not None

    def mix(self, names: tuple[str, ...], weights: Tensor) -> None:
        """Put weights `[B, S or 1, E]` in force."""
        self.names, self.weights, self.forced = names, weights, None

    def force(self, names: list[str]) -> None:
        """Put PEFT's own forward with the adapters `names` in force; [] is the base."""
        self.names, self.weights, self.forced = (), None, names

    def reset(self) -> None:
        """Nothing is in force."""
        self.names, self.weights, self.forced = (), None, None

    @contextmanager
    def restored(
        self, state: tuple[tuple[str, ...], Tensor | None, list[str] | None], reached: dict[str, int] | None
    ) -> Iterator[None]:
        """Put an earlier `state` in force for the length of a block (a checkpointed layer), counting in `reached`."""
        before, counts = self.state(), self.reached
        (self.names, self.weights, self.forced), self.reached = state, reached
        try:
            yield
        finally:
            (self.names, self.weights, self.forced), self.reached = before, counts

    def state(self) -> tuple[tuple[str, ...], Tensor | None, list[str] | None]:
        """What is in force, to be restored later."""
        return self.names, self.weights, self.forced


class RoutedLayer:
    """Mix-in that turns a PEFT LoRA layer into a routed one; see `routed_class`."""

    routing: Routing
    routing_name: str

    @property
    def active_adapters(self) -> list[str]:
        forced = self.routing.forced
        if forced is not None:
            return forced
        active = cast(LoraLayer, self).active_adapter  # super() of a property does not compile
        return [active] if isinstance(active, str) else active

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, routing = cast(LoraLayer, self), self.routing
        if not routing.in_force or layer.disable_adapters:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        names, weights = routing.names, routing.weights
        if routing.reached is not None and carried(layer, names if routing.forced is None else routing.forced):
            routing.reached[self.routing_name] = routing.reached.get(self.routing_name, 0) + 1
        if weights is None:
            names = tuple(routing.forced or ())
            if not layer.merged:
                return super().forward(x, *args, **kwargs)  # type: ignore[misc]
            weights = x.new_ones(1, 1, len(names), dtype=torch.float32)
        present = carried(layer, names)
        weights = weights.to(x.device)  # layers may sit on several devices
        mixture = None if args or kwargs or layer.merged else dense_form(layer, names, present)
        if mixture is None:
            return reference_mixture(layer, x, weights, names, **kwargs)
        if not present:
            return layer.base_layer(x)
        return self._mix(layer, x, weights, mixture, present)

    def _mix(self, layer: Any, x: Tensor, weights: Tensor, mixture: DenseMixture, present: list[str]) -> Tensor:
        gates = align_weights(weights, x.shape[:-1])
        flat_gates = gates.expand(*x.shape[:-1], gates.shape[-1]).flatten(0, -2)
        flat = x.flatten(0, -2)
        weight, bias = plain_base(layer)
        lora_A = [layer.lora_A[name].weight for name in present]
        lora_B = [layer.lora_B[name].weight for name in present]
        packed = self.routing.packed
        if packed is not None and not torch.is_grad_enabled() and not mixture.dropout:
            dtype = compute_dtype(flat)
            key = (self.routing_name, dtype, *present)
            if key not in packed:
                packed[key] = pack(lora_A, lora_B, dtype)
            A, B = packed[key]
            y = expand(
                flat, weight, bias, nn.functional.linear(flat.to(dtype), A) * mixture.gates(flat_gates, dtype), B
            )
        else:
            y = dense_mixture(flat, weight, bias, flat_gates, mixture, lora_A, lora_B)
        y = y.unflatten(0, x.shape[:-1])
        if weight is None:
            y = layer.base_layer(x) + y
        biases = [layer.lora_B[name].bias for name in present]
        for column, scaling, lora_bias in zip(mixture.columns, mixture.scalings, biases, strict=True):
            if lora_bias is not None:
                y = y + (gates[..., column, None] * (scaling * lora_bias)).to(y.dtype)
        return y

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare_instance, (_peft_class(type(self)),), cast(nn.Module, self).__dict__


def carried(layer: LoraLayer, names: Any) -> list[str]:
    """Those of `names` that adapt this layer, in their order."""
    return [name for name in names if name in layer.lora_A or name in layer.lora_embedding_A]


def dense_form(layer: LoraLayer, names: tuple[str, ...], present: list[str]) -> DenseMixture | None:
    """The two-GEMM form of a layer's experts, or None where only the reference loop is exact."""
    if layer.lora_embedding_A or any(name in layer.lora_variant for name in present):
        return None
    drops = [cast(nn.ModuleDict, layer.lora_dropout)[name] for name in present]
    rates = {drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0 for drop in drops}
    if len(rates) > 1:  # experts with different dropout need a mask each
        return None
    lora_A = cast(Any, layer.lora_A)
    return DenseMixture(
        columns=tuple(names.index(name) for name in present),
        ranks=tuple(int(lora_A[name].weight.shape[0]) for name in present),
        scalings=tuple(layer.scaling[name] for name in present),
        dropout=rates.pop() if rates else 0.0,
    )


def plain_base(layer: LoraLayer) -> tuple[Tensor | None, Tensor | None]:
    """Weight `[O, D]` and bias of a base layer whose GEMM may be fused, else (None, None).

    Quantized, hooked, offloaded and trainable base layers are only ever called.
    """
    base: Any = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) or type(base.weight) is not nn.Parameter:
        return None, None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or "forward" in base.__dict__:
        return None, None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None, None
    return (base.weight.T if type(base) is Conv1D else base.weight), base.bias


@functools.cache
def routed_class(peft_class: type) -> type:
    """The routed subclass of one PEFT layer class, made once."""
    return type(f"Routed{peft_class.__name__}", (RoutedLayer, peft_class), {"__module__": __name__})


def _peft_class(routed: type) -> type:
    return routed.__mro__[2]


def _bare_instance(peft_class: type) -> nn.Module:
    routed = routed_class(peft_class)
    return cast(Any, routed).__new__(routed)


def route_layers(model: LoraModel, routing: Routing) -> None:
    """Swap the class of every LoRA layer of `model` and hand it `routing`; layers swapped before are left alone.

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
            module.routing, module.routing_name = routing, path


def routed_layers(model: nn.Module) -> list[LoraLayer]:
    """All routed layers, in module order."""
    return [cast(LoraLayer, m) for m in model.modules() if isinstance(m, RoutedLayer)]


class RoutedPeftModel:
    """Mix-in for a PEFT model without a router of ours: `routing_weights=` in `forward` and `generate`."""

    routing: Routing

    def forward(self, *args: Any, routing_weights: Tensor | None = None, **kwargs: Any) -> Any:
        with self._given(routing_weights, args, kwargs, generating=False):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, routing_weights: Tensor | None = None, **kwargs: Any) -> Any:
        with self._given(routing_weights, args, kwargs, generating=True):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _given(self, weights: Tensor | None, args: Any, kwargs: Any, generating: bool) -> Iterator[None]:
        if weights is not None and kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names and routing_weights both choose adapters; pass one of the two.")
        with self.routing.lock.turn():
            if weights is None:
                yield
                return
            batch, length = input_shape(args, kwargs)
            names = tuple(cast(Any, self).base_model.active_adapters)
            weights = check_weights(weights, len(names), batch, None if generating else length)
            route_layers(cast(Any, self).base_model, self.routing)  # adapters added since
            keep_routing_in_checkpoints(cast(nn.Module, self), self.routing)
            self.routing.mix(names, weights)
            self.routing.packed = {} if generating else None
            try:
                yield
            finally:
                self.routing.reset()
                self.routing.packed = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare_peft_model, (_peft_class(type(self)),), cast(nn.Module, self).__dict__


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
    if isinstance(getattr(peft_model, "routing", None), Routing):
        return peft_model
    routing = Routing()
    route_layers(peft_model.base_model, routing)
    peft_model.routing = routing  # type: ignore[assignment]
    peft_model.__class__ = _routed_peft_class(type(peft_model))
    return peft_model


class KeepRouting:
    """Wraps a checkpoint function so that the recompute sees the routing of its own forward."""

    def __init__(self, checkpoint: Any, routing: Routing):
        self.checkpoint, self.routing = checkpoint, routing

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        state, reached = self.routing.state(), self.routing.reached

        def with_routing(*inputs: Any, **options: Any) -> Any:
            nonlocal reached
            counts, reached = reached, None  # the forward counts, the recompute does not
            with self.routing.lock.turn(), self.routing.restored(state, counts):
                return function(*inputs, **options)

        return self.checkpoint(with_routing, *args, **kwargs)


def keep_routing_in_checkpoints(model: nn.Module, routing: Routing) -> None:
    """Wrap every layer's checkpoint function once, however checkpointing was switched on.

    Raises:
        ValueError: reentrant checkpointing, which would silently lose the router's gradient.
    """
    for module in model.modules():
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
        cast(Any, module)._gradient_checkpointing_func = KeepRouting(function, routing)
