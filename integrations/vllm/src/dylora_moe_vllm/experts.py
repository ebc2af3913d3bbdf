"""The experts of one linear: `y += ((x Aᵀ) ⊙ w·s) Bᵀ`, the mixture's formula, on this rank's share of A and B.

Shapes: T tokens, D in, O out, R rows; D and O of this rank.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import Geometry
from .in_force import InForce, Patterns
from .settings import Carried


@dataclass(frozen=True)
class Source:
    """A matrix of the Hugging Face model that carries experts, within the linear of vLLM that computes it.

    Attributes:
        path: of the matrix, as the mixture's tensors name it.
        part: its number among the linear's parts; None where it is all of them.
        carried: its experts.
    """

    path: str
    part: int | None
    carried: tuple[Carried, ...]

    @property
    def rows(self) -> int:
        """R of this source alone."""
        return sum(one.rank for one in self.carried)


def sources_by_linear(
    modules: Mapping[str, tuple[Carried, ...]], packed: Mapping[str, list[str]], renamed: Callable[[str], str | None]
) -> dict[str, list[Source]]:
    """The mixture's matrices, grouped by the path of the linear that computes them.

    Args:
        modules: of the mixture's settings.
        packed: vLLM's `packed_modules_mapping`: the linear's name → the names of its parts in the Hugging Face model.
        renamed: path in the Hugging Face model → path in vLLM's, but for packed parts; None if it has no such module.
    """
    part_of = {part: name for name, parts in packed.items() for part in parts if len(parts) > 1}
    found: dict[str, list[Source]] = {}
    for path, carried in modules.items():
        parent, _, leaf = (renamed(path) or path).rpartition(".")
        linear = part_of.get(leaf, leaf)
        part = packed[linear].index(leaf) if leaf in part_of else None
        found.setdefault(f"{parent}.{linear}" if parent else linear, []).append(Source(path, part, carried))
    return {path: sorted(sources, key=lambda source: source.part or 0) for path, sources in found.items()}


class Experts(nn.Module):
    """The experts of one vLLM linear.

    Args:
        geometry: how the linear is cut.
        sources: its matrices that carry experts.
        in_force: where the decision stands.
        patterns: of the mixture; the linear's own is added.
        dtype: of the matrices.
    """

    def __init__(
        self,
        geometry: Geometry,
        sources: Sequence[Source],
        in_force: InForce,
        patterns: Patterns,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.geometry, self.in_force = geometry, in_force
        self.places: dict[str, tuple[slice, slice]] = {}  # by path: rows of A, outputs
        first = 0
        inputs = geometry.own_inputs.stop - geometry.own_inputs.start
        self.B = nn.ParameterList()
        for source in sources:
            parts = range(len(geometry.parts)) if source.part is None else [source.part]
            start, stop = geometry.outputs_of(parts[0]).start, geometry.outputs_of(parts[-1]).stop
            self.places[source.path] = slice(first, first + source.rows), slice(start, stop)
            self.B.append(nn.Parameter(torch.zeros(stop - start, source.rows, dtype=dtype), requires_grad=False))
            first += source.rows
        self.A = nn.Parameter(torch.zeros(first, inputs, dtype=dtype), requires_grad=False)
        self.pattern = patterns.number([one for source in sources for one in source.carried])

    def shapes(self, source: Source) -> dict[str, tuple[int, int]]:
        """What the mixture's file holds for a source, in full: A `[R, D]` and B `[O, R]`."""
        parts = self.geometry.parts
        outputs = sum(parts) if source.part is None else parts[source.part]
        return {"A": (source.rows, self.geometry.inputs), "B": (outputs, source.rows)}

    def rows_of(self, source: Source) -> list[int]:
        """For every output of this rank that a source computes, the row of its matrix, as the geometry says."""
        if source.part is None:
            return self.geometry.fused_rows()
        own = self.geometry.rows_of(source.part)
        return list(range(own.start, own.stop))

    def outputs_of(self, source: Source) -> slice:
        """Where a source stands in this rank's output."""
        return self.places[source.path][1]

    def place(self, source: Source, A: Tensor, B: Tensor, rows: Sequence[int]) -> None:
        """Take this rank's share.

        Args:
            source: whose matrices they are.
            A: `[R, D]` in full.
            B: `[O, R]` in full.
            rows: of B, one for each output of this rank.
        """
        self.A.data[self.places[source.path][0]].copy_(A[:, self.geometry.own_inputs])
        self.B[list(self.places).index(source.path)].data.copy_(B[list(rows)])

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Add the experts' share for `x [..., D]` to `out [..., O]`, in place."""
        flat, y = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        hidden = F.linear(flat, self.A) * self.in_force.factors[self.pattern]
        for (rows, outputs), B in zip(self.places.values(), self.B, strict=True):
            y[:, outputs].addmm_(hidden[:, rows], B.t())
        return out


@functools.cache
def _with_experts(method: type) -> type:
    def apply(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.dylora(x, method.apply(self, layer, x, bias))

    # vLLM chooses a linear's weight loader by the name of its method's class
    return type(method.__name__, (method,), {"apply": apply, "__module__": __name__})


def add_to(linear: Any, experts: Experts) -> None:
    """Make a linear of vLLM add its experts, by its quantization method: it keeps its type, weights and loaders.

    The method runs before the sum over ranks of a row-parallel linear, and vLLM's own LoRA layers call it as well.
    """
    linear.dylora = experts
    linear.requires_unquantized_input = True
    method = copy.copy(linear.quant_method)  # it may be shared by linears that carry no expert
    method.__class__ = _with_experts(type(method))
    linear.quant_method = method
