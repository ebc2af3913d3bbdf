"""Stock PEFT adapters on tiny bases, the bases' state before a call, and forward passes without gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import mixed_experts, tiny_base


def stir(model: nn.Module, seed: int = 0) -> None:
    """Give every adapter tensor of `model` a random value, so that each shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise


def stock_model(architecture: str = "llama", dtype: torch.dtype = torch.float64, **experts: LoraConfig) -> PeftModel:
    """Adapters (three very different ones) on one tiny base, all active, made with nothing but PEFT."""
    configs = experts or mixed_experts(architecture)
    first, *others = configs
    model = get_peft_model(tiny_base(architecture, dtype), configs[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, configs[name])
    model.base_model.set_adapter(list(configs))
    stir(model)
    return model.eval()


def lora_layers(model: nn.Module) -> list[Any]:
    """Every LoRA layer of a model, routed or not."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def save_stock_adapter(
    folder: Path, config: LoraConfig, architecture: str = "llama", seed: int = 0, **base: Any
) -> Path:
    """What stock PEFT writes for an adapter with `config` on a tiny base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, embeddings that are saved beside their adapter
        model = get_peft_model(tiny_base(architecture, **base), config)
        stir(model, seed)
        model.save_pretrained(folder)
    return folder


def stock_logits(folder: Path, base: PreTrainedModel, ids: Tensor) -> Tensor:
    """What stock PEFT computes with the adapter in `folder`; `base` is bare again afterwards."""
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    computed = logits(model, ids)
    model.unload()
    return computed


def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """`[B, S, vocabulary]` without gradients."""
    with torch.no_grad():
        return model(ids, **inputs).logits


Snapshot = tuple[list[tuple[str, type]], dict[str, bool], list[bool], dict[str, Tensor]]


def snapshot(model: nn.Module) -> Snapshot:
    """What a failed call must leave alone: modules and their modes, `requires_grad`, tensors."""
    modules = list(model.named_modules())
    return (
        [(name, type(module)) for name, module in modules],
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        [module.training for _, module in modules],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def assert_unchanged(model: nn.Module, before: Snapshot) -> None:
    """`model` is what it was when `snapshot` was taken, bit for bit."""
    *structure, tensors = snapshot(model)
    assert structure == list(before[:3])
    assert_same_tensors(tensors, before[3])


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names in the same order, the same dtypes, the same bits."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
