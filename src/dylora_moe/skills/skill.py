"""One skill: the sums of all its tokens, views of some of its rows, and where they came from. No text.

Shapes: R rows, D width of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .features import RowStates
from .sums import Sums

PROMPT_SHARE = 0.6
"""Weight of a row's prompt in its skill's sums; the completion has the rest, and one that is alone all of it.

Every row weighs 1. Where every token weighed the same, long completions would decide what prompts are known by: of 13
domains with 20 texts each 0.949 of the prompts and 0.933 of the completions were routed right, so 0.979 and 0.974.
"""
ROWS_KEPT = 100
"""Rows of a skill whose views are kept, by the lowest keys, so that any order of teaching keeps the same ones."""
VIEWS = ("prompt", "completion", "token", "early")
"""What is kept of a row: the mean state of its prompt, of its completion, one state of either, drawn by its key, and
`RowStates.early`, the mean of its prompt half as deep."""


class Teaching(NamedTuple):
    """Where some rows of a skill came from.

    Attributes:
        when: UTC, `2026-01-31T12:00:00+00:00`.
        source: what the caller says of it: a file's hash; empty if nothing.
        sha256: of the rows' tokens.
        rows, tokens: how many there were.
    """

    when: str
    source: str
    sha256: str
    rows: int
    tokens: int


@dataclass(frozen=True)
class RowViews:
    """What is kept of some rows of one skill, in the order of their keys, to see how a router does on them.

    In half precision: what is read from them (temperatures, tables) is a matter of percents.

    Attributes:
        keys: int64 `[R]`, see `Row.key`.
        counts: int64 `[R, 2]`, tokens of prompt and completion.
        states: float16 `[R, V, D]`, one for each of `VIEWS`; zeros where a row has no such token.
    """

    keys: Tensor
    counts: Tensor
    states: Tensor

    @classmethod
    def none(cls, width: int) -> RowViews:
        """Those of no row."""
        counts = torch.zeros(0, 2, dtype=torch.int64)
        return cls(counts[:, 0], counts, torch.zeros(0, len(VIEWS), width, dtype=torch.float16))

    @classmethod
    def of(cls, row: RowStates) -> RowViews:
        """Those of one row."""
        parts = [row.states[row.prompt], row.states[~row.prompt]]
        means = [part.double().sum(0) / max(len(part), 1) for part in parts]
        token = row.states[row.row.key % len(row.states)].double()
        counts = torch.tensor([[len(part) for part in parts]])
        return cls(torch.tensor([row.row.key]), counts, torch.stack([*means, token, row.early])[None].half())

    @classmethod
    def of_each(cls, rows: Iterable[RowStates]) -> RowViews:
        """Those of at least one row, in the order in which they come."""
        return cls.chained([cls.of(row) for row in rows])

    @classmethod
    def chained(cls, several: Sequence[RowViews]) -> RowViews:
        """At least one, one after the other."""
        keys, counts, states = ([getattr(one, name) for one in several] for name in ("keys", "counts", "states"))
        return cls(torch.cat(keys), torch.cat(counts), torch.cat(states))

    @classmethod
    def joined(cls, several: Sequence[RowViews], keep: int = ROWS_KEPT) -> RowViews:
        """The `keep` rows with the lowest keys among several, each row once."""
        keys = torch.cat([one.keys for one in several])
        order = torch.argsort(keys, stable=True)
        first = torch.ones(len(keys), dtype=torch.bool)
        first[1:] = keys[order][1:] != keys[order][:-1]
        kept = order[first][:keep]
        counts, states = torch.cat([one.counts for one in several]), torch.cat([one.states for one in several])
        return cls(keys[kept], counts[kept], states[kept])

    @property
    def shares(self) -> Tensor:
        """Float64 `[R, 2]`: what prompt and completion of a row weigh in the sums; they sum to 1."""
        there = (self.counts > 0).double() * torch.tensor([PROMPT_SHARE, 1 - PROMPT_SHARE], dtype=torch.float64)
        return there / there.sum(-1, keepdim=True)

    @property
    def token_parts(self) -> Tensor:
        """Int64 `[R]`: 0 where the single token is one of the prompt, else 1."""
        return (self.keys % self.counts.sum(-1) >= self.counts[:, 0]).long()

    @property
    def deciding(self) -> Tensor:
        """Float64 `[R, D]`: by what a row is routed as a sequence, the mean of its prompt, or of plain text's all."""
        has_prompt = self.counts[:, :1] > 0
        return torch.where(has_prompt, self.states[:, 0].double(), self.states[:, 1].double())


@dataclass(frozen=True)
class Skill:
    """What is known of one skill.

    Attributes:
        sums: of its tokens, every row weighing 1, its prompt `PROMPT_SHARE` of it.
        deciding_mean: float64 `[D]`, the mean over its rows of `RowViews.deciding`.
        rows, tokens: how many they are from.
        views: of at most `ROWS_KEPT` of the rows.
        taught: where they came from, in order.
    """

    sums: Sums
    deciding_mean: Tensor
    rows: int
    tokens: int
    views: RowViews
    taught: tuple[Teaching, ...] = field(default=())

    @classmethod
    def of(cls, rows: Iterable[RowStates], width: int, note: Callable[[RowViews], None] | None = None) -> Skill:
        """The skill of some rows; `note` is called with the views of each."""
        views, count, tokens = RowViews.none(width), 0, 0
        deciding = torch.zeros(width, dtype=torch.float64)

        def weighted() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal views, count, tokens
            for row in rows:
                one = RowViews.of(row)
                deciding.add_(one.deciding[0])
                views, count, tokens = RowViews.joined([views, one]), count + 1, tokens + len(row.states)
                if note is not None:
                    note(one)
                per_token = one.shares[0] / one.counts[0].clamp(min=1)
                yield row.states, torch.where(row.prompt, *per_token)

        sums = Sums.of(weighted(), width)
        return cls(sums, deciding / max(count, 1), count, tokens, views)

    def __add__(self, other: Skill) -> Skill:
        """Both together, whichever comes first."""
        taught = tuple(sorted((*self.taught, *other.taught)))
        rows, tokens = self.rows + other.rows, self.tokens + other.tokens
        deciding = (self.rows * self.deciding_mean + other.rows * other.deciding_mean) / rows
        views = RowViews.joined([self.views, other.views])
        return Skill(self.sums + other.sums, deciding, rows, tokens, views, taught)

    @property
    def compact(self) -> bool:
        """Whether its scatter went into the pool."""
        return self.sums.scatter is None

    def is_from(self, source: str) -> bool:
        """Whether rows of this source were taught to it."""
        return any(teaching.source == source for teaching in self.taught)

    def compacted(self, keep: int) -> Skill:
        """The skill without its scatter and with fewer rows."""
        sums = Sums(self.sums.weight, self.sums.mean, None)
        return replace(self, sums=sums, views=RowViews.joined([self.views], keep))
