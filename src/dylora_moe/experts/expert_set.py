"""The experts of one mixture: names in order, states, which are frozen, and the layers that carry them.

Every change leaves the other experts' tensors bit-identical.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dylora_moe.base.placement import Placement
from dylora_moe.layers.in_force import RoutedLayers
from dylora_moe.sharding import shard_like

from .tensors import ExpertTensor, layer_tensors

NEW, ROUTED = "new", "routed"


def masked_columns(states: Iterable[str]) -> tuple[int, ...]:
    """Columns of the experts, by their states in order, that are not routed yet."""
    return tuple(i for i, state in enumerate(states) if state == NEW)


class ExpertSet:
    """The experts of a mixture, for as long as it lives.

    Args:
        names: the experts.
        layers: the routed layers, which follow the changes.

    Attributes:
        states: name → `"routed"`, or `"new"` for an expert whose logit is masked.
        frozen: names of the experts that do not train.
        touch_all: with gradients on, a forced pass takes the router and every other expert along with weight zero.
    """

    def __init__(self, names: Sequence[str], layers: RoutedLayers):
        self.states: dict[str, str] = dict.fromkeys(names, ROUTED)
        self.layers = layers
        self.frozen: set[str] = set()
        self.touch_all = False

    @property
    def names(self) -> list[str]:
        """In the order of the columns of `routing_weights`."""
        return list(self.states)

    @property
    def masked(self) -> tuple[int, ...]:
        """Columns of the experts that are not routed yet."""
        return masked_columns(list(self.states.values()))  # at once: an engine asks while another thread changes them

    @property
    def disabled(self) -> bool:
        """Whether PEFT's `disable_adapter` holds."""
        return next(iter(self.layers)).disable_adapters

    @property
    def trained(self) -> bool:
        """Whether some expert does something: every fresh one starts with B = 0."""
        parts = (part for name in self.names for part in self.tensors(name))
        return any("lora_B" in part.key and bool(part.tensor.any()) for part in parts)

    def check_known(self, name: str) -> None:
        """Raise `ValueError` if there is no expert of this name."""
        if name not in self.states:
            raise ValueError(f"unknown expert {name!r}; the experts are {', '.join(self.names)}.")

    def check_complete(self, configured: Iterable[str], base: nn.Module) -> None:
        """Raise `ValueError` if the layers of `base` hold other adapters than the experts: saving would lose them.

        Args:
            configured: names of the adapters that PEFT knows.
            base: the base with its experts.
        """
        held = {name for layer in base.modules() if isinstance(layer, LoraLayer) for name in layer.r}
        odd = sorted((held | set(configured)) ^ set(self.names) | (set(self.names) - set(configured)))
        if odd:
            raise ValueError(
                f"{', '.join(odd)}: added to or removed from PEFT's own layers, past the mixture, whose experts are "
                f"{', '.join(self.names)}; use add_expert and remove_expert."
            )

    def tensors(self, name: str) -> list[ExpertTensor]:
        """All tensors of one expert, collected layer by layer."""
        self.check_known(name)
        return [tensor for layer in self.layers for tensor in layer_tensors(layer, layer.routing_name, name)]

    def load(self, name: str, tensors: Mapping[str, Tensor], keep_dtype: bool = False) -> None:
        """Copy validated `tensors` (by stock key) into an expert; `keep_dtype` takes over the file's dtype.

        Raises:
            ValueError: a tensor is missing; the expert is left as it was.
        """
        missing = [key for key, _, _ in self.tensors(name) if key not in tensors]
        if missing:
            raise ValueError(f"expert {name!r}: {len(missing)} of its tensors are not given, first {missing[0]}.")
        for key, _, parameter in self.tensors(name):
            value = shard_like(tensors[key], parameter)
            with torch.no_grad():
                if keep_dtype and value.dtype != parameter.dtype:
                    parameter.data = value.clone()
                else:
                    parameter.copy_(value)

    def adapted(self, name: str | None = None) -> list[str]:
        """Paths of the layers that an expert adapts, or some expert."""
        return [layer.routing_name for layer in self.layers if (layer.r if name is None else name in layer.r)]

    def lowest_layer(self, placement: Placement) -> int:
        """The lowest decoder layer that some expert adapts; L if there is none."""
        return min((placement.layer_of(path) for path in self.adapted()), default=placement.num_layers)

    def adapt_head(self, placement: Placement) -> bool:
        """Whether some expert sits behind the decoder layers."""
        return any(placement.layer_of(path) == placement.num_layers for path in self.adapted())

    def is_merged(self, name: str) -> bool:
        """Whether the base's weights hold this expert already."""
        return any(name in layer.merged_adapters for layer in self.layers)

    def rest_without(self, name: str) -> dict[str, str]:
        """The states of the others.

        Raises:
            ValueError: an unknown name, the last expert, one without which no routed expert is left, or one that is
                merged into the base.
        """
        self.check_known(name)
        self._check_not_merged(name)
        rest = {other: state for other, state in self.states.items() if other != name}
        if not rest:
            raise ValueError(f"{name!r} is the only expert; a mixture needs at least one.")
        if self.states[name] == ROUTED and ROUTED not in rest.values():
            raise ValueError(
                f"without {name!r} only experts that are not routed yet are left ({', '.join(rest)}); "
                "call start_routing() for one of them first, or teach it with a closed-form router."
            )
        return rest

    def state_instead_of(self, names: Sequence[str], computed: bool, base_route: bool) -> str:
        """The state of one expert that comes in the place of several.

        Args:
            names: of those that go.
            computed: whether the router is computed from skills, which then decide.
            base_route: whether the router chooses even where there is only one expert.

        Raises:
            ValueError: one is merged into the base, or no routed expert would be left.
        """
        for name in names:
            self._check_not_merged(name)
        rest = {name: state for name, state in self.states.items() if name not in names}
        if not rest and not base_route:
            return ROUTED
        if not computed and ROUTED not in rest.values():
            raise ValueError(
                f"a trained router has no row for what {', '.join(names)} are merged to, and no other expert is routed "
                f"({', '.join(rest) or 'none is left'}); call start_routing() for another one first, or write the sum "
                "with export_mixture."
            )
        return NEW

    def _check_not_merged(self, name: str) -> None:
        if self.is_merged(name):
            raise ValueError(f"expert {name!r} is merged into the base's weights; call unmerge_adapter() first.")

    def drop(self, name: str, base: nn.Module) -> None:
        """Forget an expert, as far as it was added, and take its parts out of the layers of `base`."""
        self.states.pop(name, None)
        self.frozen.discard(name)
        for path, layer in list(base.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.delete_adapter(name)
                if not layer.r:  # nobody adapts it any more
                    parent, _, child = path.rpartition(".")
                    setattr(base.get_submodule(parent), child, layer.base_layer)

    def rename(self, old: str, new: str) -> None:
        """Give an expert another name; tensors and order stay."""
        for layer in self.layers:
            for attribute in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
                container = getattr(layer, attribute)
                if old in container:
                    setattr(layer, attribute, renamed(container, old, new))
            layer.merged_adapters = [new if name == old else name for name in layer.merged_adapters]
            if old in layer.frozen_peft_weight_names:
                layer.frozen_peft_weight_names = renamed(layer.frozen_peft_weight_names, old, new)
        self.states = renamed(self.states, old, new)
        self.frozen = {new if name == old else name for name in self.frozen}

    def match_modes(self, name: str) -> None:
        """PEFT makes new modules in training mode; give an expert's parts the mode of the layer they sit in."""
        for layer in self.layers:
            if name not in layer.r:
                continue
            mode = layer.base_layer.training
            layer.training = mode
            for attribute in (*layer.adapter_layer_names, "lora_dropout"):
                container = getattr(layer, attribute)
                container.training = mode
                if isinstance(container, nn.ModuleDict) and name in container:
                    container[name].train(mode)


def renamed(container: Any, old: str, new: str) -> Any:
    """`container` with one key renamed in place of the old one, so that the order stays."""
    items = {new if key == old else key: value for key, value in container.items()}
    if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
        result = type(container)(OrderedDict(items))  # a ParameterDict sorts what is no OrderedDict
        result.training = container.training
        return result
    return items
