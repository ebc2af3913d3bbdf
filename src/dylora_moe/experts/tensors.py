"""The tensors of an expert, collected layer by layer: PEFT's own filter goes by name and drops some silently."""

from __future__ import annotations

from typing import NamedTuple

from peft.tuners.lora import LoraLayer
from torch import nn


class ExpertTensor(NamedTuple):
    """One tensor of an expert: its key in a stock adapter file, its name in the model, the parameter."""

    key: str
    name: str
    tensor: nn.Parameter


def layer_tensors(layer: LoraLayer, path: str, expert: str) -> list[ExpertTensor]:
    """The tensors of `expert` in one LoRA layer at `path` of the base."""
    found = []
    prefix = f"base_model.model.{path}"
    for attribute in dict.fromkeys(layer.adapter_layer_names):  # DoRA names its magnitudes once more
        container = getattr(layer, attribute)
        if expert not in container:
            continue
        part = container[expert]
        if isinstance(part, nn.Parameter):
            found.append(ExpertTensor(f"{prefix}.{attribute}", f"{prefix}.{attribute}.{expert}", part))
            continue
        for name, parameter in part.named_parameters():
            # PEFT saves DoRA's magnitude without the ".weight" of its module
            suffix = "" if attribute == "lora_magnitude_vector" else f".{name}"
            found.append(
                ExpertTensor(f"{prefix}.{attribute}{suffix}", f"{prefix}.{attribute}.{expert}.{name}", parameter)
            )
    return found
