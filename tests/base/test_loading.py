"""A base that accelerate dispatched: its hooks and the routing do not get into each other's way."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from dylora_moe import DyLoraMoE, MoELoraConfig
from tinybase import tiny_base

IDS = torch.arange(24).view(2, 12)


def mixture(base) -> DyLoraMoE:
    torch.manual_seed(1)
    config = MoELoraConfig(expert_names=["a", "b"], r=4, target_modules="all-linear", init_lora_weights=False)
    return DyLoraMoE.from_base(base, config)


def test_hooks_of_a_dispatched_base_do_not_bypass_the_routing():
    parts = [
        "model.embed_tokens",
        "model.rotary_emb",
        "model.norm",
        "lm_head",
        *(f"model.layers.{i}" for i in range(4)),
    ]
    places = dict.fromkeys(parts, "cpu")
    hooked = mixture(dispatch_model(tiny_base(), places, main_device="cpu", force_hooks=True))
    plain = mixture(tiny_base())
    assert "forward" in hooked.routed_layers[0].base_layer.__dict__
    for model in (hooked, plain):
        model(IDS, labels=IDS).loss.backward()
    for (name, left), right in zip(hooked.named_parameters(), plain.parameters(), strict=True):
        if right.grad is not None:
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_an_offloaded_base_is_refused():
    with pytest.raises(ValueError, match="is offloaded to the CPU or disk"):
        mixture(cpu_offload(tiny_base(), execution_device="cpu"))
