"""Running sums of weighted states: weight, mean and scatter in float64, which merge by addition.

Float32 would not do: the router computed from such sums is 1e-2 off. Shapes: T tokens, D width of a state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 4096
"""Tokens that are added at once, however long the rows are that they come from."""


@dataclass(frozen=True)
class Sums:
    """What is kept of some states.

    Attributes:
        weight: of all together.
        mean: float64 `[D]`, Σ w x / Σ w.
        scatter: float64 `[D(D+1)/2]`, the upper triangle of Σ w (x − mean)(x − mean)ᵀ row by row; None where it went
            into a pool.
    """

    weight: float
    mean: Tensor
    scatter: Tensor | None

    @classmethod
    def none(cls, width: int) -> Sums:
        """The sums of no state of D = `width`."""
        zeros = torch.zeros(width, dtype=torch.float64)
        return cls(0.0, zeros, pack(torch.zeros(width, width, dtype=torch.float64)))

    @classmethod
    def of(cls, pieces: Iterable[tuple[Tensor, Tensor]], width: int) -> Sums:
        """The sums of states `[T, D]` and their weights `[T]`, which come in pieces of any length."""
        total = cls.none(width)
        for states, weights in _in_chunks(pieces):
            total = total + _sums(states.double(), weights.double())
        return total

    def __add__(self, other: Sums) -> Sums:
        """Both together (Chan, Golub, LeVeque 1979, eq. 2.1)."""
        if self.scatter is None or other.scatter is None:
            raise ValueError("sums whose scatter is pooled cannot grow any more.")
        weight = self.weight + other.weight
        if not self.weight or not other.weight:
            return self if self.weight else other
        apart = other.mean - self.mean
        mean = (self.weight * self.mean + other.weight * other.mean) / weight
        between = pack(torch.outer(apart, apart)) * (self.weight * other.weight / weight)
        return Sums(weight, mean, self.scatter + other.scatter + between)

    def covariance(self) -> Tensor:
        """Float64 `[D, D]`, the scatter over the weight."""
        if self.scatter is None:
            raise ValueError("the scatter is pooled with others'.")
        return unpack(self.scatter, len(self.mean)) / self.weight


def _in_chunks(pieces: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same states and weights in pieces of `CHUNK`, but for the last."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for piece in pieces:
        waiting.append(piece)
        if sum(len(weights) for _, weights in waiting) >= CHUNK:
            states, weights = torch.cat([piece[0] for piece in waiting]), torch.cat([piece[1] for piece in waiting])
            whole = len(weights) // CHUNK * CHUNK
            yield from zip(states[:whole].split(CHUNK), weights[:whole].split(CHUNK), strict=True)
            waiting = [(states[whole:], weights[whole:])]
    if waiting and sum(len(weights) for _, weights in waiting):
        yield torch.cat([states for states, _ in waiting]), torch.cat([weights for _, weights in waiting])


def _sums(states: Tensor, weights: Tensor) -> Sums:
    weight = weights.sum()
    mean = weights @ states / weight
    centred = states - mean
    return Sums(float(weight), mean, pack((centred * weights[:, None]).T @ centred))


def pack(matrix: Tensor) -> Tensor:
    """The upper triangle `[D(D+1)/2]` of a symmetric `[D, D]`."""
    return matrix[tuple(torch.triu_indices(*matrix.shape))]


def unpack(packed: Tensor, width: int) -> Tensor:
    """The symmetric `[D, D]` of an upper triangle."""
    matrix = packed.new_zeros(width, width)
    matrix[tuple(torch.triu_indices(width, width))] = packed
    return matrix + matrix.triu(1).T
