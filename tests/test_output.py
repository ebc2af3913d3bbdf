"""What a base that is a mixture of experts itself returns stands apart from what ours returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.output import MoECausalLMOutput
from tiny import tokens
from tinybase import tiny_base

BASES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "router_aux_loss_coef": 0.5},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "aux_loss_coef": 0.5, "kv_channels": 4},
}


def moe_base(architecture: str, asked: bool = True) -> Any:
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**sizes, **heads, **BASES[architecture], output_router_logits=asked)
    return AutoModelForCausalLM.from_config(config)


def mixture(architecture: str, asked: bool = True, **options: Any) -> DyLoraMoE:
    base = moe_base(architecture, asked)
    attention = "o_proj" if architecture != "jetmoe" else "lm_head"
    settings = {"num_experts": 2, "r": 2, "target_modules": [attention], "z_loss_coefficient": 0.1, "router_layer": 0}
    return DyLoraMoE.from_base(base, MoELoraConfig(**{**settings, **options}))


@pytest.mark.parametrize("architecture", BASES)
@pytest.mark.parametrize("by_argument", [False, True])
def test_the_bases_own_losses_stand_apart(architecture, by_argument):
    model, ids = mixture(architecture, asked=not by_argument), tokens()
    asked = {"output_router_logits": True} if by_argument else {}
    alone = moe_base(architecture)(ids, labels=ids, output_router_logits=True)
    for experts, routed in ((None, True), ("expert_0", False)):
        found = model(ids, labels=ids, experts=experts, **asked)
        language = cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(found.lm_loss, language)
        torch.testing.assert_close(found.base_aux_loss, alone.aux_loss)
        assert len(found.base_router_logits) == len(alone.router_logits)
        torch.testing.assert_close(found.base_router_logits[0], alone.router_logits[0])
        assert (found.aux_loss is not None) is (found.router_logits is not None) is routed
        own = found.aux_loss if routed else 0.0
        torch.testing.assert_close(found.loss, language + 0.5 * alone.aux_loss + own)
    assert model(ids, labels=ids, **asked).router_logits.shape == (*ids.shape, 2)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids, labels=ids, **asked).loss, alone.loss)


def test_a_base_without_its_own_declares_none():
    model = DyLoraMoE.from_base(tiny_base(), MoELoraConfig(num_experts=2, r=2, target_modules=["q_proj"]))
    ids = tokens()
    found = model(ids, labels=ids)
    assert type(found) is MoECausalLMOutput
    assert found.base_aux_loss is found.base_router_logits is None
    torch.testing.assert_close(found.loss, found.lm_loss + found.aux_loss, rtol=0, atol=0)
    assert torch.equal(model(ids, labels=ids, return_dict=False)[1], found.logits)
