"""The run of the bare base up to layer k, for experts below the router's layer and for `router_layer="last"`.

Shapes: B batch, S sequence, D hidden, k router layer, L decoder layers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from dylora_moe.base.placement import Placement


def first_pass(
    base: nn.Module, placement: Placement, k: int, kwargs: dict, keep: bool, training: bool
) -> tuple[dict, Tensor]:
    """Run the bare base up to layer k without gradients.

    Args:
        base: the causal language model.
        placement: where its decoder layers are.
        k: the layer whose input is wanted; L for the final hidden state.
        kwargs: what the decoder was called with.
        keep: whether later tokens of the sequence need its keys and values, too; see `_own_cache`.
        training: of the mixture.

    Returns:
        the main pass' keyword arguments, and `hidden [B, S, D]`.
    """
    decoder: Any = placement.decoder(base)
    layers, kwargs = placement.layers(base), dict(kwargs)
    own = _own_cache(decoder, kwargs, k, placement.num_layers, keep, training) if k > 0 else None
    inputs = {**kwargs, "past_key_values": own, "use_cache": own is not None}
    inputs |= {"output_hidden_states": False, "output_attentions": False}
    probe = _Probe()
    try:
        if k < placement.num_layers:
            setattr(decoder, placement.layers_name, nn.ModuleList([*layers[:k], probe]))
        with torch.no_grad():
            output = decoder.forward(**inputs)
    finally:
        setattr(decoder, placement.layers_name, layers)
    return kwargs, output.last_hidden_state if probe.hidden is None else probe.hidden


class _Probe(nn.Module):
    """Stands in for layer k and keeps what would enter it."""

    hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden = hidden_states
        return hidden_states


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens already."""
    return isinstance(cache, Cache) and len(cache.layers) > 0 and cache.get_seq_length() > 0


def _own_cache(decoder: Any, kwargs: dict, k: int, count: int, keep: bool, training: bool) -> Cache | None:
    """The k layers of cache for the first pass; None if the call keeps none.

    Where every token is scored (`keep`) they are k extra layers at the end of the main pass' cache (made here if the
    decoder would make one), so that reorder, crop and repeat reach them. Where only the prompt's pass decides, its
    states are of no further use; but the mask was made for a cache like the main one.
    """
    cache, use = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if use is None:
        use = getattr(decoder.config, "use_cache", False)
    checkpointing = training and getattr(decoder, "gradient_checkpointing", False)
    if checkpointing or (cache is None and not (use and keep)):
        return None
    if cache is None:
        cache = kwargs["past_key_values"] = _with_layers(DynamicCache(config=decoder.config), count)
        cache.layers.extend(
            _with_layers(DynamicCache(config=decoder.config), count).layers[:k]
        )  # no deepcopy: it cannot compile
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values of type {type(cache).__name__}: pass a transformers Cache.")
    _with_layers(cache, count)
    if not keep:
        return Cache(layers=copy.deepcopy(cache.layers[:k]))
    if len(cache.layers) == count and not is_filled(cache):
        cache.layers.extend(copy.deepcopy(cache.layers[:k]))
    own: Any = cache.layers[count] if len(cache.layers) == count + k else None
    seen = -1 if own is None else own.get_seq_length()
    if seen != cache.get_seq_length():
        raise ValueError(
            "this cache was filled without the routing pass (by a forced or base pass); start the routed sequence with "
            "an empty cache, or keep forcing the expert."
        )
    return Cache(layers=cache.layers[count:])


def _with_layers(cache: Cache, count: int) -> Cache:
    """`cache` with at least `count` layers, if it makes them on demand."""
    while len(cache.layers) < count and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache
