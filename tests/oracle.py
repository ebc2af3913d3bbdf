"""The mixture by its definition: the loop over experts, and a router that reads in a pass of its own.

Shapes: B batch, S sequence, D in, O out, E experts, n router outputs, L decoder layers.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dylora_moe import DyLoraMoE


class Loop(nn.Module):
    """y = base(x) + Σ_e w_e · s_e · (x A_eᵀ) B_eᵀ, one expert after the other, on copies of a layer's tensors."""

    def __init__(self, layer: LoraLayer, base: nn.Module, configs: dict[str, Any]):
        super().__init__()
        self.base = base
        self.A = nn.ModuleDict({name: copy.deepcopy(part) for name, part in layer.lora_A.items()})
        self.B = nn.ModuleDict({name: copy.deepcopy(part) for name, part in layer.lora_B.items()})
        self.scaling = {}
        for name, part in self.A.items():
            config, rank = configs[name], part.weight.shape[0]
            self.scaling[name] = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.names: Sequence[str] = ()
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.add_experts(x, self.base(x))

    def add_experts(self, x: Tensor, y: Tensor) -> Tensor:
        for column, name in enumerate(self.names):
            if name in self.A:
                delta = self.B[name](self.A[name](x)) * self.scaling[name]
                y = y + self.weights[..., column].reshape(*x.shape[:-1], 1) * delta
        return y


class Oracle(nn.Module):
    """A mixture by its definition; `base` is a second, bare copy of the mixture's base.

    Every parameter of router and experts is a copy, found by its name in the mixture with `gradients`.
    """

    def __init__(self, model: DyLoraMoE, base: Any):
        super().__init__()
        self.bare, self.base, self.router = copy.deepcopy(base), base, copy.deepcopy(model.router)
        self.names, self.config, self.k = model.expert_names, model.moe_config, model.router_layer_index
        self.loops: dict[str, Loop] = {}
        for layer in model.routed_layers:
            path = layer.routing_name
            self.loops[path] = Loop(layer, base.get_submodule(path), model.peft_config)
            base.set_submodule(path, self.loops[path])
        for parameter in [*self.bare.parameters(), *self.base.parameters()]:
            parameter.requires_grad_(False)
        for loop in self.loops.values():
            for parameter in [*loop.A.parameters(), *loop.B.parameters()]:
                parameter.requires_grad_(True)
        self.train(model.training)

    def logits(self, ids: Tensor, prompt: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """`[B, S or 1, n]` router scores; `prompt [B, S]` marks the tokens that decide at sequence granularity."""
        with torch.no_grad():
            hidden = self.bare(ids, output_hidden_states=True, **inputs).hidden_states[self.k]
        scores = self.router(hidden)
        if self.config.granularity == "token":
            return scores
        if self.config.granularity == "prefix":
            return scores.cumsum(1) / torch.arange(1, scores.shape[1] + 1)[:, None]
        rows = [row[keep].mean(0, keepdim=True) for row, keep in zip(scores, prompt, strict=True)]
        return torch.stack(rows)

    def weights(self, logits: Tensor, k: int | None) -> Tensor:
        """`[B, S or 1, n]`: softmax over all scores, or over the `k` best of each token."""
        logits = logits / self.config.temperature
        if k is not None:
            best = logits >= logits.sort(dim=-1, descending=True).values[..., k - 1 : k]
            logits = torch.where(best, logits, -torch.inf)
        return logits.softmax(-1)

    def run(self, ids: Tensor, weights: Tensor, **inputs: Tensor) -> Any:
        """The base's output with the experts mixed by `weights [B, S or 1, n]` (a base route is the last column)."""
        for loop in self.loops.values():
            loop.names = self.names
            loop.weights = weights.expand(*ids.shape, -1)
        return self.base(ids, **inputs)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by the name that the parameter has in the mixture."""
        named = {f"router.{name}": parameter for name, parameter in self.router.named_parameters()}
        for path, loop in self.loops.items():
            for part in ("A", "B"):
                for name, parameter in getattr(loop, part).named_parameters():
                    named[f"base_model.model.{path}.lora_{part}.{name}"] = parameter
        return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
