"""The configuration of a mixture: every LoRA field of PEFT, plus how the experts are routed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import nn

from .mixing import FORM_NAMES
from .routing.granularity import GRANULARITIES
from .routing.losses import BALANCE_LOSSES
from .routing.policies import POLICIES, Policy
from .routing.router import ROUTERS

INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# what may be set on a mixture's configuration at any time; the set of experts changes through the mixture
CHANGEABLE = {
    "top_k",
    "train_top_k",
    "temperature",
    "granularity",
    "policy",
    "balance_loss",
    "balance_coefficient",
    "z_loss_coefficient",
    "mixing_form",
    "recompute_shrink",
}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
LONGEST_NAME = 100
"""Letters of an expert's name at most: disks allow 255 bytes for a folder, and what is being written has a suffix."""
_RESERVED_NAMES = {"base", "default", "weight", "bias"}


@dataclass
class MoELoraConfig(LoraConfig):
    """A mixture of LoRA experts: `peft.LoraConfig` (the default of every expert) and the routing.

    Args:
        num_experts: how many experts; defaults to the number of `expert_names`, or 4.
        expert_names: their names, in the order of the columns of `routing_weights`; default `expert_0`, ….
        router_layer: decoder layer whose *input* the router reads, 0 … L-1, or `"last"` for the base's final
            hidden state (two passes). Default: L // 4.
        router_type: `"mlp"` (two bias-free layers with SiLU), `"linear"` (one), or `"closed_form"`, which is computed
            from what `model.teach` was given and never trained.
        router_hidden_size: width of the hidden layer of the `"mlp"` router.
        route_to_base: give the router one more output whose share of the weight goes to no expert
            (SLIM, arXiv 2410.07739).
        granularity: `"token"` routes each token, `"sequence"` averages the logits over the prompt and holds the
            weights for the whole sequence, `"prefix"` averages them for each token over its row up to that token.
        temperature: the logits are divided by it before the softmax.
        top_k: experts kept per token in evaluation; default 2, or all if fewer.
        train_top_k: experts kept per token in training; default all (dense).
        policy: how the router's scores become weights, of `POLICIES`: `"top_k"`, softmax over the best.
        balance_loss: `"uniform_mse"`, `"switch"` (Switch Transformer, arXiv 2101.03961, eq. 4) or `"none"`.
        balance_coefficient: weight of the balance loss in `aux_loss`.
        z_loss_coefficient: weight of mean(logsumexp(logits)²) in `aux_loss` (ST-MoE, arXiv 2202.08906, eq. 5).
        mixing_form: how the layers compute the mixture: `"auto"` chooses by shapes; `"dense"`, and with top-k
            `"grouped"` or `"gathered"`, force one where it can serve the layer; `"reference"` is the plain loop. All
            are exact.
        recompute_shrink: compute x·Aᵀ again in the backward pass instead of keeping it: less memory, a little slower.

    Raises:
        ValueError: a value outside its range; the message names the value and the remedy.
    """

    num_experts: int | None = None
    expert_names: list[str] | None = None
    router_layer: int | str | None = None
    router_type: str = "mlp"
    router_hidden_size: int = 64
    route_to_base: bool = False
    granularity: str = "token"
    temperature: float = 1.0
    top_k: int | None = None
    train_top_k: int | None = None
    policy: str = "top_k"
    balance_loss: str = "uniform_mse"
    balance_coefficient: float = 0.01
    z_loss_coefficient: float = 0.0
    mixing_form: str = "auto"
    recompute_shrink: bool = False
    task_type: Any = field(default="CAUSAL_LM")
    temperature_tensor: ClassVar[torch.Tensor]

    def __post_init__(self):
        if self.layers_pattern:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r}: a mixture knows its decoder layers; leave it out and name "
                "their indices in layers_to_transform."
            )
        # PEFT refuses `layers_to_transform` beside a string such as "all-linear"; we expand the string ourselves.
        layers, self.layers_to_transform = self.layers_to_transform, None
        if isinstance(layers, int):
            layers = [layers]
        super().__post_init__()
        self.layers_to_transform = layers
        if self.expert_names is None:
            count = 4 if self.num_experts is None else self.num_experts
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"num_experts={count!r}: a mixture needs at least one expert.")
            self.expert_names = [f"expert_{i}" for i in range(count)]
        if isinstance(self.expert_names, str):
            raise ValueError(f"expert_names={self.expert_names!r}: a list of names is needed, not one string.")
        self.expert_names = list(self.expert_names)
        if self.num_experts is None:
            self.num_experts = len(self.expert_names)
        self.validate()
        self._built = True

    def set_experts(self, names: list[str]) -> None:
        """Follow a mixture whose set of experts changed; `top_k` and `train_top_k` shrink to what is left."""
        self._built = False
        self.expert_names, self.num_experts = list(names), len(names)
        outputs = len(names) + bool(self.route_to_base)
        self.top_k = self.top_k and min(self.top_k, outputs)
        self.train_top_k = self.train_top_k and min(self.train_top_k, outputs)
        self._built = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a routing field that is changed after construction; a refused value leaves the old one."""
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        if self.__dict__.get("_built") and name in CHANGEABLE:
            try:
                self.validate()
            except ValueError:
                super().__setattr__(name, before)
                raise
        if name == "temperature" and _is_finite(value):  # a compiled graph reads this one, and so serves every value
            self.__dict__["temperature_tensor"] = torch.tensor(float(value))

    def validate(self) -> None:
        """Check every routing field; called at construction and before a mixture is built."""
        names = self.expert_names or []
        if not names or self.num_experts != len(names):
            raise ValueError(
                f"num_experts={self.num_experts} but {len(names)} expert_names {names}: "
                "leave one of the two out, or make them agree."
            )
        for position, name in enumerate(names):  # a checkpoint of an older version may have names that differ in case
            check_expert_name(name, taken=[other for other in names[:position] if other == name])
        outputs = len(names) + bool(self.route_to_base)
        for key in ("top_k", "train_top_k"):
            value = getattr(self, key)
            if value is not None and not (_is_int(value) and 1 <= value <= outputs):
                raise ValueError(
                    f"{key}={value!r} with {len(names)} experts: choose 1 to {outputs}"
                    f"{' (the base route counts)' if self.route_to_base else ''}, or add experts."
                )
        for key in ("route_to_base", "recompute_shrink"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}={getattr(self, key)!r}: True or False is needed.")
        _check_choice("router_type", self.router_type, ROUTERS)
        if self.route_to_base and ROUTERS[self.router_type].computed:
            raise ValueError(
                f"route_to_base=True with router_type={self.router_type!r}: it has no row for the base, as nothing was "
                "taught of what no expert fits; leave route_to_base out, or train a router (mlp, linear)."
            )
        _check_choice("granularity", self.granularity, GRANULARITIES)
        _check_choice("policy", self.policy, POLICIES)
        _check_choice("balance_loss", self.balance_loss, (*BALANCE_LOSSES, "none"))
        _check_choice("mixing_form", self.mixing_form, FORM_NAMES)
        if not (_is_int(self.router_hidden_size) and self.router_hidden_size > 0):
            raise ValueError(f"router_hidden_size={self.router_hidden_size!r}: a positive integer is needed.")
        if not (_is_finite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature={self.temperature!r}: a number greater than 0 is needed; 1.0 leaves the logits."
            )
        for key in ("balance_coefficient", "z_loss_coefficient"):
            if not (_is_finite(getattr(self, key)) and getattr(self, key) >= 0):
                raise ValueError(f"{key}={getattr(self, key)!r}: a number from 0 (off) upwards is needed.")
        k = self.router_layer
        if not (k is None or k == "last" or (isinstance(k, int) and _is_int(k) and k >= 0)):
            raise ValueError(f'router_layer={k!r}: a decoder layer index from 0, "last", or None for L // 4.')
        check_mixable(self)

    def resolve_router_layer(self, num_layers: int) -> int:
        """The index of the layer whose input is read; `num_layers` stands for `"last"`."""
        if self.router_layer == "last":
            return num_layers
        if self.router_layer is None:
            return num_layers // 4
        if int(self.router_layer) >= num_layers:
            raise ValueError(
                f"router_layer={self.router_layer}: the base has {num_layers} decoder layers; "
                f'choose 0 to {num_layers - 1}, or "last".'
            )
        return int(self.router_layer)

    def policy_for(self, training: bool, masked: tuple[int, ...] = ()) -> Policy:
        """The policy of a pass: dense in training unless `train_top_k`, the best `top_k` in evaluation.

        Args:
            training: whether the mixture is in training mode.
            masked: columns of experts that are not routed yet.
        """
        k = self.train_top_k if training else (2 if self.top_k is None else self.top_k)
        temperature = self.temperature_tensor if torch.compiler.is_compiling() else float(self.temperature)
        return Policy(k, temperature, masked, self.policy)

    def routing_fields(self) -> dict[str, Any]:
        """The fields that PEFT does not know, as JSON-ready values."""
        return {name: getattr(self, name) for name in ROUTING_FIELDS}

    def expert_config(self, **changes: Any) -> LoraConfig:
        """A stock `peft.LoraConfig` with this configuration's LoRA fields."""
        return stock_lora(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values; sets become sorted lists."""
        data = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in data.items()}


def stock_lora(source: LoraConfig, **changes: Any) -> LoraConfig:
    """A stock `peft.LoraConfig` with the LoRA fields of `source`, some of them changed."""
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
    return LoraConfig(**{**fields, **changes})


ROUTING_FIELDS = tuple(
    f.name
    for f in dataclasses.fields(MoELoraConfig)
    if f.name not in {lora.name for lora in dataclasses.fields(LoraConfig)}
)


def check_name(name: str, taken: Iterable[str] = (), what: str = "expert") -> None:
    """Raise `ValueError` if nothing that has a folder of its own, beside those `taken`, can be called `name`.

    Args:
        name: it.
        taken: names that there are.
        what: they name.
    """
    taken = list(taken)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{what} name {name!r:.200}: use a letter, then letters, digits, '_' or '-'.")
    if len(name) > LONGEST_NAME:
        raise ValueError(
            f"{what} name {name[:20]!r}… has {len(name)} letters; a folder is called so, take {LONGEST_NAME} at most."
        )
    if name in taken:
        raise ValueError(f"{what} {name!r} exists already; the {what}s are {', '.join(taken)}.")
    for other in taken:
        if name.casefold() == other.casefold():
            raise ValueError(
                f"{what} name {name!r}: it differs from {other!r} in capitals only, and many disks have one folder for "
                "both; choose another."
            )


def check_expert_name(name: str, taken: list[str] | tuple[str, ...] = (), base: nn.Module | None = None) -> None:
    """Raise `ValueError` if `name` cannot name an expert.

    PEFT's save filter silently drops tensors whose path contains the adapter's name, so a name must not be a
    part of any module path of `base`.
    """
    check_name(name, taken)
    reserved = name in _RESERVED_NAMES or hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name)
    reserved = reserved or name in vars(nn.ModuleDict()) or name in vars(nn.ParameterDict())
    if not reserved and base is not None:
        reserved = any(name in path.split(".") for path, _ in base.named_modules())
        reserved = reserved or name in ("base_model", "router", "lora_A", "lora_B", "base_layer")
    if reserved:
        raise ValueError(f"expert name {name!r} is reserved (it names a part of the model); choose another.")


def check_expert_names(names: list[str]) -> None:
    """Raise `ValueError` if these cannot be the experts of a new mixture."""
    for position, name in enumerate(names):
        check_expert_name(name, taken=names[:position])


def check_mixable(config: LoraConfig, name: str | None = None) -> None:
    """Raise `ValueError` for LoRA settings that are wrong in themselves or cannot be mixed per token."""
    who = f"expert {name!r}: " if name else ""
    ranks = {"r": config.r, **{f"rank_pattern[{key!r}]": rank for key, rank in (config.rank_pattern or {}).items()}}
    for key, rank in ranks.items():
        if not (_is_int(rank) and rank > 0):
            raise ValueError(f"{who}{key}={rank!r}: a positive integer is needed.")
    if not (_is_finite(config.lora_dropout) and 0 <= config.lora_dropout < 1):
        raise ValueError(
            f"{who}lora_dropout={config.lora_dropout!r}: a share from 0 up to, not including, 1 is needed."
        )
    if config.modules_to_save:
        raise ValueError(
            f"{who}modules_to_save={sorted(config.modules_to_save)} keeps a whole copy of a module per expert, "
            "which cannot be mixed per token; adapt the module with LoRA (target_modules) instead."
        )
    if config.bias != "none":
        raise ValueError(
            f'{who}bias={config.bias!r} trains the base\'s own biases; use bias="none" '
            "(lora_bias=True gives each expert its own)."
        )
    if getattr(config, "target_parameters", None):
        raise ValueError(f"{who}target_parameters={config.target_parameters} cannot be mixed; use target_modules.")
    if getattr(config, "trainable_token_indices", None) is not None:  # PEFT wraps the embeddings for an empty list, too
        raise ValueError(f"{who}trainable_token_indices cannot be mixed; leave it out.")
    if getattr(config, "layer_replication", None):
        raise ValueError(f"{who}layer_replication changes the base itself; it cannot be one expert's setting.")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(INITS_THAT_CHANGE_THE_BASE):
        raise ValueError(
            f"{who}init_lora_weights={init!r} changes the base's weights, which all experts share; "
            'use True, "gaussian", "orthogonal" or "eva".'
        )
    for key in ("arrow_config", "alora_invocation_tokens", "velora_config", "monteclora_config", "kasa_config"):
        if getattr(config, key, None):
            raise ValueError(f"{who}{key} is a LoRA variant that cannot be mixed per token; leave it out.")
    if getattr(config, "use_bdlora", None):
        raise ValueError(f"{who}use_bdlora is a LoRA variant that cannot be mixed per token; leave it out.")


def _check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    choices = tuple(choices)  # a table's keys; what is looked for may be unhashable
    if value not in choices:
        raise ValueError(f"{key}={value!r}: choose one of {', '.join(choices)}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
