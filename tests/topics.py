"""Texts of made-up topics, their states on random numbers, and a tiny mixture that can be taught them.

Shapes: D width of a state.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.skills.features import Row, RowStates
from dylora_moe.skills.reading import Reading
from dylora_moe.skills.skill import Skill, Teaching
from tinybase import tiny_base, tiny_tokenizer

TOPICS = ("aaab", "bccd", "deef", "fggh", "hiij")
"""Letters of which a topic's texts are made."""
NAMES = ("sql", "law", "math", "chat", "code")
WIDTH = 12
READING = Reading("base", "float32", "", 1, WIDTH, "tokenizer")


def texts(topic: int, count: int, seed: int = 0) -> list[Any]:
    """Rows of a topic; every third is plain text."""
    drawn = random.Random(f"{topic} {seed}")

    def words(few: int, many: int) -> str:
        return "".join(drawn.choice(TOPICS[topic]) for _ in range(drawn.randint(few, many)))

    rows: list[Any] = [{"prompt": words(8, 30), "completion": words(1, 20)} for _ in range(count)]
    return [f"{row['prompt']}{row['completion']}" if n % 3 == 2 else row for n, row in enumerate(rows)]


def mixture(names: tuple[str, ...] = NAMES, **settings: Any) -> DyLoraMoE:
    """A tiny Llama with a router in closed form and experts that do something; nothing is taught."""
    config = MoELoraConfig(
        expert_names=list(names),
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        r=2,
        **{"router_type": "closed_form", "router_layer": 1, **settings},
    )
    return DyLoraMoE(tiny_base(), config).eval()


def teach(model: DyLoraMoE, *names: str, count: int = 6, **options: Any) -> DyLoraMoE:
    """Teach experts their topics, all or some."""
    for name in names or model.expert_names:
        model.teach(name, texts(NAMES.index(name), count), tiny_tokenizer(), **options)
    return model


def row_states(seed: int, centre: float = 0.0, length: int = 9, prompt: int | None = None) -> RowStates:
    """Random states around a row's own mean, around `centre` in every direction."""
    made = torch.Generator().manual_seed(seed)
    states = torch.randn(length, WIDTH, generator=made) + torch.randn(WIDTH, generator=made) + centre
    prompt = length // 2 if prompt is None else prompt
    row, is_prompt = Row([seed, *range(length)], prompt), torch.arange(length) < prompt
    return RowStates(row, states, is_prompt, states[is_prompt if prompt else ~is_prompt].double().mean(0) / 2)


def skill(first: int, count: int = 5, centre: float | None = None, **shape: Any) -> Skill:
    """A skill of random rows with the seeds from `first`."""
    rows = [row_states(seed, first / 50 if centre is None else centre, **shape) for seed in range(first, first + count)]
    made = Skill.of(rows, WIDTH)
    taught = Teaching(f"2026-01-01T00:00:{first % 60:02}+00:00", "", "", made.rows, made.tokens)
    return replace(made, taught=(taught,))
