"""The cache of a batch of requests that come and go: one slot each, all of which end at the same column.

A decoding step adds one token to every request, so that rows that end together stay together: the new keys are one
column, and to the base the batch looks like one padded on the left, which its own masks, windows and positions know.
What a request is made of (its prompt) is read by itself into an ordinary cache, and joins.

Shapes: N slots in use, H heads, D head size, n router outputs, L tokens that a slot holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from dylora_moe.passes.cache import RunningScores

SLACK = 256
"""How many columns there are beyond L at most: after so many steps what is in use moves to the left."""
SERVED = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""The layers of an ordinary cache that a slot can hold."""


def check_served(cache: Cache, kind: str) -> None:
    """Raise `ValueError` if a base of class `kind` keeps more in its `cache` than keys and values."""
    others = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in SERVED})
    if others:
        raise ValueError(
            f"{kind} keeps {', '.join(others)} in its cache; requests are served "
            "together only on bases that keep keys and values there (full or sliding attention). Use model.generate."
        )


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
    """The keys and values of one layer, `[slots, H, columns, D]`, of which a pass sees what is in use.

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
        self._attention: list[Any] = []
        self._scores = SlotScores(slots, self.columns)

    @property
    def rows(self) -> int:
        """N."""
        return len(self.columns.lengths)

    def join(self, cache: Cache, length: int) -> None:
        """Give the next free slot what was read into `cache`: `length` tokens of one request."""
        row = self.rows
        for at, layer in enumerate(layer for layer in cache.layers if not isinstance(layer, RunningScores)):
            if at == len(self._attention):
                self._attention.append(self._slots_like(layer))
            if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                self._attention[at].put(row, layer.keys, layer.values)
        totals = next((layer.last for layer in cache.layers if isinstance(layer, RunningScores)), None)
        if totals is not None:
            self._scores.put(row, totals)
        self.columns.lengths.append(length)
        self.layers = [*self._attention, self._scores]

    def _slots_like(self, layer: Any) -> Any:
        if isinstance(layer, DynamicLayer):
            return SlotLayer(self.slots, self.columns, getattr(layer, "sliding_window", None))
        return DummyLayer()

    def advance(self) -> None:
        """Make room for one more token in each slot in use."""
        columns = self.columns
        if columns.end == columns.capacity:
            for layer in self._attention:
                if isinstance(layer, SlotLayer):
                    layer.move(self.rows, columns.end - columns.width, columns.end, columns.length)
            columns.end = columns.length
        columns.end += 1
        columns.lengths = [length + 1 for length in columns.lengths]

    def leave(self, row: int) -> None:
        """Free a slot; the last one in use takes its place."""
        last = self.rows - 1
        for layer in self.layers if row != last else ():
            if isinstance(layer, (SlotLayer, SlotScores)):
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
