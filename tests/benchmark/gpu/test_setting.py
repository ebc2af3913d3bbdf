"""What is measured here."""

from __future__ import annotations

import torch

from dylora_moe.benchmark.gpu.setting import LARGE, TINY, Setting


def test_tiny_has_every_size_and_smaller():
    assert TINY.keys() == LARGE.keys()
    assert all(TINY[key] < LARGE[key] for key in TINY)


def test_the_gpu_or_else_the_cpu():
    setting = Setting.here(tiny=True)
    assert setting.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    ids = setting.ids(3, 5)
    assert ids.shape == (3, 5)
    assert 0 <= ids.min() <= ids.max() < TINY["vocabulary"]
