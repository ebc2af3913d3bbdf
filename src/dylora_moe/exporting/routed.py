"""The folder that vLLM's plugin serves: base, experts, router and selectors in the files that vLLM itself reads.

dir/*.safetensors                   the base's own files, hard links of them, with its index if there are several
dir/dylora.safetensors              `dylora.router.*`, and `dylora.experts.<path>.A`, `.B`: ranks side by side
dir/config.json                     the base's, with another architecture and the section `dylora_moe`
dir/selectors/<name>                stock adapters of rank 1 that stand for weights, see `selectors.py`
dir/tokenizer*, README.md, …        tokenizer, generation settings, model card

Shapes: D in, O out, R sum of the experts' ranks in one layer, E experts, n router outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from dylora_moe.checkpoint.files import CheckpointError, read_json, replacing
from dylora_moe.checkpoint.mixture import check_free
from dylora_moe.routing.granularity import GRANULARITIES
from dylora_moe.routing.router import CALIBRATIONS

from .base_files import (
    GENERATION_FILE,
    copy_companions,
    is_tokenizer_file,
    put_weights,
    read_base,
)
from .cards import routed_card, routed_command
from .limits import check_base, check_routable
from .selectors import selector_weights, write_selector
from .source import Source

FORMAT_VERSION = 1
SECTION = "dylora_moe"
PREFIX = "DyLoRAMoE"
"""What the plugin's architectures begin with."""
TENSORS_FILE = "dylora.safetensors"
SELECTORS = "selectors"
_CONFIG_FILE, _CARD_FILE = "config.json", "README.md"


def export_routed(
    source: Source,
    directory: str | Path,
    mixtures: Mapping[str, Mapping[str, float]] | None = None,
    granularity: str | None = None,
    copy: bool = False,
) -> str:
    """Write a folder that vLLM serves with the plugin, routed token by token; atomically.

    Args:
        source: the mixture.
        directory: the folder; an earlier export there is replaced.
        mixtures: name → expert → weight: fixed mixtures that requests can name, beside every expert and the base.
        granularity: `"token"` or `"prefix"`, where it is not to be the mixture's own.
        copy: copy the base's weights instead of linking them.

    Returns:
        the command that serves it.

    Raises:
        ValueError: something that the plugin cannot serve, or a folder with other files in it; nothing is written.
    """
    granularity = granularity or source.config.granularity
    target = Path(directory)
    owned = own_entries(target)
    check_routable(source, granularity)
    files = read_base(source.base, source.base_name)
    architecture = check_base(source, files)
    selectors = selector_weights(source, mixtures)
    tensors, modules = _experts(source)
    tensors |= _router(source)
    section = {**_settings(source, granularity), "modules": modules, "selectors": selectors}
    name = target.resolve().name
    card = routed_card(source, granularity, section["top_k"], name, selectors)
    with replacing(target, owned) as folder:
        save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
        put_weights(files, folder, copy)
        copy_companions((source.checkpoint, files.folder), folder)
        for selector, weights in selectors.items():
            write_selector(folder / SELECTORS / selector, weights)
        if files.index is not None:
            places = {**files.index["weight_map"], **dict.fromkeys(tensors, TENSORS_FILE)}
            _write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {**files.index, "weight_map": places})
        (folder / _CARD_FILE).write_text(card, encoding="utf-8")
        _write_json(folder / _CONFIG_FILE, {**files.config, "architectures": [PREFIX + architecture], SECTION: section})
    return routed_command(str(target), name, selectors)


def own_entries(target: Path) -> set[str]:
    """What of an earlier export in `target` is replaced.

    Raises:
        ValueError: the folder is a mixture's, or holds what no export wrote.
    """
    check_free(target)
    if not target.is_dir() or not any(target.iterdir()):
        return set()
    try:
        ours = SECTION in read_json(target / _CONFIG_FILE)
    except CheckpointError:
        ours = False
    if not ours:
        raise ValueError(f"{target} is there already and is no earlier export for vLLM; choose another folder.")
    known = (_CONFIG_FILE, _CARD_FILE, SELECTORS, SAFE_WEIGHTS_INDEX_NAME, GENERATION_FILE)
    return {
        entry.name
        for entry in target.iterdir()
        if entry.name in known or entry.suffix == ".safetensors" or is_tokenizer_file(entry.name)
    }


def _experts(source: Source) -> tuple[dict[str, Tensor], dict[str, list[list[Any]]]]:
    """A `[R, D]` and B `[O, R]` of every adapted layer by name, and per path column, rank and scaling of each expert.

    Raises:
        ValueError: a tensor of another shape than its layer's, or with values that are not finite.
    """
    tensors, modules, names = {}, {}, source.experts.names
    for layer in source.experts.layers:
        path, carried = layer.routing_name, [name for name in names if name in layer.lora_A]
        for name in carried:
            A, B, rank = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.r[name]
            _check(f"expert {name!r}: A of {path}", A, (rank, layer.in_features))
            _check(f"expert {name!r}: B of {path}", B, (layer.out_features, rank))
            if not math.isfinite(layer.scaling[name]):
                raise ValueError(f"expert {name!r}: the scaling of {path} is {layer.scaling[name]}.")
        prefix = f"dylora.experts.{path}"
        tensors[f"{prefix}.A"] = _plain(torch.cat([layer.lora_A[name].weight.detach() for name in carried]))
        tensors[f"{prefix}.B"] = _plain(torch.cat([layer.lora_B[name].weight.detach() for name in carried], dim=1))
        modules[path] = [[names.index(name), layer.r[name], float(layer.scaling[name])] for name in carried]
    return tensors, modules


def _router(source: Source) -> dict[str, Tensor]:
    """The router's tensors by name, float32; its temperatures are among the settings."""
    tensors = {}
    for key, tensor in source.router.state_dict().items():
        if key != "temperature":
            _check(f"the router's {key}", tensor, tuple(tensor.shape))
            tensors[f"dylora.router.{key}"] = _plain(tensor.float())
    return tensors


def _settings(source: Source, granularity: str) -> dict[str, Any]:
    """What of the section says how tokens are routed."""
    config, experts, router = source.config, source.experts, source.router
    temperature, of_router = float(config.temperature), getattr(router, "temperature", None)
    if of_router is not None:
        temperature *= float(of_router[CALIBRATIONS.index(GRANULARITIES[granularity].calibration)])
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"the router's temperature is {temperature}; teach or train it first.")
    k = config.policy_for(training=False).k or router.num_outputs
    return {
        "version": FORMAT_VERSION,
        "experts": list(experts.names),
        "layers": source.placement.num_layers,
        "router_layer": source.router_layer,
        "router_type": config.router_type,
        **({"router_hidden_size": router.sizes[1]} if config.router_type == "mlp" else {}),
        "route_to_base": bool(config.route_to_base),
        "granularity": granularity,
        "temperature": temperature,
        "top_k": min(k, router.num_outputs),
        "closed": list(experts.masked),
    }


def _check(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what} has shape {list(tensor.shape)}, expected {list(shape)}.")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} holds values that are not finite; train it again, or remove the expert.")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
