"""An expert or a fixed mixture merged into the base's weights: a stock model that everything reads.

W' = W + Σ_e w_e s_e B_e A_e, in float32, then in the base's dtype.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dylora_moe.checkpoint.files import read_json, replacing
from dylora_moe.experts.export import A_PARTS, concatenated

from .adapters import check_empty
from .base_files import base_folder, copy_companions
from .limits import check_linear
from .source import Source


def export_merged(source: Source, expert: str | Mapping[str, float], directory: str | Path) -> None:
    """Write a stock transformers folder: the base with an expert or a fixed mixture in its weights, and the tokenizer.

    Args:
        source: the mixture.
        expert: its name, or expert → weight.
        directory: the folder, new or empty.

    Raises:
        ValueError: an expert with DoRA or biases, one on a weight that another module shares, values that are not
            finite, a quantized base, or a folder that is not empty; nothing is written.
    """
    target = Path(directory)
    check_empty(target)
    weights = source.weights({expert: 1.0} if isinstance(expert, str) else expert)
    base = source.base
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            "the base is quantized, and its weights cannot take an expert in exactly; load the mixture on the base in "
            "floating point (base=, --base), or write an adapter (--to peft)."
        )
    check_linear(source, weights)
    state = _merged_state(source, weights)
    with replacing(target, owned=()) as folder:
        base.save_pretrained(folder, state_dict=state)
        settings = read_json(folder / "config.json")
        settings.pop("keys_to_ignore_at_inference", None)  # a mixture's outputs, which it lists for Trainer
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        copy_companions((source.checkpoint, base_folder(base, source.base_name)), folder)


@torch.no_grad()
def _merged_state(source: Source, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The weights of the bare base by name, those that the experts adapt with their sum."""
    parts = [part for name in source.experts.names for part in source.experts.tensors(name)]
    experts = {part.name.removeprefix("base_model.model.") for part in parts}
    state = {k.replace(".base_layer.", "."): t for k, t in source.base.state_dict().items() if k not in experts}
    modules = source.base.named_modules(remove_duplicate=False)
    owners = Counter(id(p) for _, module in modules for p in module._parameters.values())
    tensors = concatenated(source.experts, source.configs, weights, torch.float32)
    for layer in source.experts.layers:
        path = layer.routing_name
        for part, other in A_PARTS.items():
            A: Any = tensors.get(f"base_model.model.{path}.{part}")
            if A is None:
                continue
            weight = layer.base_layer.weight
            if owners[id(weight)] > 1:
                raise ValueError(
                    f"an expert adapts {path}, whose weight another module shares (tied embeddings): merged, it would "
                    "change both; write an adapter instead (--to peft)."
                )
            delta = tensors[f"base_model.model.{path}.{other}"] @ A
            if not bool(torch.isfinite(delta).all()):
                raise ValueError(f"what the experts add to {path} is not finite; train them again, or leave them out.")
            if part == "lora_embedding_A" or getattr(layer, "fan_in_fan_out", False):
                delta = delta.T
            wide = torch.promote_types(weight.dtype, torch.float32)
            state[f"{path}.weight"] = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
    return state
