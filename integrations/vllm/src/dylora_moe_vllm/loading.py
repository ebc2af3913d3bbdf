"""The mixture's tensors among those of the base: taken out of the stream, checked one by one, put into their places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .experts import Experts, Source
from .layout import COLUMNS, row_order
from .router import Router

PREFIX = "dylora."


class LoadError(ValueError):
    """The folder's tensors are not those that its config.json describes."""


class Loader:
    """Takes the mixture's tensors while the base is being loaded, and places them after.

    Args:
        router: of the mixture.
        linears: every linear that carries experts, with its `Experts` and its sources.
        dtype: of the model.
    """

    def __init__(self, router: Router, linears: list[tuple[Any, Experts, list[Source]]], dtype: torch.dtype):
        self._router, self._linears, self._dtype = router, linears, dtype
        self._shapes = {f"{PREFIX}router.{name}": tuple(p.shape) for name, p in router.named_parameters()}
        for _, experts, sources in linears:
            for source in sources:
                for which, shape in experts.shapes(source).items():
                    self._shapes[f"{PREFIX}experts.{source.path}.{which}"] = shape
        self._tensors: dict[str, Tensor] = {}
        self._columns: dict[str, list[Tensor]] = {}

    def of_base(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The base's own weights of a checkpoint; the mixture's are kept.

        Raises:
            LoadError: a tensor of the mixture that nothing asks for, of the wrong shape, or with values not finite.
        """
        for name, tensor in weights:
            if name.startswith(PREFIX):
                self._keep(name, tensor)
            else:
                self._look_at(name, tensor)
                yield name, tensor

    def place(self) -> None:
        """Put the mixture's tensors into their places, after the base's.

        Raises:
            LoadError: a tensor is missing, or vLLM keeps the rows of a matrix in an order that cannot be found out.
        """
        if missing := sorted(set(self._shapes) - set(self._tensors)):
            raise LoadError(
                f"{missing[0]} is missing ({len(missing)} of {len(self._shapes)}); export the mixture again."
            )
        for name, parameter in self._router.named_parameters():
            parameter.data.copy_(self._tensors[f"{PREFIX}router.{name}"])
        for linear, experts, sources in self._linears:
            for source in sources:
                A, B = (self._tensors[f"{PREFIX}experts.{source.path}.{which}"] for which in ("A", "B"))
                experts.place(source, A, B, self._rows(linear, experts, source))

    def _keep(self, name: str, tensor: Tensor) -> None:
        if name not in self._shapes:
            raise LoadError(f"{name} is no tensor of this mixture, as its config.json describes it; export it again.")
        if name in self._tensors:
            raise LoadError(f"{name} is there twice; export the mixture again.")
        if tuple(tensor.shape) != self._shapes[name] or not tensor.is_floating_point():
            raise LoadError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: expected floating point {list(self._shapes[name])}; "
                "export the mixture again."
            )
        if not torch.isfinite(tensor).all():
            raise LoadError(f"{name} holds values that are not finite; train or export the mixture again.")
        self._tensors[name] = tensor.clone()  # what the stream gives may be a view of a file that is closed

    def _look_at(self, name: str, tensor: Tensor) -> None:
        """Keep some columns of a base's matrix that carries experts: of it as it is, and as a Conv1D has it."""
        path = name.removesuffix(".weight")
        if path == name or tensor.dim() != 2:
            return
        for _, experts, sources in self._linears:
            for source in sources:
                # a file may leave out how the path begins
                if source.path == path or source.path.endswith(f".{path}"):
                    own = experts.geometry.own_inputs
                    shape = (experts.shapes(source)["B"][0], experts.geometry.inputs)
                    self._columns[source.path] = [
                        weight[:, own][:, :COLUMNS].to("cpu", self._dtype, copy=True)
                        for weight in (tensor, tensor.t())
                        if tuple(weight.shape) == shape
                    ]

    def _rows(self, linear: Any, experts: Experts, source: Source) -> list[int]:
        """The row of B for every output of this rank."""
        expected = experts.rows_of(source)
        weight = getattr(linear, "weight", None)
        columns_of_file = self._columns.get(source.path)
        if isinstance(weight, Tensor) and weight.dtype == self._dtype and columns_of_file:
            loaded = weight.data[experts.outputs_of(source), :COLUMNS].cpu()
            for columns in columns_of_file:
                if (rows := row_order(columns, loaded, expected)) is not None:
                    return rows
        elif source.part is not None or len(experts.geometry.parts) == 1:
            return expected  # a quantized matrix that is not fused: the geometry is all there is to know
        raise LoadError(
            f"{source.path}: in which order vLLM keeps the rows of this matrix cannot be told from its weights; leave "
            "it out of the experts' target_modules."
        )
