"""Runs on a tiny shape, shared by the tests."""

from __future__ import annotations

import pytest

from dylora_moe.benchmark.models import Models
from dylora_moe.benchmark.settings import Settings
from dylora_moe.benchmark.work import runners

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
