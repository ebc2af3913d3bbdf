"""The router: a small network that scores the experts from one hidden state of the frozen base.

Shapes: D hidden size of the base, H_r hidden size of the router, E outputs (experts, then the base route if any).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Scores `hidden [..., D]` of any float dtype into float32 logits `[..., E]`.

    The state is layer-normalised (without parameters) and scored in float32, whatever autocast or the module's own
    dtype say. `"mlp"` has exactly two parameters, `down [H_r, D]` and `up [E, H_r]`; `"linear"` has `up [E, D]`.

    Args:
        hidden_size: D.
        num_outputs: E.
        router_type: `"mlp"` or `"linear"`.
        router_hidden_size: H_r, for `"mlp"`.
    """

    def __init__(self, hidden_size: int, num_outputs: int, router_type: str = "mlp", router_hidden_size: int = 64):
        super().__init__()
        width = hidden_size
        self.register_parameter("down", None)
        if router_type == "mlp":
            width = router_hidden_size
            self.down = nn.Parameter(_fresh_rows(router_hidden_size, hidden_size))
        self.up = nn.Parameter(_fresh_rows(num_outputs, width))

    @property
    def num_outputs(self) -> int:
        """E: the number of scores per token."""
        return self.up.shape[0]

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            state = F.layer_norm(hidden.float(), hidden.shape[-1:])
            if self.down is not None:
                state = F.silu(F.linear(state, self.down.float()))
            return F.linear(state, self.up.float())

    def grow(self, position: int) -> None:
        """Insert one freshly initialised output at `position`; every other row stays bit-identical."""
        row = _fresh_rows(1, self.up.shape[1]).to(self.up)
        self._replace(torch.cat([self.up.data[:position], row, self.up.data[position:]]))

    def shrink(self, position: int) -> None:
        """Remove the output at `position`; every other row stays bit-identical."""
        self._replace(torch.cat([self.up.data[:position], self.up.data[position + 1 :]]))

    def _replace(self, rows: Tensor) -> None:
        # a new Parameter: a graph that still holds the old one would accept no gradient of another shape
        self.up = nn.Parameter(rows, requires_grad=self.up.requires_grad)


def _fresh_rows(rows: int, width: int) -> Tensor:
    """The default initialisation of a bias-free `nn.Linear`."""
    return nn.init.kaiming_uniform_(torch.empty(rows, width), a=math.sqrt(5))
