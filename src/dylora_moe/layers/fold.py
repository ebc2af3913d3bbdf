"""Folding one fixed mixture into the base's weights for the length of a generation.

A forced expert, weights given for all rows, or the decision of sequence granularity on a single row do not change from
token to token, so that `W' = W + Σ_e w_e s_e B_e A_e` serves every step at the base's own price. The original tensors
are kept aside, not recomputed: what comes back is what was there, bit for bit. That costs the memory of the adapted
weights a second time, and that memory, not what is in it, is kept for the next call: on a CPU fresh memory costs more
time than the folding itself. `model.train()` and `model.to()` give it back.

Shapes: D in, O out, E experts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylora_moe.mixing.member import Member

from .groups import member_of
from .in_force import Generation, Holder


@torch.no_grad()
def fold(base: nn.Module, holder: Holder, generation: Generation, names: tuple[str, ...], weights: Tensor) -> None:
    """Fold the mixture of `weights [E]` into every layer that allows it; the others go on mixing.

    Layers with DoRA, active dropout, biases of experts, a weight that another module shares (a tied head), or a base
    that is not a plain linear layer are left alone.
    """
    modules = base.named_modules(remove_duplicate=False)
    owners = Counter(id(p) for _, module in modules for p in module._parameters.values())
    shares = weights.tolist()
    compiled = cast(Any, base)._compiled_call_impl is not None
    shortcut = holder.reached is None and not compiled  # nobody counts, and no graph depends on the layers
    for layer in holder.layers:
        member = member_of(layer, names)
        if member is None or member.weight is None or member.experts.dropout or any(layer.lora_bias.values()):
            continue
        parameter = layer.base_layer.weight
        if owners[id(parameter)] > 1:
            continue
        original = parameter.data
        if layer.routing_name not in generation.folded:
            generation.folded[layer.routing_name] = (layer, original)
        own = member.experts
        scales = [shares[column] * scaling for column, scaling in zip(own.columns, own.scalings, strict=True)]
        if any(scales):
            mixed = holder.layers.spare.pop(layer.routing_name, original)
            if mixed is original or (mixed.shape, mixed.dtype, mixed.device) != (
                original.shape,
                original.dtype,
                original.device,
            ):
                with torch.inference_mode(False):  # it is kept beyond this call
                    mixed = torch.empty_like(original)
            _mix_into(mixed.T if isinstance(layer.base_layer, Conv1D) else mixed, member, scales)
            parameter.data = mixed
        if shortcut:
            layer.forward = layer.base_layer.forward


def unfold(holder: Holder, generation: Generation) -> None:
    """Put the original weights back; each is forgotten last, so that what an interrupt leaves can be put back later."""
    for name, (layer, original) in list(generation.folded.items()):
        parameter = layer.base_layer.weight
        mixed = parameter.data
        parameter.data = original
        layer.__dict__.pop("forward", None)
        if mixed.data_ptr() != original.data_ptr():
            holder.layers.spare[name] = mixed
        del generation.folded[name]


def _mix_into(out: Tensor, member: Member, scales: list[float]) -> None:
    """Write `W + Σ_e scale_e B_e A_e` into `out [O, D]`; not every scale is zero."""
    base = cast(Tensor, member.weight)
    wide = torch.promote_types(base.dtype, member.lora_A[0].dtype)
    mixed = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
    A = torch.cat([A.to(wide) for A, scale in zip(member.lora_A, scales, strict=True) if scale])
    B = torch.cat([B.to(wide) * scale for B, scale in zip(member.lora_B, scales, strict=True) if scale], dim=1)
    torch.addmm(base.to(wide), B, A, out=mixed)
    if mixed is not out:
        out.copy_(mixed)
