"""Seeing inside a mixture: who handled which token, where gradients went, what the experts cost.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import routing
from .request import BASE, Decision
from .sharding import local

if TYPE_CHECKING:
    from .model import DyLoraMoE


@dataclass
class RoutingTrace:
    """What `model.trace()` recorded.

    Attributes:
        names: the experts, then `"base"` if the router has a base route.
        reached: how often each layer really applied a routing, by module name.
    """

    names: list[str]
    reached: dict[str, int] = field(default_factory=dict)
    _weights: list[Tensor] = field(default_factory=list, repr=False)
    _masks: list[Tensor] = field(default_factory=list, repr=False)

    def record(self, decision: Decision) -> None:
        """Add one pass; called by the mixture."""
        if decision.weights is None:
            return
        weights = decision.weights.detach().expand(decision.batch, decision.length, -1).cpu().clone()
        mask = torch.ones(decision.batch, decision.length, dtype=torch.bool)
        self._weights.append(weights)
        self._masks.append(mask if decision.mask is None else decision.mask.cpu().clone())

    @property
    def layers_reached(self) -> list[str]:
        """Names of the layers that really applied a routing, in the order they ran."""
        return list(self.reached)

    @property
    def weights(self) -> Tensor:
        """`[B, S, E]` weights of all recorded passes, one after the other along S.

        Raises:
            ValueError: nothing was recorded, or the passes had different batch sizes (see `passes`).
        """
        if not self._weights:
            raise ValueError("the trace is empty: call the model within `with model.trace()`.")
        if len({w.shape[0] for w in self._weights}) > 1:
            raise ValueError("the recorded passes have different batch sizes; read them one by one from `passes`.")
        return torch.cat(self._weights, dim=1)

    @property
    def passes(self) -> list[Tensor]:
        """`[B, S, E]` weights, one entry per pass through the base."""
        return list(self._weights)

    def load(self) -> dict[str, float]:
        """Share of the real tokens per expert; `"base"` is what went to none."""
        tokens = self._real_tokens()
        shares = tokens.double().mean(0).tolist() if len(tokens) else [0.0] * tokens.shape[-1]
        result = dict(zip([name for name in self.names if name != BASE], shares, strict=True))
        rest = 1.0 - sum(shares) if len(tokens) else 0.0
        if BASE in self.names or rest > 1e-6:
            result[BASE] = max(rest, 0.0)
        return result

    def entropy(self) -> float:
        """Mean entropy of the real tokens' weights in nats: 0 if each goes to one expert, log E if to all alike."""
        shares = self._shares()
        return float(routing.entropy(shares).mean()) if len(shares) else 0.0

    def table(self) -> list[dict[str, Any]]:
        """One row per expert: name, load, share of tokens where it is the strongest, tokens."""
        best = self._shares().argmax(-1)
        return [
            {
                "expert": name,
                "load": share,
                "strongest": float((best == i).float().mean()) if len(best) else 0.0,
                "tokens": len(best),
            }
            for i, (name, share) in enumerate(self.load().items())
        ]

    def _shares(self) -> Tensor:
        """`[tokens, E + 1]`: the weights of the real tokens, and what went to no expert as the last column."""
        tokens = self._real_tokens()
        return torch.cat([tokens, (1 - tokens.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)

    def _real_tokens(self) -> Tensor:
        if not self._weights:
            raise ValueError("the trace is empty: call the model within `with model.trace()`.")
        return torch.cat([w[m] for w, m in zip(self._weights, self._masks, strict=True)])


@dataclass
class GradientStats:
    """Gradients of one group of parameters: how many tensors have one, and the absolute values within.

    Attributes:
        tensors: parameter tensors in the group.
        with_gradient: those whose `.grad` is not None.
        minimum, maximum, mean: of |gradient| over all their elements; 0 if there is none.
    """

    tensors: int = 0
    with_gradient: int = 0
    minimum: float = 0.0
    maximum: float = 0.0
    mean: float = 0.0

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> GradientStats:
        """Statistics of a group."""
        parameters = list(parameters)
        grads = [p.grad.detach().float().abs().flatten() for p in parameters if p.grad is not None]
        if not grads:
            return cls(tensors=len(parameters))
        flat = torch.cat([g.cpu() for g in grads])
        return cls(len(parameters), len(grads), float(flat.min()), float(flat.max()), float(flat.mean()))


def gradient_report(model: DyLoraMoE) -> dict[str, GradientStats]:
    """Gradient statistics per expert (by name), of the `router`, and of everything `frozen` (the base)."""
    groups = parameter_groups(model)
    return {name: GradientStats.of(parameters) for name, parameters in groups.items()}


def parameter_groups(model: DyLoraMoE) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the mixture exactly once: per expert, `router`, `frozen`."""
    groups = {name: [t.tensor for t in model.expert_tensors(name)] for name in model.expert_names}
    groups["router"] = list(model.router.parameters())
    known = {id(p) for group in groups.values() for p in group}
    groups["frozen"] = [p for p in model.parameters() if id(p) not in known]
    return groups


@dataclass
class ParameterReport:
    """Numbers of parameters.

    Attributes:
        base: of the frozen base.
        router: of the router.
        experts: per expert.
        trainable: those that require gradients.
        base_bytes: memory of the base's storages in this process, each counted once.
    """

    base: int
    router: int
    experts: dict[str, int]
    trainable: int
    base_bytes: int

    @property
    def overhead(self) -> float:
        """Router and all experts, in % of the base."""
        return 100.0 * (self.router + sum(self.experts.values())) / self.base

    def table(self) -> list[dict[str, Any]]:
        """One row per expert, router, base: name, parameters, % of the base."""
        rows = {**self.experts, "router": self.router, "base (frozen)": self.base}
        return [{"part": k, "parameters": v, "percent of base": 100.0 * v / self.base} for k, v in rows.items()]


def parameter_report(model: DyLoraMoE) -> ParameterReport:
    """Count the parameters of a mixture."""
    groups = parameter_groups(model)
    counts = {name: sum(p.numel() for p in parameters) for name, parameters in groups.items()}
    frozen = [local(p).untyped_storage() for p in groups["frozen"]]
    storages = {storage.data_ptr(): storage.nbytes() for storage in frozen}
    return ParameterReport(
        base=counts.pop("frozen"),
        router=counts.pop("router"),
        experts=counts,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        base_bytes=sum(storages.values()),
    )
