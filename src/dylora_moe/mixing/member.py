"""What the fast forms know about the layers they compute: plain values and the layers' own tensors.

Layers that are fed by the same input (q, k and v; gate and up) are computed together, so that `x · A_catᵀ` is one GEMM
for all of them; each is a `Member`. A layer by itself is a group of one.

Shapes: T tokens, D in, O out, R rank of one expert, ΣR the sum of the ranks of one member, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class LayerExperts(NamedTuple):
    """The experts of one layer; no tensors, so that it can be a key.

    Attributes:
        columns: for each expert of the layer, its column in the weights.
        ranks: its rank.
        scalings: its scaling (alpha/r or alpha/√r).
        dropout: the probability p that all of them share.
    """

    columns: tuple[int, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout: float = 0.0

    @property
    def width(self) -> int:
        """ΣR."""
        return sum(self.ranks)

    def gates(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """`(w · s)[expert_of_row]` of `weights [T, E]`: one gate per row of A_cat, `[T, ΣR]`."""
        weights = weights.to(torch.promote_types(weights.dtype, dtype))
        if self.columns != tuple(range(weights.shape[-1])):
            weights = weights.index_select(-1, torch.tensor(self.columns, device=weights.device))
        gates = weights * self.scaling_row(weights, dtype)
        if self.ranks.count(self.ranks[0]) == len(self.ranks):
            gates = gates.unsqueeze(-1).expand(*gates.shape, self.ranks[0]).flatten(-2)
        else:
            ranks = torch.tensor(self.ranks, device=weights.device)
            gates = gates.repeat_interleave(ranks, dim=-1, output_size=self.width)
        return gates.to(dtype)

    def weights_grad(self, per_row: Tensor, weights: Tensor) -> Tensor:
        """Sum `per_row [T, ΣR]` over the rows of each expert: the gradient of `weights [T, E]`."""
        dtype = torch.promote_types(weights.dtype, per_row.dtype)
        if self.ranks.count(self.ranks[0]) == len(self.ranks):
            sums = per_row.unflatten(-1, (len(self.ranks), self.ranks[0])).sum(-1, dtype=dtype)
        else:
            sums = torch.stack([part.sum(-1, dtype=dtype) for part in per_row.split(self.ranks, dim=-1)], dim=-1)
        sums = (sums * self.scaling_row(sums, dtype)).to(weights.dtype)
        if self.columns == tuple(range(weights.shape[-1])):
            return sums
        return torch.zeros_like(weights).index_copy_(-1, torch.tensor(self.columns, device=sums.device), sums)

    def scaling_row(self, weights: Tensor, dtype: torch.dtype) -> Tensor | float:
        """One scaling per expert, in the wider of `dtype` and the weights' own, or the one that all share."""
        if self.scalings.count(self.scalings[0]) == len(self.scalings):
            return self.scalings[0]
        dtype = torch.promote_types(weights.dtype, dtype)
        return torch.tensor(self.scalings, dtype=dtype, device=weights.device)


class Member(NamedTuple):
    """One layer of a group that shares its input.

    Attributes:
        experts: which column, rank and scaling belongs to which pair of matrices.
        weight, bias: the frozen base's `[O, D]` and `[O]`; with None only the experts' sum is computed.
        lora_A, lora_B: one `[R, D]` and `[O, R]` per expert; cast to the dtype of the computation.
    """

    experts: LayerExperts
    weight: Tensor | None
    bias: Tensor | None
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]


def tensors_of(members: Sequence[Member]) -> list[Tensor | None]:
    """All tensors in one row, as an autograd function takes them; see `members_from`."""
    return [t for m in members for t in (m.weight, m.bias, *m.lora_A, *m.lora_B)]


def members_from(experts: Sequence[LayerExperts], tensors: Sequence[Tensor | None]) -> list[Member]:
    """The members again, from the row that `tensors_of` made."""
    row, members = iter(tensors), []
    for own in experts:
        weight, bias = next(row), next(row)
        pairs: list = [next(row) for _ in range(2 * len(own.ranks))]
        members.append(Member(own, weight, bias, pairs[: len(own.ranks)], pairs[len(own.ranks) :]))
    return members


def lay_side_by_side(parameters: Sequence[Tensor]) -> None:
    """Move the values of some parameters into one block of memory, one after the other; each stays what it is.

    Nothing needs it: what is moved apart again (`.to()`, a copy) is concatenated where it is used.
    """
    if len(parameters) < 2:
        return
    first = parameters[0]
    kinds = {(type(p), p.dtype, p.device) for p in parameters}
    if kinds != {(torch.nn.Parameter, first.dtype, first.device)} or first.device.type == "meta":
        return
    if first.device.type == "cpu" and any(p.is_shared() for p in parameters):  # other processes look there
        return
    with torch.no_grad():
        if side_by_side(parameters) is not None:
            return
    block = torch.cat([p.data.flatten() for p in parameters])
    for parameter, part in zip(parameters, block.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)


def side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """All values of some tensors as one flat view if they lie one after the other in memory; None with gradients."""
    first = tensors[0]
    plain = type(first) in (Tensor, torch.nn.Parameter) and first.device.type != "meta"
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not plain:
        return None
    storage, size = first.untyped_storage(), first.element_size()
    sizes = [t.numel() * size for t in tensors]
    starts = list(itertools.accumulate(sizes, initial=first.data_ptr()))
    if [t.data_ptr() for t in tensors] != starts[:-1] or starts[-1] > storage.data_ptr() + storage.nbytes():
        return None
    if False in [t.is_contiguous() for t in tensors] or len({t.dtype for t in tensors}) > 1:
        return None
    return first.as_strided((sum(sizes) // size,), (1,))


def pair_gates(weights: Tensor, indices: Tensor, scalings: Tensor | float, dtype: torch.dtype) -> Tensor:
    """`(w · s)` of each token's active experts `indices [T, K]` in `dtype`, where column and expert are one: `[T, K]`.

    Args:
        weights: `[T, E]`.
        indices: int64.
        scalings: of `LayerExperts.scaling_row`.
        dtype: of the computation.
    """
    gates = weights.gather(1, indices).to(torch.promote_types(weights.dtype, dtype))
    return (gates * (scalings[indices] if isinstance(scalings, Tensor) else scalings)).to(dtype)


def on_eager_cpu(x: Tensor) -> bool:
    """Whether `x` is a plain tensor on a CPU, neither fake nor traced by a compiler."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype the base GEMM runs in: autocast's if it is on, else that of `x`.

    The small matrices are cast to it. PEFT casts x to the adapters' dtype instead, which keeps a float32 copy of x
    per layer over a bf16 base.
    """
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def dropout_seed() -> int:
    """Of a mask that the backward pass draws again instead of keeping it."""
    return int(torch.randint(2**62, ()))


def dropout_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """The inverted-dropout mask of `seed`: 0 or 1/(1-p), in the shape, dtype and device of `x`."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


def dropped(x: Tensor, p: float, seed: int, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype` after dropout with the mask of `seed`."""
    return (x * dropout_mask(x, p, seed) if p else x).to(dtype)


def add_base_grad(
    dx: Tensor | None, dys: Sequence[Tensor | None], members: Sequence[Member], dtype: torch.dtype
) -> Tensor | None:
    """`dx + Σ dy · W` over the members, `[T, D]`; None if there is nothing to add up."""
    for dy, member in zip(dys, members, strict=True):
        if dy is None or member.weight is None:
            continue
        weight = member.weight.to(dtype)
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx


def remember(memo: dict[Hashable, Value] | None, key: Hashable, make: Callable[[], Value]) -> Value:
    """`make()`, or what it returned before under this key; without a memo always `make()`."""
    if memo is None:
        return make()
    if key not in memo:
        memo[key] = make()
    return memo[key]
