"""The router: a small network that scores the experts from one hidden state of the frozen base.

A type of router is added by a row in `ROUTERS`: its parameters, and how they score. Shapes: D hidden size of the base,
H_r hidden size of the router, E outputs (experts, then the base route if any).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .granularity import Aggregated, Deciding, Granularity

CALIBRATIONS = ("token", "sequence")
"""What a computed router has a temperature for: scores of single tokens, and means over many."""


class RouterType(NamedTuple):
    """One way to score.

    Attributes:
        parameters: `(D, E, H_r)` → the fresh parameters by name.
        score: `(router, state)` → float32 `[..., E]` of the layer-normalised float32 `state [..., D]`.
        rows: the parameters with one row per output, which grow and shrink with the experts.
        computed: they are computed from what the experts were taught, not trained; an expert without has no row yet.
    """

    parameters: Callable[[int, int, int], dict[str, Tensor]]
    score: Callable[[Any, Tensor], Tensor]
    rows: tuple[str, ...] = ("up",)
    computed: bool = False


def _score_mlp(router: Any, state: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(state, router.down.float())), router.up.float())


def _score_linear(router: Any, state: Tensor) -> Tensor:
    return F.linear(state, router.up.float())


def _score_closed_form(router: Any, state: Tensor) -> Tensor:
    return F.linear(state, router.weight.float(), router.bias.float())


def _closed_form(D: int, E: int, H: int) -> dict[str, Tensor]:
    return {"weight": torch.zeros(E, D), "bias": torch.zeros(E), "temperature": torch.ones(len(CALIBRATIONS))}


def _fresh_rows(rows: int, width: int) -> Tensor:
    """The default initialisation of a bias-free `nn.Linear`."""
    return nn.init.kaiming_uniform_(torch.empty(rows, width), a=math.sqrt(5))


ROUTERS: dict[str, RouterType] = {
    "mlp": RouterType(lambda D, E, H: {"down": _fresh_rows(H, D), "up": _fresh_rows(E, H)}, _score_mlp),
    "linear": RouterType(lambda D, E, H: {"up": _fresh_rows(E, D)}, _score_linear),
    "closed_form": RouterType(_closed_form, _score_closed_form, ("weight", "bias"), computed=True),
}


def normalised(hidden: Tensor) -> Tensor:
    """What a router scores: `hidden [..., D]` in float32, layer-normalised without parameters."""
    return F.layer_norm(hidden.float(), hidden.shape[-1:])


class Router(nn.Module):
    """Scores `hidden [..., D]` of any float dtype into float32 logits `[..., E]`.

    The state is layer-normalised (without parameters) and scored in float32, whatever autocast or the module's own
    dtype say. `"mlp"` has exactly two parameters, `down [H_r, D]` and `up [E, H_r]`; `"linear"` has `up [E, D]`;
    `"closed_form"` has `weight [E, D]` and `bias [E]`, frozen as they are computed (`skills/closed_form.py`), and a
    `temperature` for each of `CALIBRATIONS`.

    Args:
        hidden_size: D.
        num_outputs: E.
        router_type: of `ROUTERS`.
        router_hidden_size: H_r, for `"mlp"`.
    """

    def __init__(self, hidden_size: int, num_outputs: int, router_type: str = "mlp", router_hidden_size: int = 64):
        super().__init__()
        if router_type not in ROUTERS:
            raise ValueError(f"router_type={router_type!r}: choose one of {', '.join(ROUTERS)}.")
        self.router_type = router_type
        self.sizes = hidden_size, router_hidden_size
        for name, values in ROUTERS[router_type].parameters(hidden_size, num_outputs, router_hidden_size).items():
            self.register_parameter(name, nn.Parameter(values, requires_grad=not self.computed))

    @property
    def computed(self) -> bool:
        """Whether it is computed from skills, not trained."""
        return ROUTERS[self.router_type].computed

    @property
    def num_outputs(self) -> int:
        """E: the number of scores per token."""
        return getattr(self, ROUTERS[self.router_type].rows[0]).shape[0]

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return ROUTERS[self.router_type].score(self, normalised(hidden))

    def scores(self, hidden: Tensor, granularity: Granularity, deciding: Deciding) -> Aggregated:
        """The scores that decide, `[B, S or 1, E]`, of `hidden [B, S, D]`, and what a later pass goes on from.

        Args:
            hidden: what is read.
            granularity: how the scores of single tokens become those that decide.
            deciding: which tokens do.
        """
        scores = self(hidden)
        scores, totals = granularity.aggregate(scores, deciding.to(scores.device))
        temperature = getattr(self, "temperature", None)
        if temperature is not None:
            scores = scores / temperature[CALIBRATIONS.index(granularity.calibration)].to(scores)
        return Aggregated(scores, totals)

    def grow(self, position: int) -> None:
        """Insert one freshly initialised output at `position`; every other row stays bit-identical."""
        width, hidden = self.sizes
        fresh = ROUTERS[self.router_type].parameters(width, 1, hidden)
        for name in ROUTERS[self.router_type].rows:
            old = getattr(self, name)
            self._replace(name, torch.cat([old.data[:position], fresh[name].to(old), old.data[position:]]))

    def shrink(self, position: int) -> None:
        """Remove the output at `position`; every other row stays bit-identical."""
        for name in ROUTERS[self.router_type].rows:
            old = getattr(self, name).data
            self._replace(name, torch.cat([old[:position], old[position + 1 :]]))

    def _replace(self, name: str, rows: Tensor) -> None:
        # a new Parameter: a graph that still holds the old one would accept no gradient of another shape
        setattr(self, name, nn.Parameter(rows, requires_grad=getattr(self, name).requires_grad))
