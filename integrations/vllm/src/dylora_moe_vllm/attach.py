"""Finding the linears of a vLLM model that a mixture's matrices belong to, and giving them their experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from .experts import Experts, Source, add_to, sources_by_linear
from .geometry import Geometry
from .in_force import InForce, Patterns
from .settings import Settings, SettingsError


def geometry_of(linear: LinearBase) -> Geometry:
    """How vLLM cuts a linear."""
    parts, replicas = (linear.output_size,), (1,)
    if isinstance(linear, QKVParallelLinear):
        k, v = linear.total_num_kv_heads * linear.head_size, linear.total_num_kv_heads * linear.v_head_size
        parts = linear.total_num_heads * linear.head_size, k, v
        replicas = 1, linear.num_kv_head_replicas, linear.num_kv_head_replicas
    elif isinstance(linear, MergedColumnParallelLinear):
        parts = tuple(linear.output_sizes)
        replicas = (1,) * len(parts)
    by_input, by_output = isinstance(linear, RowParallelLinear), isinstance(linear, ColumnParallelLinear)
    cut = "inputs" if by_input else "outputs" if by_output else "nothing"
    return Geometry(linear.input_size, parts, replicas, linear.tp_rank, linear.tp_size, cut)


def attach(
    model: nn.Module, settings: Settings, layers: str, in_force: InForce, patterns: Patterns, dtype: torch.dtype
) -> list[tuple[Any, Experts, list[Source]]]:
    """Give every linear that the mixture names its experts, still empty.

    Args:
        model: of vLLM.
        settings: of the mixture.
        layers: path of the decoder's layers.
        in_force: where the decision will stand.
        patterns: of the mixture.
        dtype: of the experts' matrices.

    Raises:
        SettingsError: the model has no such module, it is none that can carry experts, or it is not in a decoder layer
            from k on, so that it would run before the router has decided.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renamed = mapper.get_rename_mapper().map_name if mapper is not None else str
    packed = getattr(model, "packed_modules_mapping", {})
    found = []
    for path, sources in sources_by_linear(settings.modules, packed, renamed).items():
        named = sources[0].path
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            raise SettingsError(
                f"{named}: vLLM's model has no {path}; leave the module out of the experts' target_modules."
            ) from None
        number = path.removeprefix(f"{layers}.").partition(".")[0]
        if not path.startswith(f"{layers}.") or not number.isdecimal() or int(number) < settings.router_layer:
            raise SettingsError(
                f"{named} is in none of the decoder layers {settings.router_layer} to {settings.layers - 1}: it would "
                "run before the router has decided; serve the mixture with dylora-moe, or train experts on those only."
            )
        if not isinstance(linear, LinearBase):
            raise SettingsError(
                f"{named} is a {type(linear).__name__} in vLLM, which cannot carry routed experts; leave it out of the "
                "experts' target_modules."
            )
        geometry = geometry_of(linear)
        if any(source.part is not None and source.part >= len(geometry.parts) for source in sources):
            raise SettingsError(f"{named}: vLLM's {path} has {len(geometry.parts)} parts, not those that it names.")
        experts = Experts(geometry, sources, in_force, patterns, dtype)
        add_to(linear, experts)
        found.append((linear, experts, sources))
    return found
