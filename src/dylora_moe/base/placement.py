"""Where things are in a base model: its decoder layers, which of them an expert adapts, and what that costs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora_moe.config import stock_lora

BEFORE_THE_LAYERS = -1
UNREACHABLE = -2
CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""What decoders call their cache."""


@dataclass(frozen=True)
class Placement:
    """The decoder of one base model.

    Attributes:
        decoder_path: path of the module that runs the layers, from the base (`""` is the base itself).
        layers_name: its attribute that holds the layers.
        num_layers: L.
        head_path: path of the language-model head, if it has one.
        cache_argument: what the decoder calls its cache; None if it keeps its state otherwise.
        active_stream: which of several parallel states between the layers is the hidden state (Gemma 3n: `[streams, B,
            S, D]`); None where there is one.
    """

    decoder_path: str
    layers_name: str
    num_layers: int
    head_path: str | None = None
    cache_argument: str | None = "past_key_values"
    active_stream: int | None = None

    @classmethod
    def of(cls, base: PreTrainedModel) -> Placement:
        """Find the decoder layers of a transformers causal language model.

        Raises:
            ValueError: no decoder-only causal language model, or one without a recognisable list of decoder layers.
        """
        kind = type(base).__name__
        if getattr(base.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{kind} is an encoder-decoder model: its encoder runs before anything could be routed. A decoder-only "
                "causal language model of transformers is needed."
            )
        if not base.can_generate():
            raise ValueError(
                f"{kind} is no causal language model (it cannot generate); a decoder-only causal language model of "
                "transformers is needed."
            )
        config = base.config.get_text_config()
        count = config.num_hidden_layers
        decoder: Any = base.get_decoder()
        head = base.get_output_embeddings()
        paths = {id(module): path for path, module in base.named_modules()}
        path = paths[id(decoder)]
        takes = inspect.signature(type(decoder).forward).parameters
        for name, child in decoder.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                if getattr(config, "layerdrop", 0):
                    raise ValueError(
                        f"layerdrop={config.layerdrop} could skip the layer the router reads; set it to 0 there."
                    )
                cache = next((argument for argument in CACHE_ARGUMENTS if argument in takes), None)
                stream = getattr(config, "altup_active_idx", None)
                return cls(path, name, count, paths.get(id(head)), cache, stream)
        raise ValueError(
            f"{kind}: found no list of {count} decoder layers in {type(decoder).__name__}; "
            "a decoder-only causal language model of transformers is needed."
        )

    def decoder(self, base: nn.Module) -> nn.Module:
        """The module that runs the layers."""
        return base.get_submodule(self.decoder_path)

    def layers(self, base: nn.Module) -> nn.ModuleList:
        """The decoder layers."""
        return getattr(self.decoder(base), self.layers_name)

    def layer_of(self, path: str) -> int:
        """Index of the decoder layer that holds module `path`; -1 for what runs before the layers, L after.

        -2 for what lies neither in the decoder nor in the head: it runs where no routing can reach it.
        """
        prefix = re.escape(f"{self.decoder_path}." if self.decoder_path else "")
        match = re.match(rf"{prefix}{re.escape(self.layers_name)}\.(\d+)\.", path)
        if match:
            return int(match[1])
        if self.head_path is not None and (path == self.head_path or path.startswith(f"{self.head_path}.")):
            return self.num_layers
        if self.decoder_path and not path.startswith(f"{self.decoder_path}."):
            return UNREACHABLE
        return self.num_layers if path.endswith("project_out") else BEFORE_THE_LAYERS

    def check_reachable(self, name: str, paths: Iterable[str]) -> None:
        """Raise `ValueError` if an expert adapts modules outside the decoder, where no routing reaches them."""
        outside = [path for path in paths if self.layer_of(path) == UNREACHABLE]
        if outside:
            inside = sorted({path.rpartition(".")[2] for path in paths})
            pattern = rf"{re.escape(self.decoder_path)}\..*\.({'|'.join(inside)})"
            raise ValueError(
                f"expert {name!r} adapts {len(outside)} modules outside the decoder, first {outside[0]}, which run "
                f"before or beside it, where no token can be routed. Make the adapter with target_modules={pattern!r}."
            )

    def state_of(self, hidden: Tensor) -> Tensor:
        """The hidden state `[B, S, D]` in what the decoder hands from layer to layer."""
        return hidden if self.active_stream is None or hidden.dim() == 3 else hidden[self.active_stream]

    def targets(self, base: PreTrainedModel, config: LoraConfig, first_layer: int) -> list[str]:
        """Full names of the modules that a *new* expert with `config` adapts.

        Patterns and `"all-linear"` are restricted to decoder layers `first_layer` … L-1, unless the configuration
        names `layers_to_transform`; modules outside the decoder layers are kept only when they are asked for by name.

        Raises:
            ValueError: nothing matches.
        """
        wanted, layers = config.target_modules, config.layers_to_transform
        layers = [layers] if isinstance(layers, int) else layers
        if wanted is None:
            wanted = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base.config.model_type)
            if wanted is None:
                raise ValueError(
                    f"target_modules is not set and PEFT has no default for model type {base.config.model_type!r}; "
                    'try target_modules="all-linear".'
                )
        probe = LoraConfig(target_modules=wanted, exclude_modules=config.exclude_modules)
        everywhere = isinstance(wanted, str) and wanted.lower() == "all-linear"
        probe = _maybe_include_all_linear_layers(probe, base)
        allowed = set(range(first_layer, self.num_layers)) if not layers else set(layers)
        matches = []
        for path in adaptable_modules(base):
            found = check_target_module_exists(probe, path)
            if not found or isinstance(found, _ExcludedModule):
                continue
            layer = self.layer_of(path)
            asked = not everywhere and not layers and layer in (BEFORE_THE_LAYERS, self.num_layers)
            if layer in allowed or asked:
                matches.append(path)
        if not matches:
            names = sorted({path.rpartition(".")[2] for path in adaptable_modules(base)})
            shown = wanted if isinstance(wanted, str) else sorted(wanted)
            raise ValueError(
                f"target_modules={shown} matches no module in decoder layers {sorted(allowed)} of "
                f"{type(base).__name__}; its modules are called {', '.join(names)}."
            )
        return matches

    def fresh_expert(self, base: PreTrainedModel, source: LoraConfig, first_layer: int) -> LoraConfig:
        """The stock configuration of a new expert after `source`, its targets written out; see `targets`."""
        targets = self.targets(base, source, first_layer)
        return stock_lora(
            source, target_modules=targets, layers_to_transform=None, layers_pattern=None, exclude_modules=None
        )


def adaptable_modules(base: nn.Module) -> list[str]:
    """Paths of the leaf modules (adapted or not) that LoRA could target."""
    paths: list[str] = []
    adapted: tuple[str, ...] = ()
    for path, module in base.named_modules():
        if isinstance(module, LoraLayer):
            paths.append(path)
            adapted = (*adapted[-1:], f"{path}.")
        elif not path.startswith(adapted or ("\0",)) and _is_leaf_with_weights(module):
            paths.append(path)
    return paths


def _is_leaf_with_weights(module: nn.Module) -> bool:
    weights = any(True for _ in module.parameters(recurse=False))
    return weights and not any(module.children()) and "norm" not in type(module).__name__.lower()
