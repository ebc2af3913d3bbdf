"""Files of a training run that never happened, as the job writes them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECIPE = """base:
  model: embedded  # SmolLM2-135M-Instruct
experts:
  sql: {data: {skill: sql, train: 250}}
train:
  max_steps: 200
output: runs/skills
"""


def write_run(
    folder: Path,
    experts: Sequence[str] = ("json", "sql", "date", "cart"),
    *,
    metric: str = "exact_match",
    stages: Sequence[tuple[str, int]] = (("joint", 200),),
    every: int = 2,
    route_to_base: bool = False,
    single: bool = True,
) -> dict[str, Any]:
    """Write results.json, history.json, recipe.yaml and environment.json; the results are given back."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [*experts, "base"] if route_to_base else list(experts)
    results = _results(draw, experts, outputs, metric, single)
    rows = [row for stage, steps in stages for row in _rows(draw, experts, outputs, stage, steps, every)]
    environment = {
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "dylora-moe": "0.1.0"},
        "seed": 0,
        "python": "3.12.4",
        "platform": "Linux-6.1-x86_64",
        "world_size": 1,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "history.json").write_text(json.dumps(rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "environment.json").write_text(json.dumps(environment))
    return results


def _results(draw: random.Random, experts: Sequence[str], outputs: list[str], metric: str, single: bool) -> dict:
    shares = metric == "exact_match"
    levels = {"base": (0.02, 2.4), "mixture": (0.93, 0.31), "top1": (0.9, 0.35), "top2": (0.93, 0.32)}
    if single:
        levels["single"] = (0.88, 0.4)
    columns = {
        name: {
            e: round(max(0.0, min(level[not shares] + draw.uniform(-0.05, 0.05), 1 if shares else 9)), 4)
            for e in experts
        }
        for name, level in levels.items()
    }
    load, routing = {}, {}
    for domain in experts:
        raw = [math.exp(3.5 * (name == domain) + draw.gauss(0, 0.7)) for name in outputs]
        load[domain] = {name: round(value / sum(raw), 4) for name, value in zip(outputs, raw, strict=True)}
        active = {name: min(1.0, 2 * share) for name, share in load[domain].items()}
        routing[domain] = {
            "entropy": draw.uniform(0.1, 0.6),
            "max_probability": draw.uniform(0.7, 0.95),
            "coactivation": {a: {b: active[a] if a == b else active[a] * active[b] for b in active} for a in active},
        }
    return {
        **columns,
        "load": load,
        "routing": routing,
        "metric": metric,
        "reloaded_identical": True,
        "passes_per_step": 1.0,
        "parameters": {**dict.fromkeys(experts, 1220608), "router": 37_120, "base": 134_515_008},
        "phases": {"data": 0.41, "load": 2.3, "train": 312.7, "evaluate top2": 41.0, "save and reload": 8.25},
        "seconds": 364.66,
    }


def _rows(draw: random.Random, experts: Sequence[str], outputs: list[str], stage: str, steps: int, every: int):
    tokens = 0
    for step in range(every, steps + 1, every):
        done = step / steps
        tokens += 700 * every
        lm_loss = 0.2 + 2.6 * math.exp(-6 * done) + draw.gauss(0, 0.05)
        raw = [math.exp(draw.gauss(0, 0.25)) for _ in outputs]
        yield {
            "stage": stage,
            "step": step,
            "loss": lm_loss + 0.14 * math.exp(-3 * done),
            "lm_loss": lm_loss,
            "aux_loss": 0.14 * math.exp(-3 * done) + draw.uniform(0, 0.002),
            "router/balance": 0.01 * draw.random(),
            "router/domain_loss": 1.4 * math.exp(-3 * done) + draw.uniform(0, 0.02),
            "router/entropy": math.log(len(outputs)) * (0.2 + 0.8 * math.exp(-3 * done)),
            "router/max_probability": 1 - (1 - 1 / len(outputs)) * math.exp(-3 * done),
            "router/dead_experts": 0,
            **{f"router/load/{name}": value / sum(raw) for name, value in zip(outputs, raw, strict=True)},
            "learning_rate": 2e-3 * (1 + math.cos(math.pi * done)) / 2,
            "grad_norm": 0.4 + draw.random(),
            "num_tokens": tokens,
            "tokens_per_second": 900 + draw.uniform(-60, 60),
            "epoch": done,
        }
        if step % (10 * every) == 0:
            by_domain = {f"eval_loss/{name}": lm_loss + draw.uniform(-0.1, 0.3) for name in experts}
            yield {"stage": stage, "step": step, "eval_loss": sum(by_domain.values()) / len(by_domain), **by_domain}
    yield {"stage": stage, "step": steps, "train_runtime": 312.0, "train_loss": 0.6}
