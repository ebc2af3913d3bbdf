"""What a folder's README says, and the command that serves it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable

from dylora_moe.checkpoint.card import public_name

from .source import Source

_ROUTED = """---
{base_line}tags:
- dylora-moe
- mixture-of-experts
- lora
- vllm
pipeline_tag: text-generation
---

# A mixture of {count} LoRA experts, for vLLM

Exported by DyLoRA-MoE for the vLLM plugin `dylora-moe-vllm`: every token is routed among {experts}
({granularity} granularity, top-{top_k}). From the folder that holds this one:

```bash
{command}
```

A request for the model `{name}` is routed; {models} go to one expert, a fixed mixture or the bare base.

| file | holds |
| --- | --- |
| `dylora.safetensors` | router and experts |
| `config.json` | the base's configuration, and `dylora_moe`: the routing |
| `selectors/` | what a request names to be forced |
| the others | the base and its tokenizer |
"""

_ADAPTERS = """---
{base_line}tags:
- dylora-moe
- lora
- peft
- vllm
pipeline_tag: text-generation
---

# {count} LoRA adapters, for vLLM

Stock adapters, exported by DyLoRA-MoE: {adapters}. Each request names one. From the folder that holds this one:

```bash
{command}
```
"""


def routed_command(folder: str, name: str, selectors: Iterable[str]) -> str:
    """What serves an export for the plugin, with every selector as a model of its own.

    Args:
        folder: as the command is to name it.
        name: of the routed model.
        selectors: their names.
    """
    models = [_module(f"{name}:{selector}", f"{folder}/selectors/{selector}") for selector in selectors]
    lines = [
        "python -m vllm.entrypoints.openai.api_server",
        f"--model {shlex.quote(folder)} --served-model-name {shlex.quote(name)}",
        f"--enable-lora --max-loras {len(models)} --max-lora-rank 8",
        "--lora-modules " + " ".join(models),
    ]
    return " \\\n  ".join(lines)


def adapters_command(base: str, folder: str, adapters: Iterable[str], rank: int) -> str:
    """What serves stock adapters over a base.

    Args:
        base: its folder or hub id.
        folder: of the adapters, as the command is to name it.
        adapters: their names.
        rank: the largest, one that vLLM allows.
    """
    models = [_module(name, f"{folder}/{name}") for name in adapters]
    lines = [
        f"vllm serve {shlex.quote(base)}",
        f"--enable-lora --max-loras {len(models)} --max-lora-rank {rank}",
        "--lora-modules " + " ".join(models),
    ]
    return " \\\n  ".join(lines)


def _module(name: str, path: str) -> str:
    """An item of `--lora-modules`; one with signs that vLLM splits at is given as JSON."""
    plain = not {"=", ","} & {*name, *path}
    return shlex.quote(f"{name}={path}" if plain else json.dumps({"name": name, "path": path}))


def routed_card(source: Source, granularity: str, top_k: int, name: str, selectors: Iterable[str]) -> str:
    """The README of an export for the plugin, whose folder is called `name`."""
    selectors = list(selectors)
    return _ROUTED.format(
        base_line=_base_line(source),
        count=len(source.experts.names),
        experts=_code(source.experts.names),
        granularity=granularity,
        top_k=top_k,
        command=routed_command(name, name, selectors),
        name=name,
        models=_code(f"{name}:{selector}" for selector in selectors),
    )


def adapters_card(source: Source, adapters: Iterable[str], rank: int, name: str) -> str:
    """The README of a folder of stock adapters, which is called `name`."""
    adapters = list(adapters)
    base = public_name(source.base_name or "") or "path/to/the/base"
    return _ADAPTERS.format(
        base_line=_base_line(source),
        count=len(adapters),
        adapters=_code(adapters),
        command=adapters_command(base, name, adapters, rank),
    )


def _base_line(source: Source) -> str:
    base = public_name(source.base_name or "")
    return f"base_model: {json.dumps(base)}\n" if base else ""


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
