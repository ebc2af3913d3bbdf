"""Requests that are answered together, timed: every variant writes as many tokens as are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dylora_moe.benchmark.kinds import KINDS, SERVE
from dylora_moe.benchmark.models import Models
from dylora_moe.benchmark.run import run
from dylora_moe.benchmark.serve import serve_runner
from dylora_moe.benchmark.settings import Settings

SETTINGS = Settings(SERVE, "tiny", (3,), batch=4, length=6, new_tokens=5, rank=2, rounds=1, warmup=0)


@pytest.mark.parametrize("key", ["engine-base", "engine", "engine-each", "http"])
def test_a_step_writes_a_token_for_every_request(key, tmp_path, monkeypatch):
    from dylora_moe.serving.engine import Engine

    written = []
    step = Engine.step

    def counting(engine: Engine) -> list:
        events = step(engine)
        written.extend(token for event in events for token in event.tokens)
        return events

    monkeypatch.setattr(Engine, "step", counting)
    runner = serve_runner(SETTINGS, Models(SETTINGS, tmp_path), key, KINDS[key], 3)
    with runner.in_force():
        before = len(written)
        runner.step()
        found = written[before:]
    assert len(found) >= 4 * 5 - 4 if key == "http" else len(found) == 4 * 5
    experts = {token.expert for token in found}
    assert experts <= {"base"} if key == "engine-base" else experts <= set(runner.model.expert_names)
    assert key != "engine-each" or len(experts) == 3


def test_the_batch_that_stays_is_greedy_decoding(tmp_path):
    models = Models(SETTINGS, tmp_path)
    runner = serve_runner(SETTINGS, models, "base", KINDS["base"], None)
    with runner.in_force():
        runner.step()
    with runner.in_force():
        runner.step()  # again from the prompts
    assert isinstance(runner.model, torch.nn.Module)


def test_a_run_of_all():
    results = run(SETTINGS)
    assert [row["key"] for row in results["rows"]] == SETTINGS.keys
    assert all(row["tokens_per_second"] > 0 and row["ratio"] for row in results["rows"])
    with pytest.raises(ValueError, match="give it rounds"):
        run(replace(SETTINGS, rounds=0))
