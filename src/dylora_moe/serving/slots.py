"""The cache of a batch of requests that come and go: one slot each, all of which end at the same column.

A decoding step adds one token to every request, so that rows that end together stay together: the new keys are one
column, and to the base the batch looks like one padded on the left, which its own masks, windows and positions know.
What a request is made of (its prompt) is read by itself into an ordinary cache, and joins.

Shapes: N slots in use, H heads, D head size, n router outputs, L tokens that a slot holds.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from dylora_moe.passes.cache import ExtraLayer, RunningScores

SLACK = 256
"""How many columns there are beyond L at most: after so many steps what is in use moves to the left."""
SERVED = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, DummyLayer)
"""The layers of an ordinary cache that a slot can hold."""
SUPPORTED = (
    "requests are served together only on bases whose layers each keep keys and values (full or sliding attention) or "
    "a recurrent state, not all of them a state. Use model.generate."
)


def check_served(cache: Cache, kind: str) -> None:
    """Raise `ValueError` if slots cannot hold what a base of class `kind` keeps in its `cache`."""
    types = {type(layer) for layer in cache.layers}
    others = types.difference(SERVED) or types.intersection([LinearAttentionLayer])
    if types.difference(SERVED) or not any(issubclass(each, CacheLayerMixin) for each in types):
        names = ", ".join(sorted(each.__name__ for each in others))
        raise ValueError(f"{kind} keeps {names} in its cache; {SUPPORTED}")


class Columns:
    """Which part of the memory is in use.

    Args:
        length: L.

    Attributes:
        lengths: the number of tokens of each slot in use, N of them, with the one that is read now.
        end: the column after the last.
    """

    def __init__(self, length: int):
        self.length, self.capacity = length, length + min(length, SLACK)
        self.lengths: list[int] = []
        self.end = length

    @property
    def width(self) -> int:
        """The number of columns in use."""
        return max(self.lengths)


class SlotLayer(CacheLayerMixin):
    """The keys and values of one layer, `[slots, H, columns, D]`; a pass sees those in use.

    Args:
        slots: how many there are.
        columns: what is in use.
        window: how many tokens a token sees, if not all.
    """

    def __init__(self, slots: int, columns: Columns, window: int | None):
        super().__init__()
        self.slots, self.columns, self.window = slots, columns, window
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory for keys and values like these."""
        self.keys, self.values = (
            like.new_zeros(self.slots, like.shape[1], self.columns.capacity, like.shape[3])
            for like in (key_states, value_states)
        )
        self.is_initialized = True

    def put(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Let slot `row` hold the tokens of `keys` and `values [1, H, S, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.keys is not None
        assert self.values is not None
        own = slice(self.columns.end - keys.shape[2], self.columns.end)
        self.keys[row, :, own], self.values[row, :, own] = keys[0], values[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add one token to each slot in use; what they see, `[N, H, columns, D]`."""
        assert self.keys is not None
        assert self.values is not None
        rows, end, visible = len(self.columns.lengths), self.columns.end, self._visible
        self.keys[:rows, :, end - 1 : end], self.values[:rows, :, end - 1 : end] = key_states, value_states
        seen = slice(end - visible, end)
        return self.keys[:rows, :, seen], self.values[:rows, :, seen]

    @property
    def _visible(self) -> int:
        return self.columns.width if self.window is None else min(self.columns.width, self.window)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of columns that a pass sees, and how many it does not see before them."""
        return self._visible, self.columns.width - self._visible

    def get_seq_length(self) -> int:
        """The number of columns before the pass."""
        return self.columns.width - 1

    def get_max_length(self) -> int:
        """L."""
        return self.columns.length

    def move(self, rows: int, start: int, end: int, to: int) -> None:
        """Move the columns `start` to `end` of the first slots so that they end at column `to`."""
        for tensor in (self.keys, self.values):
            if tensor is not None:
                tensor[:rows, :, to - (end - start) : to] = tensor[:rows, :, start:end].clone()

    def take(self, row: int, other: int) -> None:
        """Let slot `row` hold what slot `other` does."""
        for tensor in (self.keys, self.values):
            if tensor is not None:
                own = slice(self.columns.end - self.columns.lengths[other], self.columns.end)
                tensor[row, :, own] = tensor[other, :, own]


_DESCRIBED = (
    "conv_kernel_size",
    "has_previous_state",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "dtype",
    "device",
)
"""What a layer of states says of them, the same for all requests that were read."""


class SlotStates(LinearAttentionLayer):
    """The states of one recurrent layer, each `[slots, …]`, of which a pass sees and changes those in use.

    Args:
        slots: how many there are.
        columns: what is in use.
        count: how many states of a kind the layer has.
    """

    def __init__(self, slots: int, columns: Columns, count: int):
        super().__init__(count)
        self.slots, self.columns = slots, columns
        self.all: dict[tuple[str, int], Tensor] = {}

    def put(self, row: int, layer: LinearAttentionLayer) -> None:
        """Let slot `row` hold the states of one request in `layer`."""
        for name in _DESCRIBED:
            setattr(self, name, copy.copy(getattr(layer, name)))
        for kind in ("conv_states", "recurrent_states"):
            for index, state in getattr(layer, kind).items():
                if state is not None:
                    if (kind, index) not in self.all:
                        self.all[kind, index] = state.new_zeros(self.slots, *state.shape[1:])
                    self.all[kind, index][row] = state[0]

    def show(self) -> None:
        """Let a pass see the slots in use; what it writes there stays."""
        for (kind, index), states in self.all.items():
            getattr(self, kind)[index] = states[: len(self.columns.lengths)]

    def take(self, row: int, other: int) -> None:
        """Let slot `row` hold what slot `other` does."""
        for states in self.all.values():
            states[row] = states[other]


class SlotScores(RunningScores):
    """The totals of the router's scores of each slot, `[slots, 1, n + 1]`, where the granularity is cumulative.

    Args:
        slots: how many there are.
        columns: what is in use.
    """

    def __init__(self, slots: int, columns: Columns):
        DummyLayer.__init__(self)
        self.slots, self.columns, self.totals = slots, columns, None

    @property
    def length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of columns before the pass: all of them were scored."""
        return self.columns.width - 1

    @property
    def last(self) -> Tensor | None:
        """`[N, 1, n + 1]` totals of the slots in use."""
        return None if self.totals is None else self.totals[: len(self.columns.lengths)]

    def put(self, row: int, totals: Tensor) -> None:
        """Let slot `row` go on from `totals [1, 1, n + 1]`."""
        if self.totals is None or self.totals.shape[-1] != totals.shape[-1]:  # of other experts, which nobody needs
            self.totals = totals.new_zeros(self.slots, 1, totals.shape[-1])
        self.totals[row] = totals[0]

    def append(self, totals: Tensor) -> None:
        """Add one token to each slot in use."""
        assert self.totals is not None
        self.totals[: len(totals)] = totals

    def take(self, row: int, other: int) -> None:
        """Let slot `row` hold what slot `other` does."""
        if self.totals is not None:
            self.totals[row] = self.totals[other]


class SlotCache(Cache):
    """The slots of all layers: the base's, those of a routing pass, and the scores' totals.

    Args:
        slots: how many requests it holds.
        length: L.
    """

    def __init__(self, slots: int, length: int):
        super().__init__(layers=[])
        self.slots, self.columns = slots, Columns(length)
        self._layers: list[Any] = []
        self._scores = SlotScores(slots, self.columns)

    @property
    def rows(self) -> int:
        """N."""
        return len(self.columns.lengths)

    def join(self, cache: Cache, length: int) -> None:
        """Give the next free slot what was read into `cache`: `length` tokens of one request."""
        row = self.rows
        for at, layer in enumerate(layer for layer in cache.layers if not isinstance(layer, RunningScores)):
            inner = _inner(layer)
            if at == len(self._layers):
                self._layers.append(self._slots_like(layer))
            own = _inner(self._layers[at])
            if isinstance(own, SlotStates):
                own.put(row, inner)
            elif isinstance(own, SlotLayer) and inner.keys is not None:
                own.put(row, inner.keys, inner.values)
        totals = next((layer.last for layer in cache.layers if isinstance(layer, RunningScores)), None)
        if totals is not None:
            self._scores.put(row, totals)
        self.columns.lengths.append(length)
        self.layers = [*self._layers, self._scores]

    def _slots_like(self, layer: Any) -> Any:
        if isinstance(layer, ExtraLayer):
            return ExtraLayer(self._slots_like(layer.layer))
        if isinstance(layer, DynamicLayer):
            return SlotLayer(self.slots, self.columns, getattr(layer, "sliding_window", None))
        if isinstance(layer, LinearAttentionLayer):
            return SlotStates(self.slots, self.columns, layer.number_of_states)
        return DummyLayer()

    def _holding(self) -> list[Any]:
        """The layers that hold something for every slot."""
        return [layer for layer in map(_inner, self.layers) if isinstance(layer, (SlotLayer, SlotStates, SlotScores))]

    def advance(self) -> None:
        """Make room for one more token in each slot in use."""
        columns = self.columns
        if columns.end == columns.capacity:
            for layer in self._holding():
                if isinstance(layer, SlotLayer):
                    layer.move(self.rows, columns.end - columns.width, columns.end, columns.length)
            columns.end = columns.length
        columns.end += 1
        columns.lengths = [length + 1 for length in columns.lengths]
        for layer in self._holding():
            if isinstance(layer, SlotStates):
                layer.show()

    def leave(self, row: int) -> None:
        """Free a slot; the last one in use takes its place."""
        last = self.rows - 1
        for layer in self._holding() if row != last else ():
            layer.take(row, last)
        self.columns.lengths[row] = self.columns.lengths[last]
        self.columns.lengths.pop()
        if not self.columns.lengths:
            self.columns.end = self.columns.length

    def mask(self, device: torch.device) -> Tensor:
        """`[N, columns]` int64, 1 where a slot in use has a token."""
        lengths = torch.tensor(self.columns.lengths, device=device)[:, None]
        width = self.columns.width
        return (torch.arange(width, device=device) >= width - lengths).long()

    def positions(self, device: torch.device) -> Tensor:
        """`[N, 1]` of the token that a pass reads in each slot in use."""
        return torch.tensor(self.columns.lengths, device=device)[:, None] - 1


def _inner(layer: Any) -> Any:
    """A layer of a cache, without what hides one of the routing pass from the base."""
    return layer.layer if isinstance(layer, ExtraLayer) else layer
