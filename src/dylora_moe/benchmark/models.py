"""The models of a run: one base's weights in every variant, the same experts in every form.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from dylora_moe.base.embedded import resolve_base
from dylora_moe.base.placement import Placement
from dylora_moe.config import MoELoraConfig
from dylora_moe.model import DyLoraMoE

from .settings import SHAPES, SMOLLM2, Settings, Shape


class Unavailable(Exception):
    """The installed code has no such variant; the message says why."""


def _device(name: str) -> torch.device:
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal() or int(index or 0) >= count:
        seen = torch.cuda.device_count()
        raise ValueError(f"device={name!r}: choose cpu, or a GPU that torch sees (cuda, cuda:1, …); it sees {seen}.")
    return torch.device(name)


class Models:
    """Builds and keeps the models of one run; all share the tensors of one base.

    Args:
        settings: of the run.
        folder: for the adapters that X-LoRA loads from disk.
    """

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        self.device, self.dtype = _device(settings.device), getattr(torch, settings.dtype)
        torch.manual_seed(settings.seed)
        linear = settings.work.startswith("linear")
        self.base = self._build_base(linear)
        self.base.requires_grad_(False).train(self.training)
        self.placement = Placement.of(self.base)
        config = LoraConfig(target_modules=["q_proj"] if linear else "all-linear")
        if settings.router_layer >= self.placement.num_layers:
            raise ValueError(f"router_layer={settings.router_layer}: the base has {self.placement.num_layers} layers.")
        self.targets = self.placement.targets(self.base, config, settings.router_layer)
        self._kept: dict[Any, nn.Module] = {}
        self.fake = FakeTensorMode() if settings.fake else None
        self._faked: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def training(self) -> bool:
        """Whether the work is a training step."""
        return self.settings.work in ("train", "linear-train")

    def running(self) -> AbstractContextManager[Any]:
        """A context in which the models may be called."""
        return self.fake or nullcontext()

    def give(self, tensor: Tensor) -> Tensor:
        """`tensor` as an input of the models."""
        tensor = tensor.to(self.device)
        return tensor if self.fake is None else self.fake.from_tensor(tensor)

    def bare(self) -> Any:
        """The base alone. Where it trains, gradients begin where those of PEFT's adapters do: at the adapted layers."""
        if "base" not in self._kept:
            base = self._kept["base"] = self._without_storage(share(self.base))
            if self.training:
                for path in self.targets:
                    base.get_submodule(path).register_forward_hook(_begin_gradients)
        return self._kept["base"]

    def peft(self, rank: int, same_dtype: bool) -> Any:
        """Stock PEFT with one adapter of `rank`."""
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=self.targets, task_type="CAUSAL_LM")
        return self._keep(
            ("peft", rank, same_dtype),
            lambda: get_peft_model(share(self.base), config, autocast_adapter_dtype=not same_dtype),
        )

    def mixture(self, experts: int, dropout: float = 0.0) -> Any:
        """Our mixture of `experts`; those of different forms are the same object."""
        rank = self.settings.rank
        config = MoELoraConfig(
            num_experts=experts,
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=dropout,
            target_modules=self.targets,
            router_layer=self.settings.router_layer,
        )
        return self._keep(("ours", experts, dropout), lambda: DyLoraMoE.from_base(share(self.base), config))

    def xlora(self, experts: int) -> Any:
        """PEFT X-LoRA over the experts of `mixture(experts)`, which it loads from disk; trainable where it trains."""
        mixture = self.mixture(experts)
        adapters = {}
        for i, name in enumerate(mixture.expert_names):
            adapters[str(i)] = str(self.folder / f"{experts}-{i}")
            mixture.export_expert(name, adapters[str(i)])
        base = share(self.base)
        base.config.use_cache = False
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            adapters=adapters,
            use_trainable_adapters=self.training,
        )
        return self._keep(("xlora", experts), lambda: get_peft_model(base, config))

    def _build_base(self, linear: bool) -> Any:
        settings = self.settings
        if settings.shape == SMOLLM2:
            loaded: Any = AutoModelForCausalLM.from_pretrained(resolve_base("embedded"), dtype=self.dtype)
            return loaded.to(self.device)
        shape = SHAPES[settings.shape]
        if linear:  # one square layer of the shape's width; the rest of the model only decides the routing
            heads = max(1, shape.width // 64)
            shape = Shape(shape.width, 16, 1, heads, heads, 64)
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.intermediate,
            num_hidden_layers=settings.layers or shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max(2048, settings.length + settings.new_tokens),
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        with self.device:
            return cast(Any, AutoModelForCausalLM).from_config(config, dtype=self.dtype, attn_implementation="sdpa")

    def _keep(self, key: Any, build: Any) -> Any:
        if key not in self._kept:
            torch.manual_seed(self.settings.seed)
            model = build().train(self.training)
            if key[0] != "xlora":
                _stir(model)
            self._kept[key] = self._without_storage(model)
        return self._kept[key]

    def _without_storage(self, model: nn.Module) -> nn.Module:
        """Put fake tensors in place of all parameters and buffers, if the run is a fake one.

        PEFT cannot build on fake tensors, so that they come in afterwards.
        """
        if self.fake is not None:
            for module in model.modules():
                both: Any = (module._parameters, module._buffers)
                for tensors in both:
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            known = self._faked.setdefault(id(tensor), (tensor, self.fake.from_tensor(tensor)))
                            tensors[name] = known[1]
        return model


def share(base: Any) -> Any:
    """A copy of the modules of `base` around the same parameters."""
    return copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})


@contextmanager
def mixing_form(model: Any, form: str) -> Iterator[None]:
    """Compute the mixture in `form` within the block."""
    config = model.moe_config
    before, config.mixing_form = config.mixing_form, form
    try:
        yield
    finally:
        config.mixing_form = before


def _begin_gradients(module: nn.Module, args: Any, output: Any) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _stir(model: nn.Module) -> None:
    """PEFT's B starts at zero; small random values let every adapter show in the output."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
