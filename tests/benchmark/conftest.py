"""Runs on a tiny shape, shared by the tests."""

from __future__ import annotations

import pytest

from dylora_moe.benchmark.models import Models
from dylora_moe.benchmark.run import FORMAT_VERSION
from dylora_moe.benchmark.runners import runners
from dylora_moe.benchmark.settings import Settings
from dylora_moe.benchmark.targets import PLANS

TINY = {"shape": "tiny", "experts": (4,), "batch": 2, "length": 12, "new_tokens": 3, "rank": 4, "rounds": 0}


@pytest.fixture
def variants(tmp_path):
    """`variants(**settings)` → (settings, models, key → runner, key → why it does not run) on a tiny shape."""

    def build(**changes):
        settings = Settings(**{**TINY, **changes})
        models = Models(settings, tmp_path)
        made, missing = runners(settings, models)
        return settings, models, {runner.key: runner for runner in made}, missing

    return build


@pytest.fixture
def results():
    """`results(plan, **seconds)` → what a run of the plan leaves, with these seconds by variant and round."""

    def build(plan="training", **seconds):
        machine = {"name": "Some CPU, 2 cores", "threads": 2, "python": "3.11", "versions": {"torch": "2"}}
        rows = [
            {"key": key, "title": key, "experts": None, "seconds": values, "ratio": [1.0, 1.0, 1.0]}
            for key, values in seconds.items()
        ]
        settings = PLANS[plan]
        told = {"settings": settings.to_dict(), "command": settings.command(), "machine": machine, "seconds": 1.0}
        return {"format_version": FORMAT_VERSION, **told, "missing": {"xlora/8": "it does not run"}, "rows": rows}

    return build
