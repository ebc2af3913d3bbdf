"""Layers whose class is swapped: PEFT's own where nothing is in force, and nothing changed where they are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from dylora_moe.layers.in_force import Holder, InForce
from dylora_moe.layers.routed import RoutedLayer, check_not_bypassed, route_layers, routed_class
from tiny import routed_layer
from tinybase import tiny_base


def test_one_routed_class_per_peft_class():
    assert routed_class(Linear) is routed_class(Linear)
    assert issubclass(routed_class(Linear), (RoutedLayer, Linear))


def test_nothing_in_force_is_pefts_layer_to_the_bit():
    layer = routed_layer(nn.Linear(7, 5))
    stock = copy.deepcopy(layer)
    stock.__class__ = type(layer).__mro__[2]
    x = torch.randn(2, 3, 7)
    assert torch.equal(layer(x), stock(x))


def test_forced_adapters_are_pefts_active_ones():
    layer = routed_layer(nn.Linear(7, 5))
    layer.holder.put(InForce(forced=("green",)))
    assert layer.active_adapters == ["green"]
    layer.holder.put(InForce(forced=()))
    x = torch.randn(2, 3, 7)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias='all'")],
)
def test_what_cannot_be_mixed_is_refused_and_left_alone(options, message):
    model = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=["q_proj"], **options))
    with pytest.raises(ValueError, match=message):
        route_layers(model.base_model, Holder(InForce()))
    assert not any(isinstance(module, RoutedLayer) for module in model.modules())


def test_a_replaced_forward_is_noticed():
    layer = routed_layer(nn.Linear(7, 5))
    check_not_bypassed(layer.holder)
    layer.forward = layer.base_layer.forward
    with pytest.raises(ValueError, match="something replaced the layer's `forward`"):
        check_not_bypassed(layer.holder)
