"""Tiny causal language models and mixtures with random weights, built in milliseconds.

Weights are large enough that every expert, every position and every layer shows in the output; biases and norms are
random as well. Dropout of the bases is off, and Gemma 2's sliding window is shorter than the test inputs.

Shapes: B batch, S sequence, D in, O out, R rank, E experts, L decoder layers.
"""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from dylora_moe import DyLoraMoE, MoELoraConfig, enable_routing
from dylora_moe.layers.in_force import InForce

ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt", "gemma2")
VOCAB, LAYERS, WIDTH = 61, 4, 16
NAMES = ("red", "green", "blue")

PLACEMENTS: dict[str, dict[str, Any]] = {
    "first": {"router_layer": 0},
    "middle": {"router_layer": 2},
    "last": {"router_layer": "last"},
    "below": {"router_layer": 2, "layers_to_transform": [0, 1, 2, 3]},
}
"""Every way the router can stand to the experts: settings of `tiny_mixture`."""

COMBINATIONS = [
    *(("llama", placement) for placement in PLACEMENTS),
    ("qwen2", "middle"),
    ("gpt2", "first"),
    ("gpt2", "below"),
    ("opt", "middle"),
    ("opt", "last"),
    ("gemma2", "middle"),
    ("gemma2", "last"),
    ("gemma2", "below"),
]
"""Every architecture and every placement, together where the pair is unlike the others."""

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)
every_combination = pytest.mark.parametrize(("architecture", "placement"), COMBINATIONS)
every_granularity = pytest.mark.parametrize(
    "granularity",
    ["token", "sequence", pytest.param("prefix", marks=pytest.mark.slow)],  # in short: test_prefix.py
)

_GROUPED = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED},
    "qwen2": {**_GROUPED},
    "gemma2": {**_GROUPED, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gpt2": {
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.25,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "opt": {
        "hidden_size": WIDTH,
        "ffn_dim": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "word_embed_proj_dim": WIDTH,
        "max_position_embeddings": 64,
        "init_std": 0.25,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
}
ATTENTION_INPUT = {"gpt2": "c_attn"}
"""The module that feeds attention, by architecture; `q_proj` elsewhere."""
TARGETS = {"gpt2": ["c_attn", "c_fc"], "opt": ["q_proj", "v_proj", "fc2"]}
"""What the experts of a tiny mixture adapt, by architecture: few modules, for speed."""


def tiny_base(architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """A causal language model of four layers, in evaluation mode."""
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[architecture](**{**SHAPES.get(architecture, {}), **tokens, **config})
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def tiny_config(**changes: Any) -> MoELoraConfig:
    """Three experts of rank 3 with non-zero B on every linear layer, router at layer 1, unless told otherwise."""
    settings = {
        "expert_names": list(NAMES),
        "r": 3,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "router_layer": 1,
    }
    return MoELoraConfig(**{**settings, **changes})


def tiny_mixture(
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    base: PreTrainedModel | None = None,
    experts: dict[str, LoraConfig] | None = None,
    **changes: Any,
) -> DyLoraMoE:
    """A mixture in evaluation mode whose router clearly prefers different experts for different tokens."""
    base = tiny_base(architecture, dtype) if base is None else base
    if experts is not None:
        changes["expert_names"] = list(experts)
    changes.setdefault("target_modules", TARGETS.get(architecture, ["q_proj", "v_proj", "down_proj"]))
    model = DyLoraMoE(base, tiny_config(**changes), experts=experts)
    model.router.up.data.mul_(10)
    return model.eval()


def mixed_experts(architecture: str, **common: Any) -> dict[str, LoraConfig]:
    """Three experts with different rank, alpha, scaling, bias and target modules."""
    attention = ATTENTION_INPUT.get(architecture, "q_proj")
    output = {"gpt2": "c_proj", "opt": "fc2"}.get(architecture, "down_proj")
    common = {"init_lora_weights": False, "task_type": "CAUSAL_LM", **common}
    return {
        "red": LoraConfig(r=2, lora_alpha=3, target_modules=[attention, output], **common),
        "green": LoraConfig(r=5, lora_alpha=4, target_modules=[attention], use_rslora=True, **common),
        "blue": LoraConfig(r=1, lora_alpha=1, target_modules=[output], lora_bias=True, **common),
    }


def stock_adapter(model: DyLoraMoE, base: PreTrainedModel, name: str) -> PeftModel:
    """A stock PeftModel of `base` with the configuration and tensors of one expert of `model`."""
    stock = get_peft_model(base, LoraConfig(**lora_fields(model.peft_config[name])), adapter_name=name)
    named = dict(stock.named_parameters())
    for tensor in model.expert_tensors(name):
        named[tensor.name].data.copy_(tensor.tensor.data)
    return stock.train(model.training)


def lora_fields(config: LoraConfig) -> dict[str, Any]:
    """The constructor arguments of a stock configuration."""
    return {name: getattr(config, name) for name, f in LoraConfig.__dataclass_fields__.items() if f.init}


EXPERTS: dict[str, dict[str, Any]] = {
    "red": {"r": 2, "lora_alpha": 3},
    "green": {"r": 5, "lora_alpha": 4, "use_rslora": True},
    "blue": {"r": 1, "lora_alpha": 7, "lora_bias": True},
}
"""LoRA settings of three experts that differ in everything."""


class OneLayer(nn.Module):
    """A model of one layer, called `proj`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def routed_layer(base: nn.Module, experts: dict[str, dict[str, Any]] = EXPERTS, train: bool = False) -> Any:
    """One routed layer around `base`: its holder is `holder`, its configurations by expert `peft_configs`."""
    common = {"target_modules": ["proj"], "init_lora_weights": False}
    configs = {name: LoraConfig(**common, **settings) for name, settings in experts.items()}
    first, *others = configs
    model = get_peft_model(OneLayer(base), configs[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, configs[name])
    model.base_model.set_adapter(list(configs))
    layer = enable_routing(model).train(train).base_model.model.proj
    layer.peft_configs = configs
    return layer


def mix(layer: Any, names: Any, weights: Tensor, active: int | None = None, **how: Any) -> None:
    """Put `weights [B, S or 1, E]` in force, of which only the `active` largest per token may not be zero."""
    few = active is not None and active < weights.shape[-1]
    indices = weights.detach().topk(active, dim=-1, sorted=False).indices if few else None
    layer.holder.put(InForce(tuple(names), weights, indices, **how))


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Random ids `[B, S]` without the padding id 0."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids `[B, S]` and attention mask of rows of different lengths, padded on the left with 0."""
    length = max(len(row) for row in rows)
    ids = torch.stack([nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    return ids, (ids != 0).long()


def positions(mask: Tensor) -> Tensor:
    """Position ids `[B, S]` as `generate` gives them for an attention mask."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest expected value."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model by parameter name, those that exist."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The same parameters have gradients, none of the expected ones is zero throughout, and they agree."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} has a zero gradient: the test would compare nothing"
        assert difference(found[name], gradient) <= tolerance, name
