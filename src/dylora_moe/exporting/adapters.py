"""Experts and fixed mixtures as stock adapters that vLLM takes as they are: one for each request, without a plugin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dylora_moe.base.embedded import resolve_base
from dylora_moe.checkpoint.adapters import Adapter, write_adapter_files
from dylora_moe.checkpoint.files import replacing
from dylora_moe.experts.export import A_PARTS, adapter_config, concatenated, stock_config

from .cards import adapters_card, adapters_command
from .limits import check_linear
from .source import Source

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` can be."""


def export_adapters(
    source: Source, directory: str | Path, mixtures: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Write every expert, and fixed mixtures of some, as a stock adapter in a folder of its name; atomically.

    An expert is written as it is, unless its rank or scaling differs from layer to layer, which not every version of
    vLLM heeds: then, as a mixture, with the scalings inside B and zeros up to one rank.

    Args:
        source: the mixture.
        directory: the folder, new or empty.
        mixtures: name → expert → weight.

    Returns:
        the command with which vLLM serves them.

    Raises:
        ValueError: an expert with DoRA or biases, a rank above the largest of `RANKS`, a resized base, or a folder that
            is not empty; nothing is written.
    """
    target = Path(directory)
    check_empty(target)
    check_linear(source, source.experts.names)
    if source.vocabulary.resized:
        raise ValueError(
            f"the base was resized to {source.vocabulary.rows} rows in its embeddings, which vLLM's base lacks; write "
            "a plain model instead (--to merged, export_merged)."
        )
    adapters = {name: _expert(source, name) for name in source.experts.names}
    for name, weights in source.named_mixtures(mixtures).items():
        adapters[name] = _padded(source, name, weights)
    for name, adapter in adapters.items():
        for key, tensor in adapter.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}: {key} holds values that are not finite; train it again, or remove it.")
    rank = max(_allowed(name, adapter.config.r) for name, adapter in adapters.items())
    card = adapters_card(source, adapters, rank, target.resolve().name)
    with replacing(target, owned=()) as folder:
        for name, adapter in adapters.items():
            write_adapter_files(folder / name, adapter.config, adapter.tensors)
        (folder / "README.md").write_text(card, encoding="utf-8")
    base = resolve_base(source.base_name) if source.base_name else "path/to/the/base"
    return adapters_command(base, str(target), adapters, rank)


def check_empty(folder: Path) -> None:
    """Raise `ValueError` if there is something in `folder`."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is there already and not empty; choose another folder.")


def _expert(source: Source, name: str) -> Adapter:
    config = source.configs[name]
    if config.rank_pattern or config.alpha_pattern:
        return _padded(source, name, {name: 1.0})
    tensors = {part.key: part.tensor.data for part in source.experts.tensors(name)}
    return Adapter(stock_config(source.experts, name, config, source.base_name), tensors)


def _padded(source: Source, name: str, weights: Mapping[str, float]) -> Adapter:
    """Σ_e w_e · expert_e as one exact LoRA, whose A and B have zeros up to a rank that vLLM allows."""
    tensors = concatenated(source.experts, source.configs, weights)
    pairs = [(key, key.removesuffix(A) + B) for key in tensors for A, B in A_PARTS.items() if key.endswith(f".{A}")]
    rank = _allowed(name, max(len(tensors[A]) for A, _ in pairs))
    for key, other in pairs:
        A, B = tensors[key], tensors[other]
        tensors[key] = _with_zeros(A, rank, 0)
        tensors[other] = _with_zeros(B, rank, 1)
    return Adapter(adapter_config(source.experts, tensors, source.base_name), tensors)


def _with_zeros(tensor: Tensor, size: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _allowed(name: str, rank: int) -> int:
    """The least of `RANKS` that holds `rank`."""
    if rank > RANKS[-1]:
        raise ValueError(
            f"{name} would be of rank {rank}, and vLLM allows {RANKS[-1]} at most: take fewer experts, or cut them "
            "first (dylora-moe merge --rank, model.merge_experts), or write a plain model (--to merged)."
        )
    return next(allowed for allowed in RANKS if rank <= allowed)
