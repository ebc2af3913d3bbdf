"""The holder of what is in force right now, shared by all routed layers of a model.

Shapes: B batch, S sequence, T = B·S tokens, D in, O out, E experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mixing.align import align_weights
from .request import CallLock, Request


class State(NamedTuple):
    """What is in force, to be restored later; the attributes are `Routing`'s."""

    names: tuple[str, ...]
    weights: Tensor | None
    active: int | None
    forced: list[str] | None


@dataclass
class Routing:
    """What is in force right now, shared by all routed layers of a model.

    Attributes:
        names: the experts that the columns of `weights` belong to.
        weights: `[B, S or 1, E]`, or None if no mixing is in force.
        active: how many entries per token may not be zero, where the policy promises it; None otherwise.
        forced: PEFT's own forward with exactly these adapters active ([] for the base), or None.
        form: which of `mixing.FORMS` computes the mixture; "auto" chooses by shapes.
        recompute_shrink: compute H = x·Aᵀ again in the backward pass instead of keeping it.
        packed: per layer and experts what `generate` prepared, for the length of the call; None outside.
            It can not outlive the call, so no optimizer step, load or `.data` write between calls can make it stale.
        memo: what depends on the weights alone, for the layers of one pass without gradients.
        ready: outputs `[…, O]` by layer of those that were computed with the first layer fed by the same input x.
        siblings: by layer the names of the layers usually fed by the same input, itself included.
        layers: the routed layers by name.
        folded: by name, the layers with a fixed mixture in their base's weight, and its original values; empty
            outside a generation that folds.
        folded_by: the request they were folded for.
        spare: by name, the memory that layers were folded into, for the next time; its contents mean nothing.
        reached: how often each layer applied a routing, by name, while somebody traces; None otherwise.
        lock: held by the thread whose routing is in force; threads that share a model take turns.
    """

    names: tuple[str, ...] = ()
    weights: Tensor | None = None
    active: int | None = None
    forced: list[str] | None = None
    form: str = "auto"
    recompute_shrink: bool = False
    packed: dict[Hashable, Any] | None = field(default=None, repr=False)
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    ready: tuple[Tensor, dict[str, Tensor]] | None = field(default=None, repr=False)
    siblings: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    layers: dict[str, Any] = field(default_factory=dict, repr=False)
    folded: dict[str, tuple[Any, Tensor]] = field(default_factory=dict, repr=False)
    folded_by: Request | None = field(default=None, repr=False)
    spare: dict[str, Tensor] = field(default_factory=dict, repr=False)
    reached: dict[str, int] | None = None
    lock: CallLock = field(default_factory=CallLock, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "spare": {}}

    @property
    def in_force(self) -> bool:
        """Whether layers must do anything but call PEFT's own forward."""
        return self.weights is not None or self.forced is not None

    def mix(self, names: tuple[str, ...], weights: Tensor, active: int | None = None) -> None:
        """Put weights `[B, S or 1, E]` in force, of which no more than `active` per token may not be zero."""
        self._set(State(names, weights, active, None))

    def force(self, names: list[str]) -> None:
        """Put PEFT's own forward with the adapters `names` in force; [] is the base."""
        self._set(State((), None, None, names))

    def reset(self) -> None:
        """Nothing is in force."""
        self._set(State((), None, None, None))

    def _set(self, state: State) -> None:
        self.names, self.weights, self.active, self.forced = state
        self.memo, self.ready = {}, None

    @contextmanager
    def restored(self, state: State, reached: dict[str, int] | None) -> Iterator[None]:
        """Put an earlier `state` in force for the length of a block (a checkpointed layer), counting in `reached`."""
        before, counts = self.state(), self.reached
        self._set(state)
        self.reached = reached
        try:
            yield
        finally:
            self._set(before)
            self.reached = counts

    def state(self) -> State:
        """What is in force, to be restored later."""
        return State(self.names, self.weights, self.active, self.forced)

    def weights_for(self, leading: torch.Size, device: torch.device) -> Tensor:
        """The weights in force as `[T, E]` for activations `[*leading, D]` on `device`."""
        assert self.weights is not None
        weights = align_weights(self.weights.to(device), leading)
        return weights.expand(*leading, weights.shape[-1]).flatten(0, -2)
