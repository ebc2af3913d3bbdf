"""What TRL and accelerate put around a model is gone after the training."""

from __future__ import annotations

from types import SimpleNamespace

from dylora_moe.training.trainer.wrappers import unwrap_autocast, unwrap_head
from tinybase import tiny_base


def test_unwrap_head_takes_every_wrapper_off():
    base = tiny_base(layers=2)
    mixture = SimpleNamespace(get_base_model=lambda: base)
    base.forward = lambda: None
    unwrap_head(mixture)
    assert "forward" not in base.__dict__


def test_unwrap_autocast_takes_accelerates_wrapper_off():
    mixture = SimpleNamespace(forward=lambda: None, _original_forward=lambda: None)
    unwrap_autocast(mixture)
    assert not vars(mixture)
