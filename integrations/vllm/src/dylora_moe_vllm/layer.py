"""Decoder layer k: what enters it is scored before it runs, and what was decided is in force from then on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .settings import SettingsError


def decoder_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The list of the decoder's layers and its path.

    Raises:
        SettingsError: there is none of that length, or several.
    """
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise SettingsError(
            f"config.json: dylora_moe.layers={count}: {len(found)} lists of modules of that length in vLLM's model, "
            "expected the decoder's layers; export the mixture again, or serve it with dylora-moe."
        )
    return found[0]


def listen(layer: Any, decide: Callable[[Tensor], None]) -> None:
    """Have `decide` called with the state that enters a decoder layer, each time before the layer runs.

    The state is `hidden_states`, or its sum with `residual` where the model hands both from layer to layer.

    Raises:
        SettingsError: the layer takes no `hidden_states`.
    """
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    if "hidden_states" not in names:
        raise SettingsError(
            f"vLLM's {type(layer).__name__} takes no hidden_states ({', '.join(names)}): the state that the router "
            "reads is not known; serve the mixture with dylora-moe."
        )
    places = {name: names.index(name) if name in names else None for name in ("hidden_states", "residual")}
    layer.dylora_entering = Entering(places, decide)
    layer.__class__ = _listening(type(layer))


class Entering:
    """Reads the state out of a decoder layer's arguments and has it decided on.

    Args:
        places: position of `hidden_states` and of `residual` among the arguments; None where there is none.
        decide: what to call.
    """

    def __init__(self, places: dict[str, int | None], decide: Callable[[Tensor], None]):
        self._places, self._decide = places, decide

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, residual = self._argument("hidden_states", args, kwargs), self._argument("residual", args, kwargs)
        self._decide(hidden if residual is None else hidden + residual)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self._places[name]
        if place is None:
            return None
        return args[place] if place < len(args) else kwargs.get(name)


@functools.cache
def _listening(layer: type) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.dylora_entering(args, kwargs)
        return layer.forward(self, *args, **kwargs)

    return type(f"Routing{layer.__name__}", (layer,), {"forward": forward, "__module__": __name__})
