"""What a mixture is made of and where its gradients go, in numbers per expert, router and base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .sharding import local


class HasParameterGroups(Protocol):
    """A mixture, as far as reports look at it."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]: ...


@dataclass
class GradientStats:
    """Gradients of one group of parameters: how many tensors have one, and the absolute values within.

    Attributes:
        tensors: parameter tensors in the group.
        with_gradient: those whose `.grad` is not None.
        minimum, maximum, mean: of |gradient| over all their elements; 0 if there is none.
    """

    tensors: int = 0
    with_gradient: int = 0
    minimum: float = 0.0
    maximum: float = 0.0
    mean: float = 0.0

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> GradientStats:
        """Statistics of a group."""
        parameters = list(parameters)
        grads = [p.grad.detach().float().abs().flatten() for p in parameters if p.grad is not None]
        if not grads:
            return cls(tensors=len(parameters))
        flat = torch.cat([g.cpu() for g in grads])
        return cls(len(parameters), len(grads), float(flat.min()), float(flat.max()), float(flat.mean()))


def gradient_report(model: HasParameterGroups) -> dict[str, GradientStats]:
    """Gradient statistics per expert (by name), of the `router`, and of everything `frozen` (the base).

    Raises:
        TypeError: not a mixture.
    """
    if not hasattr(model, "parameter_groups"):
        raise TypeError(f"gradient_report needs a DyLoraMoE, not {type(model).__name__}.")
    return {name: GradientStats.of(parameters) for name, parameters in model.parameter_groups().items()}


@dataclass
class ParameterReport:
    """Numbers of parameters.

    Attributes:
        base: of the frozen base.
        router: of the router.
        experts: per expert.
        trainable: those that require gradients.
        base_bytes: memory of the base's storages in this process, each counted once.
    """

    base: int
    router: int
    experts: dict[str, int]
    trainable: int
    base_bytes: int

    @property
    def overhead(self) -> float:
        """Router and all experts, in % of the base."""
        return 100.0 * (self.router + sum(self.experts.values())) / self.base

    def table(self) -> list[dict[str, Any]]:
        """One row per expert, router, base: name, parameters, % of the base."""
        rows = {**self.experts, "router": self.router, "base (frozen)": self.base}
        return [{"part": k, "parameters": v, "percent of base": 100.0 * v / self.base} for k, v in rows.items()]


def parameter_report(groups: Mapping[str, list[nn.Parameter]]) -> ParameterReport:
    """Count the parameters of a mixture, given per expert, `router` and `frozen`."""
    counts = {name: sum(p.numel() for p in parameters) for name, parameters in groups.items()}
    storages = [part.untyped_storage() for p in groups["frozen"] for part in _plain_parts(local(p))]
    return ParameterReport(
        base=counts.pop("frozen"),
        router=counts.pop("router"),
        experts=counts,
        trainable=sum(p.numel() for group in groups.values() for p in group if p.requires_grad),
        base_bytes=sum({storage._cdata: storage.nbytes() for storage in storages}.values()),
    )


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory of their own that `tensor` is made of: a quantized one may be a wrapper without any."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):
            yield from _plain_parts(part)
