"""Seeing inside a mixture: who handled which token.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dylora_moe.arguments import BASE

from .decision import Decision
from .losses import entropy


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
        rows = decision.rows
        mask = torch.ones(rows.batch, rows.length, dtype=torch.bool)
        self._weights.append(decision.all_weights.detach().cpu().clone())
        self._masks.append(mask if rows.mask is None else rows.mask.cpu().clone())

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

    @property
    def masks(self) -> list[Tensor]:
        """`[B, S]` bool of the real tokens, one entry per pass."""
        return list(self._masks)

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
        return float(entropy(shares).mean()) if len(shares) else 0.0

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
