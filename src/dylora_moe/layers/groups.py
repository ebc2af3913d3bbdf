"""Layers fed by the same input are computed together, at the first one's call; the others' outputs wait for theirs.

Shapes: T tokens, D in, O out, E experts, K active experts per token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylora_moe.mixing import FORMS, choose
from dylora_moe.mixing.choice import pays_by_row
from dylora_moe.mixing.member import LayerExperts, Member, lay_side_by_side, remember
from dylora_moe.mixing.rows import row_mixture

from .in_force import Generation, InForce, RoutedLayers

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
"""Names of modules of one parent that are usually fed by the same input; whether they are is checked at every call."""


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


def siblings_of(path: str, layers: dict[str, Any]) -> tuple[str, ...]:
    """The layers that are usually fed by the same input as the one at `path`, itself included.

    They have one parent, names that go together and inputs of one width.
    """
    parent, _, own = path.rpartition(".")
    names = next((names for names in SAME_INPUT if own in names), ())
    paths = [f"{parent}.{name}" if parent else name for name in names]
    width = getattr(layers[path], "in_features", None)
    return tuple(other for other in paths if other in layers and getattr(layers[other], "in_features", None) == width)


def lay_out_experts(layers: RoutedLayers, names: Sequence[str]) -> None:
    """Keep the A of the layers fed by one input in one block of memory, and the B of each layer, in `names`' order."""
    for path, layer in layers.by_name.items():
        group = [layers.by_name[other] for other in layers.siblings[path]] or [layer]
        if group[0] is layer:
            lay_side_by_side([one.lora_A[name].weight for one in group for name in names if name in one.lora_A])
        lay_side_by_side([layer.lora_B[name].weight for name in names if name in layer.lora_B])


def carried(layer: LoraLayer, names: Any) -> list[str]:
    """Those of `names` that adapt this layer, in their order."""
    own, embedded = layer.lora_A._modules, layer.lora_embedding_A
    return [name for name in names if name in own or name in embedded]


def group_of(layer: Any, names: tuple[str, ...], routed: RoutedLayers) -> Group | None:
    """The group that `layer` leads with the experts `names`; None where only the loop is exact."""
    first = member_of(layer, names)
    if first is None:
        return None
    layers, members = [layer], [first] if first.experts.columns else []
    alone = first.weight is None or not members
    for name in () if alone else routed.siblings.get(layer.routing_name, ()):
        other = routed.by_name[name]
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
        columns = tuple(column for column, name in enumerate(names) if name in own_A)
        present = tuple(names[column] for column in columns)
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


def mix_group(group: Group, x: Tensor, now: InForce, generation: Generation | None) -> Tensor:
    """The output of the group's first layer; those of the others wait in `now` for their own calls."""
    layers, members, packed, biased = group
    flat, leading = x.flatten(0, -2), x.shape[:-1]
    keep = memo = None
    if not torch.compiler.is_compiling():
        differentiable = torch.is_grad_enabled()
        keep = None if generation is None or differentiable else packed
        at = (leading, x.device, differentiable)  # what is kept fits layers of this shape on this device
        memo = now.memo.get(at)
        if memo is None:
            memo = now.memo[at] = {}
    alone = None if torch.is_grad_enabled() else memo  # one node for all layers would add their gradients up elsewhere
    rows = rows_of(now, leading)
    if rows is not None:
        assert now.weights is not None
        by_row = now.weights[:, 0].to(x.device)
        outputs = row_mixture(flat, by_row, rows, members, recompute=now.recompute_shrink)
    else:
        weights = remember(alone, "weights", lambda: now.weights_for(leading, x.device))
        active = remember(memo, "active", lambda: now.active_for(leading, x.device))
        form, lasting = remember(
            keep, (now.form, leading, active is None), lambda: form_of(now, members, flat, leading[0])
        )
        options = {"recompute": now.recompute_shrink, "packed": keep if lasting else None, "memo": memo}
        outputs = FORMS[form](flat, weights, members, active, **options)
    if members[0].weight is None:
        outputs[0] = layers[0].base_layer(x).flatten(0, -2) + outputs[0]
    if biased:
        weights = remember(alone, "weights", lambda: now.weights_for(leading, x.device))
        outputs = [with_lora_bias(*each, now.names, weights) for each in zip(layers, members, outputs, strict=True)]
    outputs = [y.view(leading + y.shape[1:]) for y in outputs]
    if len(layers) > 1:
        now.waiting.clear()  # what nobody fetched
        for layer, y in zip(layers[1:], outputs[1:], strict=True):
            now.waiting[layer.routing_name] = x, y
    return outputs[0]


def rows_of(now: InForce, leading: torch.Size) -> tuple[int, ...] | None:
    """The column of each row where rows that belong wholly to one expert are best computed as such, else None."""
    if now.rows is None or now.form != "auto" or torch.compiler.is_compiling():
        return None
    if len(leading) > 2 or leading[0] % len(now.rows):  # whose tokens these are the weights have to say
        return None
    return now.rows if pays_by_row(leading.numel() // len(now.rows)) else None


def form_of(now: InForce, members: list[Member], flat: Tensor, rows: int) -> tuple[str, bool]:
    """The form for `flat [T, D]`, and whether it is that of one token for each of the `rows` too.

    If it is not, a generation needs this form's matrices for its prompt alone and does not keep them.
    """
    experts, active = len(now.names), None if now.active is None else now.active.shape[-1]
    form = choose(now.form, flat, members, experts, active)
    return form, form == choose(now.form, flat, members, experts, active, tokens=rows)


def with_lora_bias(layer: Any, member: Member, y: Tensor, names: tuple[str, ...], weights: Tensor) -> Tensor:
    """`y [T, O]` plus the weighted biases of the experts' B; `weights [T, E]`."""
    own = zip(carried(layer, names), member.experts.columns, member.experts.scalings, strict=True)
    for name, column, scaling in own:
        if layer.lora_bias[name]:
            y = y + (weights[:, column, None] * (scaling * layer.lora_B[name].bias)).to(y.dtype)
    return y
