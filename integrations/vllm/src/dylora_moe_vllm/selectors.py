"""Selectors: stock LoRA adapters that carry routing weights, so that a request's model name decides, not the router.

vLLM knows which adapter each token's request asked for, and keeps the prefix caches of adapters apart. A selector is of
rank 1, on a linear `[1, E]` that is never called; its A *is* the row of weights. Shapes: T tokens, S slots, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

SELECT = "dylora_select"
"""The linear that selectors adapt."""


class SelectorError(ValueError):
    """An adapter that is no selector of the mixture that is served."""


def take_own_only(linear: Any, experts: int, folder: str) -> None:
    """Have a linear with vLLM's LoRA refuse adapters that are no selectors of the mixture, as they get a slot.

    Args:
        linear: what vLLM has put in the place of the one that selectors adapt.
        experts: E.
        folder: of the mixture, for the message: vLLM hands over tensors, and does not say where they are from.
    """
    linear.dylora_experts, linear.dylora_folder, linear.dylora_setting = experts, folder, False
    linear.__class__ = _taking_own_only(type(linear))


@functools.cache
def _taking_own_only(layer: type) -> type:
    def set_lora(self: Any, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
        if (found := lora_a.shape[-1]) != self.dylora_experts:
            raise _not_own(self, f"it has {found} routing weights, and this mixture has {self.dylora_experts} experts")
        self.dylora_setting = True
        layer.set_lora(self, index, lora_a, lora_b)
        self.dylora_setting = False

    def reset_lora(self: Any, index: int) -> None:
        # vLLM calls it first thing in setting, and else for a layer that an adapter does not name
        if not self.dylora_setting:
            raise _not_own(self, f"it has no tensors of the layer {SELECT}")
        layer.reset_lora(self, index)

    body = {"set_lora": set_lora, "reset_lora": reset_lora, "__module__": __name__}
    return type(f"Selecting{layer.__name__}", (layer,), body)


def _not_own(linear: Any, reason: str) -> SelectorError:
    return SelectorError(
        f"an adapter is no selector of {linear.dylora_folder}: {reason}; name those that the same export wrote, in "
        f"{linear.dylora_folder}/selectors."
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
