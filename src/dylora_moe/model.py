"""DyLoraMoE: a frozen causal language model that carries LoRA experts and routes every token among them.

Shapes: B batch, S sequence, E experts, n router outputs, k router layer, L decoder layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModelForCausalLM
from torch import Tensor
from transformers import PreTrainedModel

from . import passes
from .base import check_bare, load_base, strip_adapters
from .config import MoELoraConfig, check_expert_name, check_mixable
from .contexts import Contexts
from .experts import ROUTED, ExpertLifecycle
from .fold import check_foldable, unfold
from .holder import Routing
from .hooks import PassHooks
from .layers import lay_out_experts, route_layers, routed_layers
from .output import MoECausalLMOutput, with_routing_fields
from .placement import Placement, lowest_layer
from .policy import Policy
from .request import Request, check_experts, check_weights, has_packed_rows, input_shape
from .router import Router
from .trace import RoutingTrace


class DyLoraMoE(ExpertLifecycle, Policy, Contexts, PassHooks, PeftModelForCausalLM):
    """A mixture: base, experts and router. Made by `from_base`, `from_adapters` or `from_pretrained`.

    It is a `PeftModelForCausalLM`, so Trainer, TRL, accelerate, pipelines and evaluation harnesses treat it as one.
    In training the weights are dense (or the best `train_top_k`), in evaluation the best `top_k`.

    Attributes:
        moe_config: the `MoELoraConfig`; `top_k`, `train_top_k`, `temperature` and the coefficients may be changed at
            any time.
        router: the `Router`.
        touch_all_experts: set by trainers where processes share the parameters in shards: with gradients on, a forced
            pass takes the router and every other expert along with weight zero, so that all have the same gradients.
        expert_states: name → `"routed"`, or `"new"` for an expert whose logit is masked until `start_routing`.
    """

    base_model: Any  # a peft.LoraModel

    def __init__(
        self,
        base: PreTrainedModel,
        config: MoELoraConfig,
        experts: Mapping[str, LoraConfig] | None = None,
        base_name: str | None = None,
        fresh: Mapping[str, LoraConfig] | None = None,
        autocast_adapter_dtype: bool = True,
    ):
        """Inject `experts` (name → stock configuration, taken as it is), or new ones after `config` and `fresh`."""
        config = copy.deepcopy(config)  # it changes with the experts; the caller's does not
        config.validate()
        check_bare(base)
        placement = Placement.of(base)
        first = config.resolve_router_layer(placement.num_layers)
        names = list(config.expert_names or [])
        for name in names:
            check_expert_name(name, base=base)
        if experts is None:
            first_adapted = 0 if config.router_layer == "last" else first
            own = fresh or {}
            if set(own) - set(names):
                raise ValueError(f"expert_configs for {sorted(set(own) - set(names))}, but the experts are {names}.")
            experts = {name: placement.fresh_expert(base, own.get(name, config), first_adapted) for name in names}
        for name, expert in experts.items():
            check_mixable(expert, name)
        trainable = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
        try:
            super().__init__(base, experts[names[0]], names[0], autocast_adapter_dtype=autocast_adapter_dtype)
            for name in names[1:]:
                PeftModelForCausalLM.add_adapter(
                    self, name, experts[name], autocast_adapter_dtype=autocast_adapter_dtype
                )
        except BaseException:
            strip_adapters(base)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            raise
        self.moe_config = config
        self.base_name = base_name or getattr(base, "name_or_path", "") or None
        self.placement = placement
        self.router_layer_index = first
        self.routing = Routing()
        self.expert_states: dict[str, str] = dict.fromkeys(names, ROUTED)
        self.touch_all_experts = False
        self.router = Router(
            base.config.get_text_config().hidden_size,
            len(names) + config.route_to_base,
            config.router_type,
            config.router_hidden_size,
        ).to(next(placement.layers(base)[min(first, placement.num_layers - 1)].parameters()).device)
        self._frozen_experts: set[str] = set()
        self._default_experts: str | None = None
        self._request: Request | None = None
        self._current: Request | None = None
        self._records: list[passes.RouterRecord] | None = None
        self._trace: RoutingTrace | None = None
        self._inside_base = False
        base.config.keys_to_ignore_at_inference = ["past_key_values", "routing_weights", "router_logits"]
        self._layers: list[Any] = []
        self._needs_routing_pass = self._adapts_head = False
        self._refresh()
        self._install_hooks(base)

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | str,
        config: MoELoraConfig | None = None,
        expert_configs: Mapping[str, LoraConfig] | None = None,
        **base_kwargs: Any,
    ) -> DyLoraMoE:
        """A mixture of new experts on a base.

        Args:
            base: a loaded causal language model (changed in place), or its name or folder.
            config: experts and routing; default `MoELoraConfig(target_modules="all-linear")`.
            expert_configs: LoRA configurations of those experts that differ from `config`.
            base_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ValueError: a setting that does not fit the base; the message names it.
        """
        model, name = load_base(base, base_kwargs)
        config = config or MoELoraConfig(target_modules="all-linear")
        return cls(model, config, base_name=name, fresh=expert_configs)

    @classmethod
    def from_adapters(
        cls,
        base: PreTrainedModel | str,
        adapters: Mapping[str, str | LoraConfig],
        config: MoELoraConfig | None = None,
        trainable: bool = False,
        **base_kwargs: Any,
    ) -> DyLoraMoE:
        """A mixture of adapters that were trained elsewhere, with a fresh router.

        Each keeps its own rank, alpha, targets and LoRA options. Train the router next; the experts are frozen
        unless `trainable`.

        Args:
            base: a loaded causal language model (changed in place), or its name or folder.
            adapters: expert name → folder or hub id of a stock PEFT LoRA adapter, or the LoRA configuration of a new
                expert beside them, which is trainable.
            config: the routing; its LoRA fields are the default of experts added later.
            trainable: leave the loaded experts trainable.
            base_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            CheckpointError: an adapter that is missing, damaged or made for another architecture. The base is left as
                it was.
        """
        from .checkpoint import read_adapter

        if not adapters:
            raise ValueError("adapters={}: a mixture needs at least one expert.")
        model, name = load_base(base, base_kwargs)
        fresh = {e: source for e, source in adapters.items() if isinstance(source, LoraConfig)}
        loaded = {e: read_adapter(str(source), model, e) for e, source in adapters.items() if e not in fresh}
        if config is None:
            lora = [*(adapter.config for adapter in loaded.values()), *fresh.values()][0]
            like = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": lora.target_modules}
            config = MoELoraConfig(expert_names=list(adapters), **like)
        else:
            config = copy.deepcopy(config)
            config.set_experts(list(adapters))
        placement = Placement.of(model)
        lowest = 0 if config.router_layer == "last" else config.resolve_router_layer(placement.num_layers)
        new = {e: placement.fresh_expert(model, source, lowest) for e, source in fresh.items()}
        mixture = cls(model, config, {e: new.get(e) or loaded[e].config for e in adapters}, base_name=name)
        for expert, adapter in loaded.items():
            mixture._load_expert(expert, adapter.tensors)
            if not trainable:
                mixture.freeze_expert(expert)
        return mixture

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, directory: str, base: PreTrainedModel | str | None = None, trainable: bool = True, **base_kwargs: Any
    ) -> DyLoraMoE:
        """Load a mixture that `save_pretrained` wrote, in evaluation mode.

        Args:
            directory: folder or hub id of a checkpoint.
            base: overrides the base named in the checkpoint.
            trainable: False freezes router and experts.
            base_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            CheckpointError: a missing, truncated, mis-shaped, pickled or unknown file, or a newer format.
        """
        from .checkpoint import load_mixture

        return load_mixture(cls, directory, base, trainable, base_kwargs)

    def save_pretrained(self, save_directory: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the mixture as a checkpoint folder, atomically: a crash leaves an older one whole.

        Args:
            save_directory: the folder.
            state_dict: full tensors by parameter name, where a trainer gathered them from shards.
            kwargs: `is_main_process=False` writes nothing; `push_to_hub=True` (with `repo_id`, `token`, …) uploads.
        """
        from .checkpoint import save_mixture

        save_mixture(self, save_directory, state_dict=state_dict, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> DyLoraMoE:
        self.routing.spare.clear()
        result = super()._apply(fn, recurse)
        lay_out_experts(self.routing, self.expert_names)
        return result

    def train(self, mode: bool = True) -> DyLoraMoE:
        """As in torch; training also gives back the memory that `generate(fold=True)` keeps."""
        if mode:
            self.routing.spare.clear()
        return super().train(mode)

    def _refresh(self) -> None:
        """Bring everything derived from the set of experts up to date."""
        names = self.expert_names
        route_layers(self.base_model, self.routing)
        self.active_adapter = names[0]
        self.base_model.set_adapter(names)
        for name in self._frozen_experts:
            self.base_model.set_requires_grad(name, False)
        self._layers = routed_layers(self.base_model)
        lay_out_experts(self.routing, names)
        adapted = [layer.routing_name for layer in self._layers if layer.r]
        self._adapts_head = any(self.placement.layer_of(path) == self.placement.num_layers for path in adapted)
        lowest = lowest_layer(self.placement, adapted)
        self._needs_routing_pass = self.moe_config.router_layer == "last" or lowest < self.router_layer_index

    # ------------------------------------------------------------------ what it is

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts, in the order of the columns of `routing_weights`."""
        return list(self.expert_states)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.expert_states)

    @property
    def router_layer(self) -> int | str:
        """Index of the decoder layer whose input the router reads, or `"last"`."""
        return "last" if self.moe_config.router_layer == "last" else self.router_layer_index

    @property
    def passes_per_step(self) -> float:
        """Forward passes of the base per routed step: 1.0, or 1 + k/L with a routing pass (2.0 for `"last"`)."""
        extra = self.router_layer_index / self.placement.num_layers if self._needs_routing_pass else 0.0
        return 1.0 + extra

    def _output_names(self) -> list[str]:
        return [*self.expert_names, *(["base"] if self.moe_config.route_to_base else [])]

    # ------------------------------------------------------------------ forward

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        experts: str | Sequence[str | None] | None = None,
        routing_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> MoECausalLMOutput | tuple:
        """One pass of the mixture.

        Args:
            input_ids: `[B, S]`; or `inputs_embeds` `[B, S, D]`.
            attention_mask: `[B, S]`, 0 for padding.
            labels: `[B, S]`, -100 where the loss does not look.
            return_dict: False returns a tuple.
            experts: force an expert by name (`"base"` for none) for all rows, or one name per row (None: routed).
            routing_weights: force weights, `[E]`, `[B, E]` or `[B, S, E]`.
            kwargs: passed to the base.

        Raises:
            ValueError: unknown experts, weights of the wrong shape or not finite, or both arguments at once.
        """
        batch, length = input_shape((), {"input_ids": input_ids, "inputs_embeds": inputs_embeds})
        request = self._make_request(experts, routing_weights, batch, length, kwargs)
        request.attention_mask, request.labels = attention_mask, labels
        request.packed_rows = self.moe_config.granularity == "sequence" and has_packed_rows(attention_mask, kwargs)
        with self._call(request):
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                labels=labels,
                return_dict=True,
                **kwargs,
            )
        result = self._result(output, request, labels is not None)
        wanted = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return result if wanted else result.to_tuple()

    def generate(  # type: ignore[override]
        self,
        *args: Any,
        experts: str | Sequence[str | None] | None = None,
        routing_weights: Tensor | None = None,
        fold: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`transformers`' generate, routed token by token, with `experts=` or `routing_weights=` to force.

        Weights are `[E]` or `[B, E]` and hold for every position; rows are repeated for beams. With `fold=True` a
        mixture that is fixed for the whole call (one forced expert, one row of weights, or one row at sequence
        granularity) is folded into the base's weights meanwhile: the speed of the base, for a second copy of the
        adapted weights. They are restored bit for bit. Once compiled, sequence granularity mixes on instead.
        """
        batch, length = input_shape(args, kwargs)
        request = self._make_request(experts, routing_weights, batch, None, kwargs)
        request.attention_mask, request.prompt_length = kwargs.get("attention_mask"), length
        request.fold = fold and check_foldable(self, batch, request)
        with self._call(request):
            self.routing.packed = {}
            try:
                if request.fold and self.get_base_model()._compiled_call_impl is not None:
                    passes.fold_ahead(self, request)
                return super().generate(*args, **kwargs)
            finally:
                unfold(self)
                self.routing.packed = None

    def _make_request(
        self, experts: Any, weights: Tensor | None, batch: int | None, length: int | None, kwargs: dict
    ) -> Request:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names is PEFT's way to choose; pass experts=[...] (one name per row) instead.")
        if experts is not None and weights is not None:
            raise ValueError("experts and routing_weights both force the routing; pass one of the two.")
        if weights is not None:
            return Request(weights=check_weights(weights, self.num_experts, batch, length))
        experts = check_experts(experts, self.expert_names, batch)
        request = Request(experts=self._default_experts if experts is None else experts)
        request.one_hot = passes.forced_weights(self, request)
        return request

    def compile(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`torch.compile` the base with its routed layers; arguments as there.

        What a call asks for is decided outside the graph, so that one graph serves every forced expert.
        """
        self.get_base_model().compile(*args, **kwargs)

    @contextmanager
    def _call(self, request: Request) -> Iterator[None]:
        with self.routing.lock.turn():
            outer, self._request = self._request, request
            try:
                yield
            finally:
                self._request, self._current = outer, None
                self.routing.reset()

    def _result(self, output: Any, request: Request, labelled: bool) -> MoECausalLMOutput:
        decision = request.decision
        fields: dict[str, Tensor | None] = {"lm_loss": output.get("loss")}
        if decision is not None and decision.weights is not None:
            fields["routing_weights"] = decision.weights.expand(decision.batch, decision.length, -1)
        if decision is not None and decision.logits is not None:
            fields["router_logits"] = decision.logits
            if labelled:
                mask = decision.routed_mask(decision.logits.device)
                aux, fields["balance_loss"] = self.auxiliary_losses(decision.logits, mask, shares=decision.shares)
                fields["aux_loss"] = aux
                if output.get("loss") is not None:
                    fields["loss"] = output["loss"] + aux.to(output["loss"].device)
        return with_routing_fields(output, **fields)
