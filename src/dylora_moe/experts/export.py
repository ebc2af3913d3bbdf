"""Experts as stock adapters: one by itself, or a fixed mixture of some as one exact LoRA.

Shapes: D in, O out, R rank of one expert.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping

import torch
from peft import LoraConfig
from torch import Tensor

from .expert_set import ExpertSet

A_PARTS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
"""How the keys of A end in a stock adapter, and of the B that belongs to it."""


def stock_config(experts: ExpertSet, name: str, config: LoraConfig, base_name: str | None) -> LoraConfig:
    """The configuration of one expert as it is written to a stock adapter's folder."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.base_model_name_or_path = base_name
    config.task_type = config.task_type or "CAUSAL_LM"
    # PEFT repairs a wrong fan_in_fan_out on the layer, not in the configuration: write what is true
    config.fan_in_fan_out = any(getattr(layer, "fan_in_fan_out", False) for layer in experts.layers if name in layer.r)
    return config


def fixed_mixture(
    experts: ExpertSet, configs: Mapping[str, LoraConfig], weights: Mapping[str, float], base_name: str | None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Σ_e w_e · expert_e as one exact LoRA, by concatenating the ranks: its configuration and tensors by stock key.

    Args:
        experts: of the mixture.
        configs: the stock configuration of every expert.
        weights: expert name → weight, any finite value.
        base_name: what the adapter says it was made for.

    Raises:
        ValueError: an unknown expert, a weight that is not finite, or a DoRA expert (its output is not linear).
    """
    tensors = concatenated(experts, configs, weights)
    return adapter_config(experts, tensors, base_name), tensors


def concatenated(
    experts: ExpertSet,
    configs: Mapping[str, LoraConfig],
    weights: Mapping[str, float],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors of `fixed_mixture` by stock key; the scalings are inside B.

    Args: as there, and
        dtype: of the tensors and of what is computed for them; default the experts' own.
    """
    if not weights:
        raise ValueError("weights={}: name at least one expert.")
    for name, value in weights.items():
        experts.check_known(name)
        if not torch.isfinite(torch.tensor(float(value))):
            raise ValueError(f"weight of {name!r} is {value}; it must be finite.")
        if configs[name].use_dora:
            raise ValueError(f"expert {name!r} uses DoRA, whose output is not linear in its weight.")

    def computed(parameter: Tensor) -> Tensor:
        return parameter.data if dtype is None else parameter.data.to(dtype)

    tensors: dict[str, Tensor] = {}
    any_bias = any(configs[name].lora_bias for name in weights)
    for layer in experts.layers:
        present = [name for name in weights if name in layer.lora_A or name in layer.lora_embedding_A]
        if not present:
            continue
        path, prefix = layer.routing_name, f"base_model.model.{layer.routing_name}"
        gates = [weights[name] * layer.scaling[name] for name in present]
        if layer.lora_embedding_A:
            if any_bias:
                raise ValueError(
                    f"{path} is an embedding, and PEFT knows no adapter with lora_bias on embeddings: an expert "
                    "with lora_bias cannot go into one adapter with an expert on the embeddings."
                )
            A = torch.cat([computed(layer.lora_embedding_A[name]) for name in present])
            B = torch.cat([g * computed(layer.lora_embedding_B[n]) for g, n in zip(gates, present, strict=True)], 1)
            tensors[f"{prefix}.lora_embedding_A"], tensors[f"{prefix}.lora_embedding_B"] = A, B
        else:
            A = torch.cat([computed(layer.lora_A[name].weight) for name in present])
            B = torch.cat([g * computed(layer.lora_B[n].weight) for g, n in zip(gates, present, strict=True)], 1)
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = A, B
            if any_bias:
                bias = B.new_zeros(B.shape[0])
                for gate, name in zip(gates, present, strict=True):
                    if layer.lora_B[name].bias is not None:
                        bias += gate * computed(layer.lora_B[name].bias)
                tensors[f"{prefix}.lora_B.bias"] = bias
    return tensors


def adapter_config(experts: ExpertSet, tensors: Mapping[str, Tensor], base_name: str | None) -> LoraConfig:
    """The configuration of one LoRA with these `tensors` by stock key, on layers of `experts`, with a scaling of 1."""
    ranks = {
        layer.routing_name: len(tensors[key])
        for layer in experts.layers
        for part in A_PARTS
        if (key := f"base_model.model.{layer.routing_name}.{part}") in tensors
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {path: r for path, r in ranks.items() if r != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(ranks),
        lora_bias=any(key.endswith(".lora_B.bias") for key in tensors),
        fan_in_fan_out=any(
            getattr(layer, "fan_in_fan_out", False) for layer in experts.layers if layer.routing_name in ranks
        ),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
