"""Routed LoRA layers: stock PEFT layers whose class is swapped for one that mixes the experts per token.

Parameters, names, state dict, merging and quantized variants stay PEFT's. With no routing in force a routed layer is
PEFT's layer, bit for bit.

Shapes: B batch, S sequence, T = B·S tokens, D in, O out, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper, _ConvNd
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import check_mixable
from .holder import Routing
from .mixing import FORMS, choose, reference_mixture
from .mixing.member import LayerExperts, Member, lay_side_by_side, remember
from .recompute import keep_routing_in_checkpoints
from .request import check_weights, input_shape

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
"""Names of modules of one parent that are usually fed by the same input; whether they are is checked at every call."""


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
        if routing.folded and self.routing_name in routing.folded:
            return layer.base_layer(x, *args, **kwargs)
        if weights is None:
            names = tuple(routing.forced or ())
            if not layer.merged:
                return super().forward(x, *args, **kwargs)  # type: ignore[misc]
            weights = x.new_ones(1, 1, len(names), dtype=torch.float32)
        elif not (args or kwargs):
            ready = routing.ready
            if ready is not None and ready[0] is x and self.routing_name in ready[1]:
                return ready[1].pop(self.routing_name)
            group = self._group(names)
            if group is not None:
                return mix_group(group, x, routing) if group.members else layer.base_layer(x)
        return reference_mixture(layer, x, weights.to(x.device), names, **kwargs)

    def _group(self, names: tuple[str, ...]) -> Group | None:
        """This layer and those fed by the same input, as far as fast forms serve them; None if not even this one."""
        routing = self.routing
        compiling = torch.compiler.is_compiling()  # a graph must not depend on what one call keeps
        packed = None if compiling or torch.is_grad_enabled() else routing.packed
        key = (self.routing_name, names, cast(nn.Module, self).training)
        if packed is not None and key in packed:
            return packed[key]
        group = None
        if routing.form != "reference":
            group = group_of(cast(LoraLayer, self), names, routing)
        if packed is not None:
            packed[key] = group
        return group

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare_instance, (_peft_class(type(self)),), cast(nn.Module, self).__dict__


def lay_out_experts(routing: Routing, names: Sequence[str]) -> None:
    """Keep the A of the layers fed by one input in one block of memory, and the B of each layer, in `names`' order."""
    for path, layer in routing.layers.items():
        group = [routing.layers[other] for other in routing.siblings[path]] or [layer]
        if group[0] is layer:
            lay_side_by_side([one.lora_A[name].weight for one in group for name in names if name in one.lora_A])
        lay_side_by_side([layer.lora_B[name].weight for name in names if name in layer.lora_B])


def carried(layer: LoraLayer, names: Any) -> list[str]:
    """Those of `names` that adapt this layer, in their order."""
    own, embedded = layer.lora_A._modules, layer.lora_embedding_A
    return [name for name in names if name in own or name in embedded]


class Group(NamedTuple):
    """Layers fed by the same input, ready for the fast forms.

    Attributes:
        layers: the layers; the first is the one that was called first.
        members: what the forms need to know of each; none where the layers carry none of the experts in force.
        packed: what a form keeps of the members' matrices for the length of one `generate` call.
        biased: whether the B of an expert has a bias.
    """

    layers: list[Any]
    members: list[Member]
    packed: dict[Hashable, Any]
    biased: bool


def group_of(layer: Any, names: tuple[str, ...], routing: Routing) -> Group | None:
    """The group that `layer` leads with the experts `names`; None where only the loop is exact."""
    first = member_of(layer, names)
    if first is None:
        return None
    layers, members = [layer], [first] if first.experts.columns else []
    alone = first.weight is None or not members
    for name in () if alone else routing.siblings.get(layer.routing_name, ()):
        other = routing.layers[name]
        member = None if other is layer else member_of(other, names)
        if member is None or member.weight is None or not member.experts.columns:
            continue
        device = cast(Tensor, first.weight).device
        if member.experts.dropout == first.experts.dropout and member.weight.device == device:
            layers.append(other)
            members.append(member)
    return Group(layers, members, {}, any(True in one.lora_bias.values() for one in layers))


def member_of(layer: Any, names: tuple[str, ...]) -> Member | None:
    """What the fast forms need to know of a layer, or None where only the reference loop is exact.

    Looks into the modules' own dictionaries: this runs for every layer of every pass, over all experts.
    """
    if layer.merged or layer.disable_adapters or layer.lora_embedding_A:
        return None
    own_A, own_B, drops = (part._modules for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    if tuple(own_A) == names:
        present, columns = names, tuple(range(len(names)))
    else:
        present = tuple(name for name in names if name in own_A)
        columns = tuple(names.index(name) for name in present)
    if layer.lora_variant and any(name in layer.lora_variant for name in present):
        return None
    own_drops = [drops[name] for name in present]
    rates = {drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0 for drop in own_drops}
    if len(rates) > 1:  # experts with different dropout need a mask each
        return None
    lora_A = [weight_of(own_A[name]) for name in present]
    experts = LayerExperts(
        columns=columns,
        ranks=tuple([A.shape[0] for A in lora_A]),
        scalings=tuple([layer.scaling[name] for name in present]),
        dropout=rates.pop() if rates else 0.0,
    )
    weight, bias = plain_base(layer)
    return Member(experts, weight, bias, lora_A, [weight_of(own_B[name]) for name in present])


def weight_of(linear: Any) -> Tensor:
    """`linear.weight`, without the detour that modules take to find it."""
    weight = linear._parameters.get("weight")
    return linear.weight if weight is None else weight


def mix_group(group: Group, x: Tensor, routing: Routing) -> Tensor:
    """The output of the group's first layer; those of the others wait in `routing.ready` for their own calls."""
    layers, members, packed, biased = group
    flat, leading = x.flatten(0, -2), x.shape[:-1]
    keep = memo = None
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        keep = None if routing.packed is None else packed
        at = (leading, x.device)  # what is kept fits layers of this shape on this device
        memo = routing.memo.get(at)
        if memo is None:
            memo = routing.memo[at] = {}
    weights = remember(memo, "weights", lambda: routing.weights_for(leading, x.device))
    key = (routing.form, leading, routing.active)
    form, lasting = remember(keep, key, lambda: form_of(routing, members, flat, leading[0]))
    if not lasting:
        keep = None
    indices = None
    if form != "dense":
        active = cast(int, routing.active)
        indices = remember(memo, "indices", lambda: weights.detach().topk(active, dim=-1, sorted=False).indices)
    recompute = routing.recompute_shrink
    outputs = FORMS[form](flat, weights, members, indices, recompute=recompute, packed=keep, memo=memo)
    if members[0].weight is None:
        outputs[0] = layers[0].base_layer(x).flatten(0, -2) + outputs[0]
    if biased:
        outputs = [with_lora_bias(*each, weights) for each in zip(layers, members, outputs, strict=True)]
    outputs = [y.view(leading + y.shape[1:]) for y in outputs]
    if len(layers) > 1:
        others = zip(layers[1:], outputs[1:], strict=True)
        routing.ready = (x, {layer.routing_name: y for layer, y in others})
    return outputs[0]


def form_of(routing: Routing, members: list[Member], flat: Tensor, rows: int) -> tuple[str, bool]:
    """The form for `flat [T, D]`, and whether it is that of one token for each of the `rows` too.

    If it is not, a generation needs this form's matrices for its prompt alone and does not keep them.
    """
    count, active = len(routing.names), routing.active
    form = choose(routing.form, flat, members, count, active)
    return form, form == choose(routing.form, flat, members, count, active, tokens=rows)


def with_lora_bias(layer: Any, member: Member, y: Tensor, weights: Tensor) -> Tensor:
    """`y [T, O]` plus the weighted biases of the experts' B; `weights [T, E]`."""
    names = carried(layer, layer.routing.names)
    for name, column, scaling in zip(names, member.experts.columns, member.experts.scalings, strict=True):
        if layer.lora_bias[name]:
            y = y + (weights[:, column, None] * (scaling * layer.lora_B[name].bias)).to(y.dtype)
    return y


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
    routing.layers = dict(layers)
    routing.siblings = {path: siblings_of(path, routing.layers) for path in routing.layers}


def siblings_of(path: str, layers: dict[str, Any]) -> tuple[str, ...]:
    """The layers that are usually fed by the same input as the one at `path`, itself included."""
    parent, _, own = path.rpartition(".")
    names = next((names for names in SAME_INPUT if own in names), ())
    return tuple(other for name in names if (other := f"{parent}.{name}" if parent else name) in layers)


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
        routing = self.routing
        with routing.lock.turn(), routing.restored(routing.state(), routing.reached):
            if weights is None:
                routing.reset()
                yield
                return
            batch, length = input_shape(args, kwargs)
            names = tuple(cast(Any, self).base_model.active_adapters)
            weights = check_weights(weights, len(names), batch, None if generating else length)
            route_layers(cast(Any, self).base_model, self.routing)  # adapters added since
            keep_routing_in_checkpoints(cast(nn.Module, self), self.routing)
            routing.mix(names, weights)
            outer, routing.packed = routing.packed, {} if generating else None
            try:
                yield
            finally:
                routing.packed = outer

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
