"""A model class of vLLM with a mixture's experts: `DyLoRAMoE` before the name of any causal language model of vLLM.

The classes are made when vLLM asks this module for them by name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.registry import ModelRegistry

from . import PREFIX
from .attach import attach
from .engine import recording
from .layer import decoder_layers, listen
from .loading import Loader
from .mixture import Mixture
from .prefix import RunningMean
from .selectors import SELECT, take_own_only
from .settings import parse


class RoutedModel:
    """What stands before a model class of vLLM: builds the base, then the mixture on it, and loads both."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any):
        model = vllm_config.model_config
        with _named_as_base(model.hf_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        settings = parse(getattr(model.hf_config, "dylora_moe", None))
        path, layers = decoder_layers(self, settings.layers)  # type: ignore[arg-type]
        mean = RunningMean(vllm_config, settings.layers) if settings.granularity == "prefix" else None
        tokens = vllm_config.scheduler_config.max_num_batched_tokens if recording(vllm_config) else 0
        self.dylora = Mixture(settings, model.hf_text_config.hidden_size, mean, lambda: getattr(self, SELECT), tokens)
        setattr(self, SELECT, ReplicatedLinear(len(settings.experts), 1, bias=False, prefix=SELECT))
        listen(layers[settings.router_layer], self.dylora.decide)
        self._dylora_linears = attach(self, settings, path, self.dylora.in_force, self.dylora.patterns, model.dtype)
        self._dylora_dtype, self._dylora_folder = model.dtype, model.model

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "lora_manager":  # vLLM makes it after loading, and puts it here
            take_own_only(value, len(self.dylora.settings.experts), self._dylora_folder)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loader = Loader(self.dylora.router, self._dylora_linears, self._dylora_dtype)
        loaded = set(super().load_weights(loader.of_base(weights)) or ())
        loader.place()
        getattr(self, SELECT).weight.data.zero_()
        self._dylora_take_selectors_only()
        return loaded | {name for name, _ in self.named_parameters() if "dylora" in name}

    def _dylora_take_selectors_only(self) -> None:
        """Have vLLM refuse every adapter but selectors, which would be ignored otherwise, and the base answer.

        vLLM, which makes its LoRA after loading, lets an adapter have the parts of each linear, by these two tables.
        """
        linears = {path.rpartition(".")[2] for path, m in self.named_modules() if isinstance(m, LinearBase)}
        self.packed_modules_mapping: dict[str, list[str]] = {name: [] for name in linears - {SELECT}}
        self.embedding_modules: dict[str, str] = {}


@contextmanager
def _named_as_base(config: Any) -> Iterator[None]:
    """Its architectures are the base's for a while: vLLM's Transformers backend goes by them in renaming weights."""
    named = config.architectures
    config.architectures = [name.removeprefix(PREFIX) for name in named]
    try:
        yield
    finally:
        config.architectures = named


@functools.cache
def _routed(architecture: str) -> type:
    base = ModelRegistry._try_load_model_cls(architecture)
    if base is None:
        raise AttributeError(f"vLLM has no model class {architecture} that it can load")
    lora = () if SupportsLoRA in base.__mro__ else (SupportsLoRA,)  # a Protocol: issubclass raises
    body = {"__module__": __name__, "__qualname__": PREFIX + architecture}
    for table in ("packed_modules_mapping", "embedding_modules"):
        if not hasattr(base, table):
            body[table] = {}
    return type(PREFIX + architecture, (RoutedModel, base, *lora), body)


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX) and name != PREFIX:
        return _routed(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
