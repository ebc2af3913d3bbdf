"""The model card of a checkpoint, from a template and the model's own numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from dylora_moe.base.embedded import EMBEDDED, HUB_ID
from dylora_moe.reports import ParameterReport

from .mixture import MixtureState

_PLAIN = r"[A-Za-z][\w./-]*"  # what YAML reads as text without quotes
_TEMPLATE = """---
library_name: dylora-moe
{base_line}tags:
- dylora-moe
- mixture-of-experts
- lora
- peft
pipeline_tag: text-generation
---

# A mixture of {count} LoRA experts

Made with DyLoRA-MoE on `{base}`. The router reads the hidden state entering decoder layer {router_layer} and gives
every token its weights; a step costs {passes:.2f} passes of the base.

| part | parameters | % of the base |
| --- | ---: | ---: |
{rows}

| expert | rank | alpha | state |
| --- | ---: | ---: | --- |
{experts}

Routing: {granularity} granularity, top-{top_k} in evaluation, temperature {temperature}, router `{router_type}`.
{results}
```python
from dylora_moe import DyLoraMoE

model = DyLoraMoE.from_pretrained("path/to/this/folder")
```

Each expert's folder is a stock PEFT adapter: `PeftModel.from_pretrained(base, "path/to/this/folder/{first}")`.
"""


def model_card(
    state: MixtureState,
    parameters: ParameterReport,
    router_layer: int | str,
    passes_per_step: float,
    results: Mapping[str, Mapping[str, float]] | None = None,
    metric: str | None = None,
) -> str:
    """Markdown for the folder's README.md.

    Args:
        state: the mixture.
        parameters: how many it has.
        router_layer: the layer whose input the router reads.
        passes_per_step: passes of the base per routed step.
        results: measured values to show: column → {row → share between 0 and 1, or loss}.
        metric: a sentence that says what they are, and whether higher or lower is better.

    Raises:
        TypeError: `results` has another form.
    """
    if results is not None:
        _check_results(results)
    config, names = state.description.config, list(state.experts)
    rows = [f"| {r['part']} | {r['parameters']:,} | {r['percent of base']:.2f} |" for r in parameters.table()]
    experts = []
    for name, expert_state in state.description.states.items():
        lora = state.experts[name].config
        frozen = ", frozen" if name in state.description.frozen else ""
        experts.append(f"| {name} | {lora.r} | {lora.lora_alpha} | {expert_state}{frozen} |")
    base = public_name(state.description.base_name or "")
    return _TEMPLATE.format(
        count=len(names),
        base=base or "an unnamed base",
        base_line=f"base_model: {base if re.fullmatch(_PLAIN, base) else json.dumps(base)}\n" if base else "",
        router_layer=router_layer,
        passes=passes_per_step,
        rows="\n".join(rows),
        experts="\n".join(experts),
        granularity=config.granularity,
        top_k=config.top_k or min(2, len(names) + config.route_to_base),
        temperature=config.temperature,
        router_type=config.router_type,
        results=_results_table(results, metric) if results else "",
        first=names[0],
    )


def public_name(base: str) -> str:
    """What a base is called elsewhere: its hub id, also where it lies in the hub's cache; of a folder the last part."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)", base)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if base == EMBEDDED:
        return HUB_ID
    if "\\" in base:
        return PureWindowsPath(base).name
    return PurePosixPath(base).name if base.startswith(("/", ".", "~")) or base.count("/") > 1 else base


def _check_results(results: Any) -> None:
    if not isinstance(results, Mapping) or not all(isinstance(column, Mapping) for column in results.values()):
        raise TypeError(f"results={results!r:.60}: map columns to rows to values, as {{'mixture': {{'sql': 0.9}}}}.")


def _results_table(results: Mapping[str, Mapping[str, Any]], metric: str | None) -> str:
    columns = list(results)
    names = list(dict.fromkeys(name for column in results.values() for name in column))
    lines = [
        "",
        *([metric, ""] if metric else []),
        "| held out | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name in names:
        values = (results[column].get(name) for column in columns)
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.3f}" for v in values) + " |")
    return "\n".join([*lines, ""])
