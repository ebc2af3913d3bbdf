"""Selectors: stock LoRA adapters that carry routing weights, so that a request's model name decides, not the router.

vLLM knows which adapter each token's request asked for, and keeps the prefix caches of adapters apart. A selector is of
rank 1, on a linear `[1, E]` that is never called; its A *is* the row of weights. Shapes: T tokens, S slots, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

SELECT = "dylora_select"
"""The linear that selectors adapt."""


class SelectorError(ValueError):
    """An adapter that is no selector of the mixture that is served."""


def take_own_only(manager: Any, experts: int, folder: str) -> None:
    """Have vLLM's manager of a model's LoRA adapters refuse those that are no selectors of the mixture.

    Args:
        manager: vLLM's `LoRAModelManager`.
        experts: E.
        folder: of the mixture, for the message: the manager is not told where an adapter is from.
    """
    manager.dylora_experts, manager.dylora_folder = experts, folder
    manager.__class__ = _taking_own_only(type(manager))


@functools.cache
def _taking_own_only(kind: type) -> type:
    def add_adapter(self: Any, adapter: Any) -> bool:
        _check(adapter.loras, self.dylora_experts, self.dylora_folder)
        return kind.add_adapter(self, adapter)

    return type(f"Selecting{kind.__name__}", (kind,), {"add_adapter": add_adapter, "__module__": __name__})


def _check(loras: Mapping[str, Any], experts: int, folder: str) -> None:
    if SELECT not in loras:
        reason = f"it has no tensors of the layer {SELECT}"
    elif (found := loras[SELECT].lora_a.shape[-1]) != experts:
        reason = f"it has {found} routing weights, and this mixture has {experts} experts"
    else:
        return
    raise SelectorError(
        f"an adapter is no selector of {folder}: {reason}; name those that the same export wrote, in "
        f"{folder}/selectors."
    )


def forced(weights: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Put the rows of selectors in the place of what the router decided.

    Args:
        weights: float32 `[T, E]`, of the router.
        rows: `[S, E]`, of the selectors in vLLM's slots.
        slots: integers `[T]`, each token's slot; negative where its request has no selector. Those of padding tokens
            may be any number.

    Returns:
        Float32 `[T, E]`.
    """
    chosen = rows.float().index_select(0, slots.clamp(0, rows.shape[0] - 1))
    return torch.where((slots >= 0).unsqueeze(-1), chosen, weights)


def selector_of(model: str, served: Collection[str], selectors: Collection[str]) -> str | None:
    """The selector that a request's model name stands for: `NAME:sql` is `sql`; None if it is nobody's.

    Args:
        model: of the request.
        served: the names under which the mixture is served.
        selectors: of the mixture.
    """
    name, colon, key = model.rpartition(":")
    return key if colon and name in served and key in selectors else None
