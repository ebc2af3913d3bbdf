"""Invariant 16: on a separable problem no expert dies, and every task finds an expert of its own."""

import torch
from torch import Tensor

from dylora_moe import DyLoraMoE
from tiny import tiny_base, tiny_config

TASKS = 3
SHIFTS = (1, 7, 12)
"""Task t adds SHIFTS[t] to a symbol, modulo 16; its symbols are the tokens 10 + 16 t + 0 … 15."""


def examples(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences `[rows, 6]` whose next token is the shifted one, and their tasks `[rows]`."""
    task = torch.randint(TASKS, (rows,), generator=generator)
    symbol = torch.randint(16, (rows,), generator=generator)
    shift = torch.tensor(SHIFTS)[task]
    symbols = (symbol[:, None] + shift[:, None] * torch.arange(6)) % 16
    return 10 + 16 * task[:, None] + symbols, task


def train(architecture: str, steps: int, **settings) -> DyLoraMoE:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    base = tiny_base(architecture, num_hidden_layers=2)
    config = tiny_config(r=8, lora_alpha=16, init_lora_weights=True, router_layer=0, **settings)
    model = DyLoraMoE(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        ids, _ = examples(32, generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
