"""Selectors: stock adapters of rank 1 by whose name a request to vLLM is given weights instead of being routed.

Their A `[1, E]` is the weights, on a layer `dylora_select` of the plugin that is never called, and their B is zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from dylora_moe.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_TENSORS
from dylora_moe.routing.decision import one_hot_weights

from .source import Source

LAYER = "dylora_select"


def selector_weights(source: Source, mixtures: Mapping[str, Mapping[str, float]] | None) -> dict[str, list[float]]:
    """E weights by name: of every expert, of `"base"`, and of fixed mixtures.

    Raises:
        TypeError, ValueError: as `Source.named_mixtures`.
    """
    names = source.experts.names
    one_hot = one_hot_weights([*range(len(names)), None], len(names))[:, 0].tolist()
    found = dict(zip([*names, "base"], one_hot, strict=True))
    for name, weights in source.named_mixtures(mixtures).items():
        found[name] = [weights.get(expert, 0.0) for expert in names]
    return found


def write_selector(folder: Path, weights: Sequence[float]) -> None:
    """Write one selector with E weights."""
    folder.mkdir(parents=True)
    key = f"base_model.model.{LAYER}.lora_{{}}.weight"
    tensors = {key.format("A"): torch.tensor([list(weights)]), key.format("B"): torch.zeros(1, 1)}
    save_file(tensors, folder / ADAPTER_TENSORS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": [LAYER],
        "bias": "none",
        "base_model_name_or_path": None,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
