"""What a pass at prefix granularity goes on from: the totals of the scores of its rows' earlier tokens.

Shapes: B batch, S sequence, n router outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from dylora_moe.arguments import sequence_starts
from dylora_moe.base.placement import Placement
from dylora_moe.routing.granularity import Deciding

from .cache import RunningScores, main_cache, tokens_in

FILLED_WITHOUT = (
    "this cache was filled without the running mean of the router's scores (by a forced or base pass, another "
    "granularity or other experts); start the routed sequence with an empty cache, or keep forcing the expert."
)


@dataclass(frozen=True)
class Continued:
    """What a pass goes on from.

    Attributes:
        layer: of the cache; None if the call keeps none.
        fits: whether the layer holds the positions that the cache holds; a bool scalar where a device knows.
        starts: `[B or 1, S]` bool, where another sequence begins in the same row; None if nowhere.
    """

    layer: RunningScores | None = None
    fits: bool | Tensor = True
    starts: Tensor | None = None

    def deciding(self, tokens: Tensor | None, outputs: int) -> Deciding:
        """Which tokens decide in this pass.

        Args:
            tokens: `[B, S]` bool of the real ones; None for all.
            outputs: n.

        Raises:
            ValueError: the cache holds tokens that were not scored.
        """
        before = None if self.layer is None else self.layer.last
        if torch.compiler.is_compiling() and isinstance(self.fits, Tensor):
            torch._assert_async(self.fits, FILLED_WITHOUT)  # a graph does not wait for a value
        elif not self.fits or (before is not None and before.shape[-1] != outputs + 1):
            raise ValueError(FILLED_WITHOUT)
        return Deciding(tokens, self.starts, before)


def positions_scored(cache: Any) -> int | Tensor:
    """How many positions of a cache were scored."""
    layers = cache.layers if isinstance(cache, Cache) else []
    return next((layer.length for layer in layers if isinstance(layer, RunningScores)), 0)


def continued(
    base: nn.Module, placement: Placement, no_cache: bool, kwargs: dict, length: int, training: bool
) -> tuple[dict, Continued]:
    """What a pass over a cache goes on from; a cache that has no totals yet gets a layer for them.

    Args:
        base: the causal language model.
        placement: where its decoder layers are.
        no_cache: whether the base keeps its state elsewhere than in a transformers `Cache`.
        kwargs: what the decoder was called with.
        length: S.
        training: of the mixture.

    Returns:
        the keyword arguments to go on with, in which the cache is made if the decoder would make one.

    Raises:
        ValueError: a base whose state is in no transformers `Cache` shall keep one, or requests are packed into one
            row over a paged cache.
    """
    if kwargs.get("cache") is not None:
        raise ValueError(
            "this call packs several requests into one row over a paged cache, in which the running mean of the "
            'router\'s scores has no place; use granularity="token".'
        )
    starts = sequence_starts(kwargs, length)
    if no_cache:
        if kwargs.get("use_cache") or kwargs.get("state") is not None:
            raise ValueError(
                f"{type(base).__name__} keeps its state in no transformers Cache, so that the running mean of the "
                'router\'s scores cannot go on from token to token; use granularity="token", or use_cache=False.'
            )
        return kwargs, Continued(starts=starts)
    kwargs, count = dict(kwargs), placement.num_layers
    cache = main_cache(placement.decoder(base), str(placement.cache_argument), kwargs, count, training)
    if cache is None:
        return kwargs, Continued(starts=starts)
    layer = next((layer for layer in cache.layers if isinstance(layer, RunningScores)), None)
    if layer is None:
        layer = RunningScores(static=isinstance(cache, StaticCache))
        cache.layers.append(layer)  # pyright: ignore[reportArgumentType]
    below = cache.layers[:count]
    seen, scored = tokens_in(Cache(layers=below)), layer.length
    if isinstance(seen, Tensor) and isinstance(scored, Tensor):  # a static cache's, on the device of its first layer
        seen = seen.to(scored.device)
    counted = any(isinstance(each, CacheLayerMixin) for each in below)  # recurrent states do not count their tokens
    return kwargs, Continued(layer, scored == seen if counted else bool(scored) == bool(seen), starts)
