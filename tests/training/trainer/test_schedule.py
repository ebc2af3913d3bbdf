"""Schedules: the two-phase learning rate as a multiplier, the temperature by step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dylora_moe.training.recipe.sections import TwoPhase
from dylora_moe.training.trainer.schedule import TemperatureSchedule, two_phase_scheduler


def test_two_phase_multiplies_every_groups_own_rate():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [a], "lr": 1e-2}, {"params": [b], "lr": 1e-4}])
    scheduler = two_phase_scheduler(TwoPhase(seeding=0.4, consolidation=0.05), optimizer, total=10, warmup=2)
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    multipliers = [0, 0.5, 1, 1, *[0.05] * 6]
    assert [first for first, _ in rates] == pytest.approx([1e-2 * m for m in multipliers])
    assert [second for _, second in rates] == pytest.approx([1e-4 * m for m in multipliers])


def test_temperature_cools_geometrically_and_ends_as_configured():
    mixture = SimpleNamespace(moe_config=SimpleNamespace(temperature=0.5))
    schedule = TemperatureSchedule(mixture, start=8.0, share=0.5)
    values = [schedule.at(step, 10) for step in range(10)]
    assert values[:5] == pytest.approx([8.0, 4.0, 2.0, 1.0, 0.5])
    assert values[5:] == [0.5] * 5
    state = SimpleNamespace(global_step=2, max_steps=10)
    schedule.on_step_begin(None, state, None)
    assert mixture.moe_config.temperature == pytest.approx(2.0)
    schedule.on_train_end(None, state, None)
    assert mixture.moe_config.temperature == 0.5
