"""The definition of the mixture: a plain loop over the experts of one layer.

    y = base(x) + Σ_e w[..., e] · delta_e(x)

Every faster path is tested against this file. It also serves what has no faster form: DoRA, embeddings, merged
adapters and experts with different dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import Embedding, LoraLayer
from torch import Tensor

from .align import align_weights


def reference_mixture(layer: LoraLayer, x: Tensor, weights: Tensor, names: Sequence[str], **kwargs: Any) -> Tensor:
    """Base output plus the weighted sum of the experts' deltas.

    Args:
        layer: a PEFT LoRA layer.
        x: its input, `[B, S, D]` or `[T, D]` (`[B, S]` ids for an embedding).
        weights: `[B, S or 1, E]`; column i belongs to `names[i]`. An expert that the layer does not carry
            contributes zero.
        kwargs: passed to the base layer.
    """
    base = layer.base_layer(x, **kwargs)
    gates = align_weights(weights, base.shape[:-1])
    result = base
    for name in dict.fromkeys([*names, *layer.merged_adapters]):
        if name not in layer.lora_A and name not in layer.lora_embedding_A:
            continue
        gate = gates[..., names.index(name), None] if name in names else 0.0
        if name in layer.merged_adapters:  # the base's weight holds this expert once already
            if name in layer.lora_variant:
                raise ValueError(f"expert {name!r} is merged and uses DoRA; call unmerge_adapter() before routing.")
            gate = gate - 1.0
        result = result + gate * expert_delta(layer, name, x, base)
    return result.to(base.dtype)


def expert_delta(layer: Any, name: str, x: Tensor, base: Tensor) -> Tensor:
    """What expert `name` alone adds to the layer's output `base`, in the expert's dtype."""
    if name in layer.lora_variant:  # DoRA scales the base's output too: take the difference
        if not isinstance(layer, Embedding):
            x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
        return layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=base) - base
    scaling = layer.scaling[name]
    if isinstance(layer, Embedding):
        rows = layer._embed(x, layer.lora_embedding_A[name].T)
        scale = layer._get_embed_scale()
        delta = rows @ layer.lora_embedding_B[name].T * scaling
        return delta if scale is None else delta * scale.to(delta.dtype)
    x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
    return layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x))) * scaling
