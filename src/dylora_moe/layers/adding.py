"""Adapters that are there are kept out of sight while PEFT adds another one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn


@contextmanager
def out_of_sight(base: nn.Module) -> Iterator[Callable[[], None]]:
    """While PEFT adds adapters to `base`: yields what hides the parts of those that are there now.

    For each adapter that it adds, PEFT walks over the parts of all others, several times and by name, so that the time
    for a few hundred grows with their square. It reads nothing of them; where they are hidden before each one, the time
    is the same for each. In the end all parts are back in the order in which they were added.
    """
    aside: dict[Any, OrderedDict[str, Any]] = {}

    def hide() -> None:
        for layer in list(base.modules()):
            if not isinstance(layer, LoraLayer):
                continue
            for container in layer.children():
                if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
                    held = aside.setdefault(container, OrderedDict())
                    for name in list(container):
                        held[name] = container.pop(name)

    try:
        yield hide
    finally:
        hide()
        for container, held in aside.items():
            for name, part in held.items():
                container[name] = part
