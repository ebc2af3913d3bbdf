"""What holds within a `with` block: forced experts, a trace, recorded router inputs, the bare base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peft import PeftModelForCausalLM

from .passes import RouterRecord
from .request import check_experts
from .trace import RoutingTrace

if TYPE_CHECKING:
    from .model import DyLoraMoE


class Contexts:
    """Mix-in of `DyLoraMoE`."""

    @contextmanager
    def use_experts(self: DyLoraMoE, experts: str) -> Iterator[DyLoraMoE]:  # type: ignore[misc]
        """Force one expert (or `"base"`) for all rows of every call within the block, whichever thread makes it."""
        if not isinstance(experts, str):
            raise TypeError(f"use_experts takes one name, not {experts!r}; per row: model(..., experts=[...]).")
        check_experts(experts, self.expert_names, None)
        before, self._default_experts = self._default_experts, experts
        try:
            yield self
        finally:
            self._default_experts = before

    @contextmanager
    def trace(self: DyLoraMoE) -> Iterator[RoutingTrace]:  # type: ignore[misc]
        """Record the routing of every pass within the block; costs nothing outside."""
        before, reached = self._trace, self.routing.reached
        self._trace = RoutingTrace(self._output_names())
        self.routing.reached = self._trace.reached
        try:
            yield self._trace
        finally:
            self._trace, self.routing.reached = before, reached

    @contextmanager
    def recording(self: DyLoraMoE) -> Iterator[list[RouterRecord]]:  # type: ignore[misc]
        """Keep the router's inputs of every training pass, for a balance loss over a whole optimizer step."""
        before, self._records = self._records, []
        try:
            yield self._records
        finally:
            self._records = before

    @contextmanager
    def disable_adapter(self: DyLoraMoE) -> Iterator[None]:  # type: ignore[misc]
        """The bare base within the block; afterwards everything is as it was, `requires_grad` and modes included."""
        trainable = [(p, p.requires_grad) for p in self.parameters()]
        modes = [(module, module.training) for module in self.modules()]
        try:
            with PeftModelForCausalLM.disable_adapter(self):
                yield
        finally:
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            for module, training in modes:
                module.training = training

    def enable_input_require_grads(self: DyLoraMoE) -> None:  # type: ignore[misc]
        """Nothing: the embeddings' output must not require gradients, or backward would not stop at layer k.

        Only reentrant checkpointing needs it, which is refused.
        """
