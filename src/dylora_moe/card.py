"""The model card of a checkpoint, from a template and the model's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .trace import parameter_report

if TYPE_CHECKING:
    from .model import DyLoraMoE

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


def model_card(model: DyLoraMoE, results: Mapping[str, Any] | None = None) -> str:
    """Markdown for the folder's README.md.

    Args:
        model: the mixture.
        results: measured values to show: column → {row → share between 0 and 1, or loss}.
    """
    config = model.moe_config
    rows = [
        f"| {r['part']} | {r['parameters']:,} | {r['percent of base']:.2f} |" for r in parameter_report(model).table()
    ]
    experts = []
    for name, state in model.expert_states.items():
        lora = model.lora_config(name)
        frozen = ", frozen" if name in model._frozen_experts else ""
        experts.append(f"| {name} | {lora.r} | {lora.lora_alpha} | {state}{frozen} |")
    base = model.base_name or "an unnamed base"
    return _TEMPLATE.format(
        count=model.num_experts,
        base=base,
        base_line=f"base_model: {base}\n" if base.count("/") == 1 and not base.startswith(("/", ".")) else "",
        router_layer=model.router_layer,
        passes=model.passes_per_step,
        rows="\n".join(rows),
        experts="\n".join(experts),
        granularity=config.granularity,
        top_k=config.top_k or min(2, model.router.num_outputs),
        temperature=config.temperature,
        router_type=config.router_type,
        results=_results_table(results) if results else "",
        first=model.expert_names[0],
    )


def _results_table(results: Mapping[str, Any]) -> str:
    columns = list(results)
    names = list(dict.fromkeys(name for column in results.values() for name in column))
    lines = ["", "| held out | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name in names:
        values = (results[column].get(name) for column in columns)
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.3f}" for v in values) + " |")
    return "\n".join([*lines, ""])
