"""The hooks of a mixture: they see every pass through the base, whoever starts it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import passes

if TYPE_CHECKING:
    from .model import DyLoraMoE


class PassHooks:
    """Mix-in of `DyLoraMoE`. Hooks are bound methods, so that a deep copy's hooks use the copy's own state."""

    def _install_hooks(self: DyLoraMoE, base: nn.Module) -> None:  # type: ignore[misc]
        decoder = self.placement.decoder(base)
        self._hooks = [
            base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            base.register_forward_hook(self._after_base, always_call=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]
        if self.router_layer_index < self.placement.num_layers:
            layer = self.placement.layers(base)[self.router_layer_index]
            self._hooks.append(layer.register_forward_pre_hook(self._before_router_layer, with_kwargs=True))

    def _before_base(self: DyLoraMoE, base: nn.Module, args: Any, kwargs: dict) -> None:  # type: ignore[misc]
        if self._adapts_head and isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise ValueError(
                "logits_to_keep as a tensor picks positions that an expert on the language-model head cannot tell; "
                "pass a number (the last so many), or select from the full logits."
            )
        self._inside_base = True

    def _after_base(self: DyLoraMoE, base: nn.Module, args: Any, output: Any) -> None:  # type: ignore[misc]
        self._inside_base = False
        self.routing.reset()

    def _before_decoder(self: DyLoraMoE, decoder: nn.Module, args: tuple, kwargs: dict) -> Any:  # type: ignore[misc]
        return passes.start_pass(self, decoder, args, kwargs)

    def _before_router_layer(self: DyLoraMoE, layer: nn.Module, args: tuple, kwargs: dict) -> None:  # type: ignore[misc]
        request = self._current
        if request is not None and request.decision is not None and request.decision.pending:
            passes.read(self, args[0] if args else kwargs["hidden_states"])

    def _after_decoder(self: DyLoraMoE, decoder: nn.Module, args: Any, output: Any) -> None:  # type: ignore[misc]
        request, self._current = self._current, None
        if self._trace is not None and request is not None and request.decision is not None:
            self._trace.record(request.decision)
        if not self._inside_base:  # else the language-model head may carry experts, too
            self.routing.reset()
