"""The tensors of an expert have a stock adapter file's keys, whatever the kind of layer."""

from __future__ import annotations

import pytest
from peft import get_peft_model_state_dict

from dylora_moe.experts.tensors import layer_tensors
from tiny import tiny_mixture


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"lora_bias": True}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}],
    ids=["plain", "dora", "bias", "embedding and head"],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_keys_are_those_that_peft_writes(settings):
    model = tiny_mixture("llama", **settings)
    parts = [part for layer in model.routed_layers for part in layer_tensors(layer, layer.routing_name, "green")]
    stock = get_peft_model_state_dict(model, adapter_name="green", save_embedding_layers=False)
    assert {part.key for part in parts} == set(stock)
    parameters = dict(model.named_parameters())
    for part in parts:
        assert parameters[part.name] is part.tensor
