"""Folding one fixed mixture into the base's weights for the length of a generation.

A forced expert, weights given for all rows, or the decision of sequence granularity on a single row do not change from
token to token, so that `W' = W + Σ_e w_e s_e B_e A_e` serves every further step at the base's own price. The original
tensors are kept aside, not recomputed: what comes back is what was there, bit for bit. That costs the memory of the
adapted weights a second time.

Shapes: D in, O out, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .layers import member_of
from .mixing.member import Member
from .request import Request

if TYPE_CHECKING:
    from .model import DyLoraMoE


def check_foldable(model: DyLoraMoE, batch: int | None, request: Request) -> bool:
    """True, or an error where there is no single fixed mixture.

    Raises:
        ValueError: routing that changes from token to token or from row to row.
    """
    rows = batch
    if request.weights is not None:
        rows = request.weights.shape[0]
    elif request.experts is not None:
        rows = 1 if isinstance(request.experts, str) else len(set(request.experts))
    elif model.moe_config.granularity != "sequence":
        raise ValueError(
            "fold=True needs routing that stays the same for the whole sequence; routing per token changes. Force an "
            'expert (experts="…"), give routing_weights, or use granularity="sequence".'
        )
    if rows != 1 or (isinstance(request.experts, list) and None in request.experts):
        raise ValueError(
            f"fold=True serves one mixture at a time, but the {batch} rows have one each: pass one row, or force the "
            "same expert or weights [E] for all."
        )
    return True


@torch.no_grad()
def fold(model: DyLoraMoE, weights: Tensor) -> None:
    """Fold the mixture of `weights [E]` into every layer that allows it; the others go on mixing.

    Layers with DoRA, active dropout, biases of experts, or a base that is not a plain linear layer are left alone.
    """
    names, folded = tuple(model.expert_names), model.routing.folded
    active = [i for i, weight in enumerate(weights.tolist()) if weight]
    for layer in model._layers:
        member = member_of(layer, names)
        if member is None or member.weight is None or member.experts.dropout or any(layer.lora_bias.values()):
            continue
        parameter = layer.base_layer.weight
        if layer.routing_name not in folded:
            folded[layer.routing_name] = (parameter, parameter.data)
        mixed = _folded_weight(member, weights, active)
        if mixed is not None:
            parameter.data = mixed.T if isinstance(layer.base_layer, Conv1D) else mixed


def unfold(model: DyLoraMoE) -> None:
    """Put the original weights back."""
    folded = model.routing.folded
    while folded:
        _, (parameter, original) = folded.popitem()
        parameter.data = original


def _folded_weight(member: Member, weights: Tensor, active: list[int]) -> Tensor | None:
    """`W + Σ_e w_e s_e B_e A_e` over the active experts that the layer carries, `[O, D]`; None if there is none."""
    base = cast(Tensor, member.weight)
    places = [place for place, column in enumerate(member.experts.columns) if column in active]
    if not places:
        return None
    wide = torch.promote_types(base.dtype, member.lora_A[0].dtype)
    parts = [
        member.lora_B[i].to(wide) * (weights[member.experts.columns[i]].to(base.device) * member.experts.scalings[i])
        for i in places
    ]
    A = torch.cat([member.lora_A[i] for i in places]).to(wide)
    return torch.addmm(base.to(wide), torch.cat(parts, dim=1).to(wide), A).to(base.dtype)
