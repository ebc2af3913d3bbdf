"""The run of the bare base up to layer k, for experts below the router's layer and for `router_layer="last"`.

Shapes: B batch, S sequence, D hidden, n router outputs, k router layer, L decoder layers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from dylora_moe.base.placement import Placement
from dylora_moe.routing.granularity import Deciding, Granularity
from dylora_moe.routing.router import Router

from .cache import ExtraLayer, RunningScores, keeps_no_cache, main_cache, tokens_in, with_layers


def check_possible(base: nn.Module, placement: Placement) -> None:
    """Raise `ValueError` if the base can not be run up to a layer by itself."""
    if keeps_no_cache(base, placement):
        raise ValueError(
            f"{type(base).__name__} keeps its state in no transformers Cache, so that it cannot run up to the router's "
            "layer by itself, which experts below that layer need. Set router_layer=0, or adapt only layers from the "
            "router's upwards."
        )


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
    if kwargs.get("cache") is not None:
        raise ValueError(
            "this call packs several requests into one row over a paged cache, in which the run of the base up to the "
            "router's layer has no place; only experts at or above that layer can be served so."
        )
    name = str(placement.cache_argument)
    own = _own_cache(decoder, name, kwargs, k, placement.num_layers, keep, training) if k > 0 else None
    inputs = {**kwargs, name: own, "use_cache": own is not None}
    inputs |= {"output_hidden_states": False}
    if "output_attentions" in kwargs:
        inputs["output_attentions"] = False
    probe, output = _Probe(layers[min(k, placement.num_layers - 1)]), None
    try:
        if k < placement.num_layers:
            setattr(decoder, placement.layers_name, nn.ModuleList([*layers[:k], probe]))
        with torch.no_grad():
            output = decoder.forward(**inputs)
    except _Reached:
        pass
    finally:
        setattr(decoder, placement.layers_name, layers)
    if probe.hidden is not None:
        return kwargs, placement.state_of(probe.hidden)
    assert output is not None
    return kwargs, output.last_hidden_state


@torch.no_grad()
def prompt_scores(
    base: nn.Module,
    placement: Placement,
    k: int,
    router: Router,
    granularity: Granularity,
    inputs: dict[str, Any],
    training: bool = False,
) -> Tensor:
    """The scores `[B, 1, n]` that whole prompts decide by, before anything else of them is read.

    Args:
        base: the causal language model, of which only what runs before layer k is looked at.
        placement: where its decoder layers are.
        k: the router's layer.
        router: scores the states.
        granularity: one by which the prompt decides.
        inputs: of the decoder: the whole prompts, without padding.
        training: of the mixture.
    """
    _, hidden = first_pass(base, placement, k, {**inputs, "use_cache": False}, False, training)
    hidden = hidden.to(next(router.parameters()).device)
    every = Deciding(torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device))
    return router.scores(hidden, granularity, every).scores


class _Reached(Exception):
    """Layer k was reached; the rest of the base need not run."""


class _Probe(nn.Module):
    """Stands in for a layer and keeps what would enter it; whoever looks at it finds the layer's own attributes."""

    hidden: Tensor | None = None

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is no part of this module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden = hidden_states
        if torch.compiler.is_compiling():
            return hidden_states
        raise _Reached


def _own_cache(decoder: Any, name: str, kwargs: dict, k: int, count: int, keep: bool, training: bool) -> Cache | None:
    """The cache of the first pass; None if the call keeps none.

    It has k layers of its own and, for whoever asks how much was seen, the main pass' for the rest, which do not run.
    Where every token is scored (`keep`) its own lie at the end of the main cache (made here if the decoder would make
    one). Where only the prompt's pass decides, its states are of no further use; but the mask was made for a cache like
    the main one.
    """
    given = kwargs.get(name)
    cache = main_cache(decoder, name, kwargs, count, training, make=keep)
    if cache is None:
        return None
    if given is None:
        fresh = with_layers(DynamicCache(config=decoder.config), count)  # no deepcopy: it cannot compile
        cache.layers.extend(map(_extra, fresh.layers[:k]))
    rest = cache.layers[k:count]
    if not keep:
        return Cache(layers=[*copy.deepcopy(cache.layers[:k]), *rest])
    if len(cache.layers) == count and not tokens_in(cache):
        cache.layers.extend(_extra(layer) for layer in copy.deepcopy(cache.layers[:k]))
    own = [layer for layer in cache.layers[count:] if not isinstance(layer, RunningScores)]
    own = [layer.layer if isinstance(layer, ExtraLayer) else layer for layer in own]
    if len(own) != k or tokens_in(Cache(layers=own)) != _tokens_below(cache, k):
        raise ValueError(
            "this cache was filled without the routing pass (by a forced or base pass); start the routed sequence with "
            "an empty cache, or keep forcing the expert."
        )
    return Cache(layers=[*own, *rest])


def _extra(layer: Any) -> Any:
    """Layers with keys alone are found by their index; others by asking for the last that there is."""
    return ExtraLayer(layer) if isinstance(layer, LinearAttentionCacheLayerMixin) else layer


def _tokens_below(cache: Cache, k: int) -> int:
    return tokens_in(Cache(layers=cache.layers[:k]))
