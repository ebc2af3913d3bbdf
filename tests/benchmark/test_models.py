"""The models of a run: built once, on one base's tensors, in the form that is asked for."""

from __future__ import annotations

import torch

from dylora_moe.benchmark.models import mixing_form, share


def test_models_are_built_once(variants):
    _, models, _, _ = variants(variants=("base",))
    assert models.mixture(2) is models.mixture(2)
    assert models.peft(4, same_dtype=False) is not models.peft(4, same_dtype=True)
    assert models.bare() is models.bare()


def test_a_form_is_in_force_within_its_block_only(variants):
    _, models, _, _ = variants(variants=("base",))
    model = models.mixture(2)
    with mixing_form(model, "reference"):
        assert model.moe_config.mixing_form == "reference"
    assert model.moe_config.mixing_form == "auto"


def test_fake_models_hold_no_storage(variants):
    _, models, _, _ = variants(work="train", fake=True, variants=("base", "auto"))
    with models.running():
        assert all(type(p) is not torch.nn.Parameter for p in models.mixture(4).parameters())


def test_share_leaves_the_modules_apart(variants):
    _, models, _, _ = variants(variants=("base",))
    copy = share(models.base)
    assert copy.lm_head is not models.base.lm_head
    assert copy.lm_head.weight is models.base.lm_head.weight
