"""What lies in a transformers cache, and what a mixture adds at its end.

After the base's own layers come those of the routing pass, if there is one, then the totals of prefix granularity.
Reorder, crop and repeat reach them there, and none of them is a layer of the base to whoever looks for one.

Shapes: B batch, S sequence, n router outputs, k router layer, L decoder layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache

from dylora_moe.base.placement import Placement

STATES_IN_MODULES = ("recurrent_states", "conv1d_state")
"""What modules are called that keep the state of a sequence themselves, where a second run would overwrite it."""


class ExtraLayer:
    """A layer of the first pass' cache at the end of the main cache.

    Reorder, crop and repeat reach it there, but it is no layer of the base: whoever asks the cache for its last
    recurrent layer, or its first with keys, must not find it.
    """

    def __init__(self, layer: Any):
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "layer":  # asked for while it is copied
            raise AttributeError(name)
        return getattr(self.layer, name)


class RunningScores(DummyLayer):
    """The totals of a row's scores at the end of the main cache, where reorder, crop and repeat reach them.

    It never slides. To transformers it is a dummy, no layer of the base: whoever asks the cache for lengths, masks,
    offloading or compilation looks past it.

    Args:
        static: keep the last position only, always in the same memory, as a static cache is never cropped.

    Attributes:
        totals: `[B, S, n + 1]` of every position, or `[B, 1, n + 1]` of the last; None while there is none.
        length: how many positions were scored; a scalar tensor in a static cache that holds some.
    """

    def __init__(self, static: bool):
        super().__init__()
        self.static = static
        self.totals: Tensor | None = None
        self.length: int | Tensor = 0

    @property
    def last(self) -> Tensor | None:
        """`[B, 1, n + 1]` totals of the last position, or None."""
        return None if self.totals is None else self.totals[:, -1:]

    def append(self, totals: Tensor) -> None:
        """Add the positions of a pass, `[B, S, n + 1]`."""
        if not self.static:
            self._keep(totals if self.totals is None else torch.cat([self.totals, totals], dim=1))
        elif self.totals is None or isinstance(self.length, int):
            self.totals = totals[:, -1:].clone()
            self.length = torch.tensor(totals.shape[1], device=totals.device)
            if not torch.compiler.is_compiling():  # as transformers' static layers, for CUDA graphs
                torch._dynamo.mark_static_address(self.totals)
                torch._dynamo.mark_static_address(self.length)
        else:
            self.totals.copy_(totals[:, -1:])
            self.length.add_(totals.shape[1])

    def _keep(self, totals: Tensor) -> None:
        self.totals, self.length = (totals, totals.shape[1]) if totals.shape[1] else (None, 0)

    def reset(self) -> None:
        """Forget all positions."""
        if self.static and self.totals is not None and isinstance(self.length, Tensor):
            self.totals.zero_()
            self.length.zero_()
        else:
            self.totals, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions, as many as the negative number says."""
        if tokens_to_remove and self.totals is not None:
            self._keep(self.totals[:, : -abs(tokens_to_remove)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what was row `beam_idx[i]`."""
        if self.totals is not None:
            self.totals = self.totals.index_select(0, beam_idx.to(self.totals.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.totals is not None:
            self.totals = self.totals.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.totals is not None:
            self.totals = self.totals[indices]


def keeps_no_cache(base: Any, placement: Placement) -> bool:
    """Whether a base keeps the state of a sequence elsewhere than in a transformers `Cache`."""
    in_modules = any(hasattr(module, name) for module in base.modules() for name in STATES_IN_MODULES)
    return placement.cache_argument is None or in_modules or not base._supports_default_dynamic_cache()


def main_cache(decoder: Any, name: str, kwargs: dict, count: int, training: bool, make: bool = True) -> Cache | None:
    """The cache of a pass, with all the layers of the base; None if the call keeps none.

    Args:
        decoder: that was called.
        name: of its argument for the cache.
        kwargs: what it was called with; a cache that is made here is put into it.
        count: L.
        training: of the mixture.
        make: make one where the decoder would.

    Raises:
        ValueError: what was passed is no transformers `Cache`.
    """
    cache, use = kwargs.get(name), kwargs.get("use_cache")
    if use is None:
        use = getattr(decoder.config, "use_cache", False) and not (training and name == "cache_params")
    checkpointing = training and getattr(decoder, "gradient_checkpointing", False)
    if checkpointing or (cache is None and not (use and make)):
        return None
    if cache is None:
        cache = kwargs[name] = DynamicCache(config=decoder.config)
    if not isinstance(cache, Cache):
        raise ValueError(f"{name} of type {type(cache).__name__}: pass a transformers Cache.")
    return with_layers(cache, count)


def with_layers(cache: Cache, count: int) -> Cache:
    """`cache` with at least `count` layers, if it makes them on demand."""
    while len(cache.layers) < count and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache


def tokens_in(cache: Any) -> int:
    """How many tokens a cache holds; 1 for some where only recurrent states are kept, which do not count."""
    if not isinstance(cache, Cache) or not cache.layers:
        return 0
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return cache.get_seq_length()
    return int(any(has_state(layer) for layer in cache.layers))


def has_state(layer: Any) -> bool:
    """Whether a recurrent layer of a cache has seen a token."""
    return any(getattr(layer, "has_previous_state", {}).values())
