"""What `enable_routing` and `routing_weights=` refuse, and that a refusal leaves nothing behind."""

from __future__ import annotations

import re

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from dylora_moe import enable_routing
from stock import assert_unchanged, logits, lora_layers, snapshot, stock_model
from tiny import tiny_base, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
]
WEIGHTS = torch.tensor([0.5, -0.25, 1.5], dtype=torch.float64)

BAD_WEIGHTS = [
    (torch.zeros(2), ValueError, r"shape \[2\]; expected \[3\] or \[batch, 3\] or \[batch, sequence, 3\] with batch=2"),
    (torch.zeros(3, 3), ValueError, r"shape \[3, 3\]"),
    (torch.zeros(2, 4), ValueError, r"shape \[2, 4\]"),
    (torch.zeros(2, 8, 3), ValueError, r"shape \[2, 8, 3\].*sequence=9"),
    (torch.zeros(1, 2, 9, 3), ValueError, r"shape \[1, 2, 9, 3\]"),
    (torch.tensor(1.0), ValueError, r"shape \[\]"),
    (torch.tensor([0.0, float("nan"), 1.0]), ValueError, "not finite"),
    (torch.tensor([0.0, float("inf"), 1.0]), ValueError, "not finite"),
    (torch.zeros(3, dtype=torch.long), TypeError, "must be a float tensor"),
    ([0.2, 0.3, 0.5], TypeError, "must be a float tensor"),
]


@pytest.mark.parametrize(("weights", "error", "message"), BAD_WEIGHTS, ids=[m for _, _, m in BAD_WEIGHTS])
def test_bad_weights_are_refused_and_leave_nothing_in_force(weights, error, message):
    model = enable_routing(stock_model())
    expected = logits(model, tokens())
    with pytest.raises(error, match=message):
        model(tokens(), routing_weights=weights)
    with pytest.raises(error):
        model.generate(tokens(), routing_weights=weights)
    assert torch.equal(logits(model, tokens()), expected)


def test_weights_per_token_cannot_be_generated_with():
    model = enable_routing(stock_model())
    with pytest.raises(ValueError, match=r"shape \[2, 9, 3\]; expected \[3\] or \[batch, 3\] with batch=2"):
        model.generate(tokens(), routing_weights=torch.zeros(2, 9, 3))


def test_an_error_inside_the_model_leaves_nothing_in_force():
    model = enable_routing(stock_model())
    expected = logits(model, tokens())
    for call, options in ((model, {}), (model.generate, {"max_new_tokens": 2})):
        with pytest.raises(IndexError):
            call(tokens() + 1000, routing_weights=WEIGHTS, **options)
        assert not model.holder.now.anything
        assert torch.equal(logits(model, tokens()), expected)


def test_adapter_names_beside_weights_are_refused():
    model = enable_routing(stock_model())
    with pytest.raises(ValueError, match="adapter_names and routing_weights both choose adapters"):
        model(tokens(), adapter_names=["red", "green"], routing_weights=WEIGHTS)


UNMIXABLE = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "'red': modules_to_save=['lm_head']"),
    "bias": ({"bias": "lora_only"}, "'red': bias='lora_only'"),
    "target_parameters": (
        {"target_parameters": ["self_attn.q_proj.weight"], "target_modules": []},
        "'red': target_parameters=['self_attn.q_proj.weight']",
    ),
    "trainable_token_indices": ({"trainable_token_indices": [1]}, "'red': trainable_token_indices"),
}


@pytest.mark.parametrize("kind", UNMIXABLE)
def test_what_cannot_be_mixed_is_refused_and_left_alone(kind):
    settings, message = UNMIXABLE[kind]
    config = LoraConfig(**{"r": 2, "target_modules": ["v_proj"], **settings})
    model = get_peft_model(tiny_base(), config, adapter_name="red")
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        enable_routing(model)
    assert_unchanged(model, before)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)


def test_convolutions_are_refused_and_left_alone():
    model = get_peft_model(Convolution(), LoraConfig(r=2, target_modules=["conv", "linear"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^conv \(Conv2d\) cannot be mixed per token; leave it out of target_modules"):
        enable_routing(model)
    assert_unchanged(model, before)


def test_a_replaced_forward_would_bypass_the_routing_and_is_refused():
    model = stock_model()
    layer = lora_layers(model)[0]
    layer.forward = layer.forward
    with pytest.raises(ValueError, match="something replaced its `forward`"):
        enable_routing(model)


@pytest.mark.parametrize("what", ["base", "ia3"])
def test_only_lora_models_can_be_enabled(what):
    model = tiny_base()
    if what == "ia3":
        model = get_peft_model(model, IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(TypeError, match=r"needs a PeftModel with LoRA adapters, not (Llama|Peft)"):
        enable_routing(model)
