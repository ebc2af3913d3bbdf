"""What is in force right now, and the one holder that all routed layers of a model look into.

Shapes: B batch, S sequence, T = B·S tokens, D in, O out, E experts, K active experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dylora_moe.mixing.align import align_weights

from .lock import CallLock


@dataclass(frozen=True, eq=False)
class InForce:
    """What the layers do, for one stretch of a pass; it is replaced, never changed.

    Attributes:
        names: the experts that the columns of `weights` belong to.
        weights: `[B, S or 1, E]`, or None if no mixing is in force.
        active: `[B, S or 1, K]` columns of the experts that may have weight; None if all may.
        rows: where every row belongs wholly to one expert or to the base, its column or -1: what `weights` say.
        forced: PEFT's own forward with exactly these adapters active (none of them is the base), or None.
        form: which of `mixing.FORM_NAMES` computes the mixture; "auto" chooses by shapes.
        recompute_shrink: compute H = x·Aᵀ again in the backward pass instead of keeping it.
        memo: what depends on the weights alone, for the layers of one stretch.
        waiting: by layer its input x and output y, computed with the first layer fed by the same input.
    """

    names: tuple[str, ...] = ()
    weights: Tensor | None = None
    active: Tensor | None = None
    rows: tuple[int, ...] | None = None
    forced: tuple[str, ...] | None = None
    form: str = "auto"
    recompute_shrink: bool = False
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    waiting: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def anything(self) -> bool:
        """Whether layers must do anything but call PEFT's own forward."""
        return self.weights is not None or self.forced is not None

    def again(self) -> InForce:
        """The same for another stretch, for example the recompute of a layer: what was kept on the way is left out."""
        return dataclasses.replace(self, memo={}, waiting={})

    def weights_for(self, leading: torch.Size, device: torch.device) -> Tensor:
        """The weights as `[T, E]` for activations `[*leading, D]` on `device`."""
        assert self.weights is not None
        return _by_token(self.weights, leading, device)

    def active_for(self, leading: torch.Size, device: torch.device) -> Tensor | None:
        """The active columns as `[T, K]`, or None if all may have weight."""
        return None if self.active is None else _by_token(self.active, leading, device)


def _by_token(tensor: Tensor, leading: torch.Size, device: torch.device) -> Tensor:
    aligned = align_weights(tensor.to(device), leading)
    return aligned.expand(*leading, tensor.shape[-1]).flatten(0, -2)


class Generation:
    """What one `generate` prepares, and what ends with it.

    It cannot outlive the call, so no optimizer step, load or `.data` write between calls can make it stale. Who keeps
    one for longer (an engine that serves) makes a new one whenever `Holder.changes` has grown.

    Attributes:
        packed: per layer and experts the matrices as the forms want them.
        folded: by name, the layers with a fixed mixture in their base's weight, and its original values.
    """

    def __init__(self) -> None:
        self.packed: dict[Hashable, Any] = {}
        self.folded: dict[str, tuple[Any, Tensor]] = {}


class RoutedLayers:
    """The routed layers of one model, for as long as it lives.

    Attributes:
        by_name: path → layer, in module order.
        siblings: by layer the names of the layers usually fed by the same input, itself included.
        spare: by name, the memory that layers were folded into, for the next time; its contents mean nothing.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Any] = {}
        self.siblings: dict[str, tuple[str, ...]] = {}
        self.spare: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[Any]:
        return iter(self.by_name.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "spare": {}}


class Holder:
    """What all routed layers of a model share.

    Args:
        resting: what is in force while nobody says anything: nothing where PEFT's model is to stay what it was, the
            bare base in a mixture, whose layers must never add their experts up unasked.

    Attributes:
        now: what is in force.
        layers: the layers.
        generation: of the `generate` that runs, if any.
        reached: how often each layer applied a routing, by name, while somebody traces; None otherwise.
        changes: how often the experts or what routes them were changed, for whoever keeps something made of them.
        lock: held by the thread whose routing is in force; threads that share a model take turns.
    """

    def __init__(self, resting: InForce):
        self.now = self.resting = resting
        self.layers = RoutedLayers()
        self.generation: Generation | None = None
        self.reached: dict[str, int] | None = None
        self.changes = 0
        self.lock = CallLock()

    def put(self, value: InForce) -> None:
        """Put `value` in force."""
        self.now = value

    def rest(self) -> None:
        """Nobody says anything any more."""
        self.now = self.resting

    @contextmanager
    def restored(self, value: InForce, reached: dict[str, int] | None) -> Iterator[None]:
        """Put an earlier `value` in force for the length of a block (a checkpointed layer), counting in `reached`."""
        before, self.now = self.now, value
        counts, self.reached = self.reached, reached
        try:
            yield
        finally:
            self.now, self.reached = before, counts
