"""What watches a run: the speed, and a warning when an expert starves."""

from __future__ import annotations

import logging

from dylora_moe.training.trainer.callbacks import Speed, StarvedExperts


def test_speed_is_of_the_tokens_since_the_last_reading(monkeypatch):
    clock = iter([0.0, 2.0, 4.0, 5.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Speed()
    assert speed.read(100) == 50.0
    speed.restart(1000)  # at 4 s
    assert speed.read(1030) == 30.0


def test_collapse_warns_once_per_famine(caplog):
    watch = StarvedExperts(patience=3)
    with caplog.at_level(logging.WARNING):
        counts = [watch.update({"a": 0.995, "b": share}) for share in (0.0, 0.005, 0.009, 0.0, 0.5, 0, 0, 0)]
    assert counts == [1, 1, 1, 1, 0, 1, 1, 1]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("'b'" in m and "3 steps" in m and "mixture.balance_coefficient" in m for m in messages)
