"""Experts and fixed mixtures as stock PEFT adapters."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from dylora_moe import DyLoraMoE
from rounding import EXACT, FLOAT32
from stock import logits, stir, stock_logits
from tiny import ARCHITECTURES, difference, mixed_experts, tiny_base, tiny_config, tiny_mixture, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


def differing(architecture: str, dtype: torch.dtype = torch.float64) -> DyLoraMoE:
    """Different targets, ranks, alphas, rsLoRA, biases; nothing of the mixture's is the same twice."""
    return tiny_mixture(architecture, dtype, experts=mixed_experts(architecture))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_exported_expert_is_the_forced_expert(architecture, tmp_path):
    model = differing(architecture, torch.float32)
    for name in model.expert_names:
        model.export_expert(name, tmp_path / name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        stock = stock_logits(tmp_path / name, tiny_base(architecture), tokens())
        assert torch.equal(stock, logits(model, tokens(), experts=name))
    fields = json.loads((tmp_path / "green" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (5, 4, True)
    assert fields["fan_in_fan_out"] is (architecture == "gpt2")
    assert (fields["inference_mode"], fields["task_type"], fields["peft_type"]) == (True, "CAUSAL_LM", "LORA")


def test_exporting_an_unknown_expert_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="unknown expert 'gray'; the experts are red, green, blue"):
        tiny_mixture().export_expert("gray", tmp_path / "out")
    assert not (tmp_path / "out").exists()


WEIGHTS = [
    {"red": 0.5, "green": 0.3, "blue": 0.2},
    {"blue": 2.0, "red": -1.5},
    {"green": 1.0},
    {"red": 0.0, "blue": 1.0},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exported_mixture_is_the_forced_mixture(architecture, weights, tmp_path):
    """One exact LoRA: float64 to 1e-12, loaded by stock PEFT and by us."""
    model = differing(architecture)
    given = torch.tensor([weights.get(name, 0.0) for name in model.expert_names], dtype=torch.float64)
    expected = logits(model, tokens(), routing_weights=given)
    model.export_mixture(weights, tmp_path)
    base = tiny_base(architecture, torch.float64)
    assert difference(stock_logits(tmp_path, base, tokens()), expected) <= EXACT
    again = DyLoraMoE.from_adapters(base, {"fixed": str(tmp_path)}).eval()
    assert difference(logits(again, tokens(), experts="fixed"), expected) <= EXACT
    assert difference(expected, logits(model, tokens(), experts="base")) > 1e-2


def test_exported_mixture_in_single_precision(tmp_path):
    model = differing("llama", torch.float32)
    expected = logits(model, tokens(), routing_weights=torch.tensor([0.5, 0.3, 0.2]))
    model.export_mixture(WEIGHTS[0], tmp_path)
    # other GEMM shapes than the mixture's, over four layers
    assert difference(stock_logits(tmp_path, tiny_base(), tokens()), expected) <= FLOAT32


def test_exported_mixture_adds_up_the_ranks_layer_by_layer(tmp_path):
    differing("llama").export_mixture(WEIGHTS[0], tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ranks = {key.split(".")[-3]: tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key}
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert ranks == {"q_proj": 2 + 5, "down_proj": 2 + 1}
    assert {config.r, *config.rank_pattern.values()} == {7, 3}
    assert config.lora_bias is True


def test_exported_mixture_with_experts_on_the_embeddings(tmp_path):
    experts = {
        "ids": LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
        "more": LoraConfig(r=3, use_rslora=True, target_modules=["embed_tokens", "lm_head"]),
    }
    model = tiny_mixture("gemma2", torch.float64, experts=experts)  # Gemma scales its embeddings
    stir(model)
    expected = logits(model, tokens(), routing_weights=torch.tensor([0.25, 1.5], dtype=torch.float64))
    model.export_mixture({"ids": 0.25, "more": 1.5}, tmp_path)
    assert difference(stock_logits(tmp_path, tiny_base("gemma2", torch.float64), tokens()), expected) <= EXACT


def with_odd_experts() -> DyLoraMoE:
    experts = {
        "red": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        "green": LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
        "blue": LoraConfig(r=2, target_modules=["embed_tokens"]),
    }
    return tiny_mixture(experts=experts)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"weights=\{\}: name at least one expert"),
        ({"gray": 1.0}, "unknown expert 'gray'"),
        ({"green": float("nan")}, "weight of 'green' is nan; it must be finite"),
        ({"green": float("inf")}, "weight of 'green' is inf; it must be finite"),
        ({"red": 1.0}, "expert 'red' uses DoRA, whose output is not linear"),
        ({"green": 0.5, "blue": 0.5}, "embed_tokens is an embedding, and PEFT knows no adapter with lora_bias"),
    ],
)
def test_mixture_that_is_no_lora(weights, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        with_odd_experts().export_mixture(weights, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_imported_regular_expression_is_exported_as_it_came(tmp_path):
    config = LoraConfig(r=2, target_modules=r".*\.[13]\.mlp\.(up|down)_proj", init_lora_weights=False)
    model = DyLoraMoE(tiny_base(), tiny_config(expert_names=["re"]), {"re": config}).eval()
    model.export_expert("re", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == config.target_modules
    assert torch.equal(stock_logits(tmp_path, tiny_base(), tokens()), logits(model, tokens(), experts="re"))
