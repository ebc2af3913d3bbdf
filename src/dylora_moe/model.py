"""DyLoraMoE: a frozen causal language model that carries LoRA experts and routes every token among them.

The only file that knows all parts, and therefore a long one: it holds every public method of a mixture, each a few
lines over the part that does the work. `passes/hooks.py` is where a pass is followed from its start to its end.

Shapes: B batch, S sequence, E experts, n router outputs, k router layer, L decoder layers.
"""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import torch
from peft import LoraConfig, PeftModelForCausalLM
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import check_are_tensors, check_experts, check_weights, exits_early, input_shape
from .base.loading import (
    accept_in_pipelines,
    check_bare,
    load_base,
    load_tokenizer,
    strip_adapters,
    without_notes_for_peft,
)
from .base.placement import Placement
from .callers import (
    REFERENCE,
    WHOLE,
    AdapterConfigs,
    WholeLoraModel,
    check_trainer,
    ignored_at_inference,
    is_trainer_checkpoint,
    share_of_step,
)
from .checkpoint.adapters import ADAPTER_TENSORS, Adapter, check_tensors, read_adapter, write_adapter
from .checkpoint.card import model_card
from .checkpoint.files import CheckpointError, local_folder, write_file
from .checkpoint.hub import OPTIONS, upload
from .checkpoint.mixture import (
    CARD_FILE,
    CONFIG_FILE,
    ROUTER_FILE,
    Description,
    MixtureState,
    check_gathered,
    load_base_of,
    read_description,
    read_library,
    read_mixture,
    read_router,
    write_mixture,
)
from .checkpoint.vocabulary import (
    Vocabulary,
    added_rows,
    put_rows,
    rows_by_name,
    rows_of,
    whole_embeddings,
)
from .config import MoELoraConfig, check_expert_name, check_expert_names, check_mixable
from .data.examples import Example
from .experts.expert_set import NEW, ROUTED, ExpertSet, renamed
from .experts.export import fixed_mixture, stock_config
from .experts.merge import Truncation, merged
from .experts.tensors import ExpertTensor
from .exporting.adapters import export_adapters
from .exporting.merged import export_merged
from .exporting.routed import export_routed
from .exporting.source import Source
from .layers.adding import out_of_sight
from .layers.groups import lay_out_experts
from .layers.in_force import Generation, Holder
from .layers.recompute import give_back_checkpoints
from .layers.routed import route_layers
from .output import OWN_FIELDS, MoECausalLMOutput, comes_from_trl_head, split_loss, with_routing_fields
from .passes.first_pass import check_possible
from .passes.hooks import BARE, PassHooks
from .reports import ParameterReport, parameter_report
from .routing.call import Call, columns_of
from .routing.decision import one_hot_weights
from .routing.granularity import GRANULARITIES
from .routing.losses import Mean, masked_mean, router_losses
from .routing.policies import Policy
from .routing.records import RouterRecord
from .routing.router import CALIBRATIONS, Router
from .routing.trace import RoutingTrace
from .sharding import is_sharded, reshard, shard_like, whole
from .skills.background import background_texts, background_views
from .skills.features import Row, RowStates, evaluating, states_of, window_of
from .skills.library import SkillLibrary
from .skills.novelty import FALSE_ALARM, Detector, Novelty
from .skills.reading import Reading, digest_of, read_rows
from .skills.skill import RowViews, Skill, Teaching

logger = logging.getLogger(__name__)
Method = TypeVar("Method", bound=Callable[..., Any])
_ROWS = "added_rows."
"""How the names of a resized base's new rows begin among gathered tensors."""


def in_turn(method: Method) -> Method:
    """A method that changes the experts waits until no other thread is inside the model."""

    @functools.wraps(method)
    def waiting(self: DyLoraMoE, *args: Any, **kwargs: Any) -> Any:
        with self.holder.lock.turn():
            return method(self, *args, **kwargs)

    return cast(Method, waiting)


def changing(method: Method) -> Method:
    """As `in_turn`, for a method after which nothing that was made of the experts or of their router is right."""

    @functools.wraps(method)
    def counted(self: DyLoraMoE, *args: Any, **kwargs: Any) -> Any:
        with self.holder.lock.turn():
            try:
                return method(self, *args, **kwargs)
            finally:
                self.holder.changes += 1

    return cast(Method, counted)


class DyLoraMoE(PeftModelForCausalLM):
    """A mixture: base, experts and router. Made by `from_base`, `from_adapters` or `from_pretrained`.

    It is a `PeftModelForCausalLM`, so Trainer, TRL, accelerate, pipelines and evaluation harnesses treat it as one.
    In training the weights are dense (or the best `train_top_k`), in evaluation the best `top_k`.

    Attributes:
        moe_config: the `MoELoraConfig`; `top_k`, `train_top_k`, `temperature` and the coefficients may be changed at
            any time.
        router: the `Router`.
        experts: the `ExpertSet`: names, states, frozen ones, layers.
        holder: what is in force, shared by the layers.
        placement: where the decoder layers of the base are.
        router_layer_index: k; L for `"last"`.
        base_name: what the base is called in checkpoints, or None.
        chat: whether prompts go through the base's chat template, as its training did; None if nobody said. It is for
            those who make prompts, and saved with the mixture.
        skills: the library of what was taught; `teach`, `forget` and `merge_skills` replace it as a whole.
        folder: the checkpoint it was loaded from, or None.
        named_rows: rows of the embeddings of the base that this name stands for, if that is known.
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
        _check_config(config)
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
            with without_notes_for_peft():
                super().__init__(base, experts[names[0]], names[0], autocast_adapter_dtype=autocast_adapter_dtype)
            with out_of_sight(base) as hide:
                for name in names[1:]:
                    hide()
                    super().add_adapter(name, experts[name], autocast_adapter_dtype=autocast_adapter_dtype)
            self.base_model.__class__ = WholeLoraModel
            self.moe_config, self.placement, self.router_layer_index = config, placement, first
            self.holder = Holder(resting=BARE)
            self.experts = ExpertSet(names, self.holder.layers)
            route_layers(self.base_model, self.holder)
            self._check_places(names)
        except BaseException:
            strip_adapters(base)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            raise
        accept_in_pipelines(type(self))
        self.base_name = base_name or getattr(base, "name_or_path", "") or None
        self.chat: bool | None = None
        self.folder: Path | None = None
        self.skills = SkillLibrary()
        self._read_as: tuple[Any, PreTrainedTokenizerBase, Reading] | None = None
        self._background: tuple[Reading, RowViews] | None = None
        self._detector: Detector | None = None
        self._latest: tuple[tuple[Reading, str], RowViews, Skill | None] | None = None
        self.named_rows = rows_by_name(base, self.base_name)
        self.router = Router(
            base.config.get_text_config().hidden_size,
            len(names) + config.route_to_base,
            config.router_type,
            config.router_hidden_size,
        ).to(next(placement.layers(base)[min(first, placement.num_layers - 1)].parameters()).device)
        if self.router.computed:
            self.experts.states = dict.fromkeys(names, NEW)
        base.config.keys_to_ignore_at_inference = ignored_at_inference(base.config, OWN_FIELDS)
        parts = (placement, first, config, self.router, self.experts, self.holder)
        self.hooks = PassHooks(self, base, *parts)
        self._refresh()

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
        config = config or MoELoraConfig(target_modules="all-linear")
        _check_config(config)
        check_expert_names(config.expert_names or [])
        for expert, own in _mapping("expert_configs", expert_configs or {}, "a LoraConfig").items():
            if not isinstance(own, LoraConfig):
                raise TypeError(f"expert_configs[{expert!r}] must be a LoraConfig, not {own!r:.60}.")
        model, name = load_base(base, base_kwargs)
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
            TypeError: `adapters` is no mapping.
            CheckpointError: an adapter that is missing, damaged or made for another architecture. The base is left as
                it was.
        """
        adapters = _mapping("adapters", adapters, "the folder or hub id of an adapter")
        if config is not None:
            _check_config(config)
        if not adapters:
            raise ValueError("adapters={}: a mixture needs at least one expert.")
        check_expert_names(list(adapters))
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
            mixture.experts.load(expert, adapter.tensors)
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
        if not isinstance(directory, (str, Path)):
            raise TypeError(
                f"from_pretrained takes a checkpoint's folder or hub id, then base=..., not {type(directory).__name__}."
            )
        folder, known = read_description(directory)
        model, given_name = load_base_of(folder, known, base, base_kwargs)
        state = read_mixture(folder, known, model)
        configs = {name: adapter.config for name, adapter in state.experts.items()}
        mixture = cls(model, known.config, configs, base_name=given_name or known.base_name)
        mixture.chat, mixture.folder = known.chat, folder
        mixture._take_over(state, trainable)
        if mixture.skills.is_of_another(model):
            logger.warning(
                "%s: its skills were taught with a base of other weights; with this one texts are routed wrongly.",
                folder,
            )
        return mixture.eval()

    def _take_over(self, state: MixtureState, trainable: bool) -> None:
        """Put the values of a checked checkpoint in place, in the dtypes they were saved in."""
        put_rows(cast(PreTrainedModel, self.get_base_model()), state.added_rows)
        for name, adapter in state.experts.items():
            self.experts.load(name, adapter.tensors, keep_dtype=True)
        for key, parameter in self.router.named_parameters():
            parameter.data = state.router[key].to(parameter.device)
        self.experts.states.update(state.description.states)
        self.skills = state.skills
        for name in state.experts:
            if name in state.description.frozen or not trainable:
                self.freeze_expert(name)
        self.router.requires_grad_(trainable and not self.router.computed)

    @changing
    def restore(self, directory: str | Path) -> None:
        """Take over a checkpoint of this same mixture: experts and router, their states, and which are frozen.

        The parameters stay the ones that an optimizer may hold, in their dtypes; modes stay.

        Args:
            directory: folder or hub id.

        Raises:
            CheckpointError: a file is missing, damaged or of another mixture; this one is left as it was.
        """
        folder, known = read_description(directory)
        if list(known.states) != self.expert_names:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: a mixture of {', '.join(known.states)}; this one has the experts "
                f"{', '.join(self.expert_names)}. Load it with DyLoraMoE.from_pretrained."
            )
        adapters = {name: self._read_again(folder / name, name) for name in self.expert_names}
        router = read_router(folder / ROUTER_FILE, self.router)
        skills = read_library(folder, known, self.router.sizes[0])
        reshard(self)
        for name, adapter in adapters.items():
            self.experts.load(name, adapter.tensors)
        with torch.no_grad():
            for key, parameter in self.router.named_parameters():
                parameter.copy_(shard_like(router[key], parameter))
        self.experts.states.update(known.states)
        self.skills = skills
        for name in self.expert_names:
            if (name in known.frozen) != (name in self.experts.frozen):
                self.set_requires_grad(name, name not in known.frozen)

    @changing
    def follow(self, directory: str | Path) -> None:
        """Take over what was added to a checkpoint of this mixture: further experts, and with them router and skills.

        Args:
            directory: folder or hub id.

        Raises:
            CheckpointError: a file is missing, damaged or of another mixture; this one is left as it was.
        """
        folder, known = read_description(directory)
        own, base = self.expert_names, cast(PreTrainedModel, self.get_base_model())
        added = [name for name in known.states if name not in own]
        if list(known.states) != [*own, *added]:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: a mixture of {', '.join(known.states)}, which does not go on from the "
                f"experts {', '.join(own)} of this one. Load it with DyLoraMoE.from_pretrained."
            )
        adapters = {name: read_adapter(folder / name, base, name) for name in added}
        skills = read_library(folder, known, self.router.sizes[0])
        try:
            for name, adapter in adapters.items():
                self._add_expert(name, adapter)
            router = read_router(folder / ROUTER_FILE, self.router)
        except BaseException:
            for name in added:
                if name in self.expert_names:
                    self._drop(name)
            raise
        with torch.no_grad():
            for key, parameter in self.router.named_parameters():
                parameter.copy_(router[key])
        self.experts.states.update(known.states)
        self.skills = skills

    def _read_again(self, folder: Path, name: str) -> Adapter:
        """The adapter in `folder`, which must be one of the expert `name` as it is."""
        adapter = read_adapter(folder, cast(PreTrainedModel, self.get_base_model()), name)
        own = {part.key: tuple(part.tensor.shape) for part in self.expert_tensors(name)}
        check_tensors(adapter.tensors, own, folder / ADAPTER_TENSORS, f"expert {name!r} of this mixture")
        return adapter

    def _apply(self, fn: Any, recurse: bool = True) -> DyLoraMoE:
        self.holder.layers.spare.clear()
        self.holder.changes += 1
        result = super()._apply(fn, recurse)
        lay_out_experts(self.holder.layers, self.expert_names)
        return result

    def train(self, mode: bool = True) -> DyLoraMoE:
        """As in torch; training also gives back the memory that `generate(fold=True)` keeps."""
        if mode:
            self.holder.layers.spare.clear()
        return super().train(mode)

    def _refresh(self) -> None:
        """Bring everything derived from the set of experts up to date."""
        names = self.expert_names
        route_layers(self.base_model, self.holder)
        self.active_adapter = WHOLE
        self.peft_config = AdapterConfigs(self.peft_config, self.moe_config)
        self.base_model.set_adapter(names)
        for name in self.experts.frozen:
            self.base_model.set_requires_grad(name, False)
        lay_out_experts(self.holder.layers, names)
        self.hooks.adapts_head = self.experts.adapt_head(self.placement)
        self.hooks.needs_first_pass = self._needs_first_pass

    @property
    def _needs_first_pass(self) -> bool:
        below = self.experts.lowest_layer(self.placement) < self.router_layer_index
        return self.moe_config.router_layer == "last" or below

    def _check_places(self, names: Sequence[str]) -> None:
        """Raise `ValueError` if an expert sits where no routing reaches it, or where this base cannot route it."""
        for name in names:
            self.placement.check_reachable(name, self.experts.adapted(name))
        if self._needs_first_pass:
            check_possible(self.get_base_model(), self.placement)

    # ------------------------------------------------------------------ what it is

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts, in the order of the columns of `routing_weights`."""
        return self.experts.names

    @property
    def active_adapters(self) -> list[str]:
        """`["default"]`: to stock callers a mixture as a whole is one adapter, which is active."""
        return [WHOLE]

    @property
    def active_peft_config(self) -> MoELoraConfig:
        """The mixture's configuration."""
        return self.moe_config

    @property
    def expert_states(self) -> dict[str, str]:
        """Name → `"routed"`, or `"new"` for an expert whose logit is masked until `start_routing` (or `teach`)."""
        return self.experts.states

    @property
    def frozen_experts(self) -> set[str]:
        """Names of the experts that do not train."""
        return set(self.experts.frozen)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts.states)

    @property
    def output_names(self) -> list[str]:
        """What the router's outputs stand for: the experts, then `"base"` if it has a base route."""
        return [*self.expert_names, *(["base"] if self.moe_config.route_to_base else [])]

    @property
    def routed_layers(self) -> list[Any]:
        """The PEFT layers that carry experts, in module order."""
        return list(self.holder.layers)

    @property
    def router_layer(self) -> int | str:
        """Index of the decoder layer whose input the router reads, or `"last"`."""
        return "last" if self.moe_config.router_layer == "last" else self.router_layer_index

    @property
    def passes_per_step(self) -> float:
        """Forward passes of the base per routed step: 1.0, or 1 + k/L with a routing pass (2.0 for `"last"`)."""
        extra = self.router_layer_index / self.placement.num_layers if self.hooks.needs_first_pass else 0.0
        return 1.0 + extra

    @property
    def policy(self) -> Policy:
        """How scores become weights now: by the configuration, `train()`/`eval()` and the experts' states."""
        return self.hooks.policy

    @property
    def touch_all_experts(self) -> bool:
        """Set by trainers where processes share the parameters in shards: with gradients on, a forced pass takes the
        router and every other expert along with weight zero, so that all have the same gradients."""
        return self.experts.touch_all

    @touch_all_experts.setter
    def touch_all_experts(self, value: bool) -> None:
        self.experts.touch_all = value

    @property
    def vocabulary(self) -> Vocabulary:
        """Rows of the embeddings, now and as loaded by the base's name."""
        return Vocabulary(rows_of(cast(PreTrainedModel, self.get_base_model())), self.named_rows)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter of the mixture exactly once: per expert, `router`, `frozen`."""
        groups = {name: [part.tensor for part in self.expert_tensors(name)] for name in self.expert_names}
        groups["router"] = list(self.router.parameters())
        known = {id(p) for group in groups.values() for p in group}
        groups["frozen"] = [p for p in self.parameters() if id(p) not in known]
        return groups

    def parameter_report(self) -> ParameterReport:
        """Parameters per expert, of the router and of the base; overhead in %."""
        return parameter_report(self.parameter_groups())

    def expert_tensors(self, name: str) -> list[ExpertTensor]:
        """All tensors of one expert, collected layer by layer."""
        return self.experts.tensors(name)

    def lora_config(self, name: str) -> LoraConfig:
        """The stock configuration of one expert."""
        self.experts.check_known(name)
        return cast(LoraConfig, self.peft_config[name])

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
        check_are_tensors(attention_mask=attention_mask, labels=labels)
        batch, length = input_shape((), {"input_ids": input_ids, "inputs_embeds": inputs_embeds})
        if batch is None:
            raise ValueError("a pass needs input_ids [batch, sequence] or inputs_embeds; none was given.")
        call = self._call(experts, routing_weights, batch, length, kwargs)
        call.attention_mask, call.labels = attention_mask, labels
        with self.hooks.calling(call):
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                labels=labels,
                return_dict=True,
                **kwargs,
            )
        result = self._result(output, call, labels, kwargs.get("num_items_in_batch"))
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
        call = self._call(experts, routing_weights, batch, None, kwargs)
        call.attention_mask, call.prompt_length = kwargs.get("attention_mask"), length
        if self.hooks.needs_first_pass and not call.decided and exits_early(args, kwargs, self.generation_config):
            raise ValueError(
                "assistant_early_exit drafts with the lower layers of the same model, whose cache then misses the "
                "routing pass that this mixture needs (an expert sits below the router's layer); pass an "
                "assistant_model, or prompt_lookup_num_tokens."
            )
        if fold:
            call.check_foldable(batch, GRANULARITIES[self.moe_config.granularity])
            call.fold = True
        with self.hooks.calling(call, Generation()):
            return super().generate(*args, **kwargs)

    def _call(self, experts: Any, weights: Tensor | None, batch: int | None, length: int | None, kwargs: dict) -> Call:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names is PEFT's way to choose; pass experts=[...] (one name per row) instead.")
        if experts is not None and weights is not None:
            raise ValueError("experts and routing_weights both force the routing; pass one of the two.")
        if weights is not None:
            return Call(weights=check_weights(weights, self.num_experts, batch, length), trace=self.hooks.trace)
        experts = check_experts(experts, self.expert_names, batch)
        experts = self.hooks.forced if experts is None else experts
        entries = [experts] if isinstance(experts, str) else experts
        one_hot = None
        if entries is not None and None not in entries:
            columns = columns_of(entries, self.expert_names, len(entries)) or ()
            one_hot = one_hot_weights(columns, self.num_experts, next(self.router.parameters()).device)
        return Call(experts=experts, one_hot=one_hot, trace=self.hooks.trace)

    def compile(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`torch.compile` the base with its routed layers; arguments as there.

        What a call asks for is decided outside the graph, so that one graph serves every forced expert.
        """
        self.get_base_model().compile(*args, **kwargs)

    def _result(
        self, output: Any, call: Call, labels: Tensor | None, num_items: Tensor | int | None
    ) -> MoECausalLMOutput:
        decision, trl = call.decision, comes_from_trl_head(output)
        lm_loss, of_base = split_loss(output, self.get_base_model())
        fields: dict[str, Any] = {"lm_loss": lm_loss}
        if decision is not None:
            fields["routing_weights"] = decision.all_weights
        if decision is not None and decision.logits is not None:
            fields["router_logits"] = decision.logits
            if labels is not None:
                mask = decision.rows.routed_mask(decision.logits.device)
                aux, fields["balance_loss"] = self.auxiliary_losses(decision.logits, mask, shares=decision.shares)
                if num_items is not None:
                    aux = aux * share_of_step(labels, num_items).to(aux)
                fields["aux_loss"] = aux
                if output.get("loss") is not None:
                    fields["loss"] = output["loss"] + aux.to(output["loss"].device)
        if trl and of_base is not None:
            fields["aux_loss"] = output["aux_loss"]
        return with_routing_fields(output, **fields)

    def auxiliary_losses(
        self,
        logits: Tensor,
        mask: Tensor | None = None,
        mean: Mean = masked_mean,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The auxiliary loss (coefficients applied) and the raw balance loss of some tokens.

        Args:
            logits: `[..., n]` router scores; those of experts that are not routed yet do not matter.
            mask: bool over the leading dimensions, True for tokens that count; default all.
            mean: how to average over tokens; a trainer passes one that spans its processes.
            shares: the policy's `[..., n]` weights, if they are known already.
        """
        policy, config = self.policy, self.moe_config
        shares = policy.shares(logits).values if shares is None else shares
        kinds = (config.balance_loss, config.balance_coefficient, config.z_loss_coefficient)
        return router_losses(logits, shares, policy.masked, *kinds, mask=mask, mean=mean)

    # ------------------------------------------------------------------ within a block

    @contextmanager
    def use_experts(self, experts: str) -> Iterator[DyLoraMoE]:
        """Force one expert (or `"base"`) for all rows of every call within the block.

        It holds for the thread or task that is in the block, and for threads started from it with its context
        (`threading.Thread(target=contextvars.copy_context().run, args=(model.generate, …))`).
        """
        if not isinstance(experts, str):
            raise TypeError(f"use_experts takes one name, not {experts!r}; per row: model(..., experts=[...]).")
        check_experts(experts, self.expert_names, None)
        with self.hooks.scope(forced=experts):
            yield self

    @contextmanager
    def trace(self) -> Iterator[RoutingTrace]:
        """Record the routing of every call within the block; costs nothing outside. Threads: see `use_experts`."""
        trace = RoutingTrace(self.output_names)
        with self.hooks.scope(trace=trace):
            yield trace

    @contextmanager
    def recording(self) -> Iterator[list[RouterRecord]]:
        """Keep the router's inputs of every training pass, for a balance loss over a whole optimizer step."""
        before, self.hooks.records = self.hooks.records, []
        try:
            yield self.hooks.records
        finally:
            self.hooks.records = before

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The bare base within the block; afterwards everything is as it was, `requires_grad` and modes included."""
        trainable = [(p, p.requires_grad) for p in self.parameters()]
        modes = [(module, module.training) for module in self.modules()]
        try:
            with super().disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            for module, training in modes:
                module.training = training

    def enable_input_require_grads(self) -> None:
        """Nothing: the embeddings' output must not require gradients, or backward would not stop at layer k.

        Only reentrant checkpointing needs it, which is refused.
        """

    # ------------------------------------------------------------------ the life of an expert

    @changing
    def add_expert(
        self, name: str, source: LoraConfig | str | Path | None = None, trainable: bool | None = None
    ) -> None:
        """Add an expert; its logit is masked until `start_routing` (in closed form until `teach`), its forced output
        works at once.

        An optimizer made before knows neither the expert's tensors nor the router's new shape: make a new one.

        Args:
            name: of the new expert.
            source: a LoRA configuration for a fresh expert (default: that of the mixture), or the folder or hub id of
                a stock PEFT LoRA adapter.
            trainable: default True for a fresh expert, False for an imported one.

        Raises:
            ValueError: a name that is taken or reserved, or a configuration that cannot be mixed.
            CheckpointError: an adapter that is missing, damaged or made for another architecture.
        """
        self._add_expert(name, source, trainable)

    def _add_expert(
        self,
        name: str,
        source: LoraConfig | str | Path | Adapter | None,
        trainable: bool | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        base = cast(PreTrainedModel, self.get_base_model())
        check_expert_name(name, taken=self.expert_names, base=base)
        adapter = source if isinstance(source, Adapter) else None
        if isinstance(source, (str, Path)):
            adapter = read_adapter(str(source), base, name)
        config = self._fresh_config(cast(Any, source)) if adapter is None else adapter.config
        position = self.num_experts
        try:
            with out_of_sight(base) as hide:
                hide()
                super().add_adapter(name, config, autocast_adapter_dtype=autocast_adapter_dtype)
            self.experts.states[name] = NEW
            self.moe_config.set_experts(self.expert_names)
            self.router.grow(position)
            self._refresh()
            self._check_places([name])
            self.experts.match_modes(name)
            if adapter is not None:
                self.experts.load(name, adapter.tensors)
        except BaseException:
            self._drop(name)
            raise
        if not (adapter is None if trainable is None else trainable):
            self.freeze_expert(name)

    def _fresh_config(self, source: LoraConfig | None) -> LoraConfig:
        source = self.moe_config if source is None else source
        if not isinstance(source, LoraConfig):
            raise TypeError(f"an expert is made from a LoraConfig or an adapter's folder or id, not {source!r:.80}.")
        check_mixable(source)
        first = 0 if self.moe_config.router_layer == "last" else self.router_layer_index
        return self.placement.fresh_expert(cast(PreTrainedModel, self.get_base_model()), source, first)

    @changing
    def remove_expert(self, name: str) -> None:
        """Remove an expert, its row of the router and its skill; the other rows stay as they are (see `forget`).

        Raises:
            ValueError: an unknown name, the last expert, one without which no routed expert is left, or one that is
                merged into the base.
        """
        self.experts.rest_without(name)
        self._drop(name)

    def _drop(self, name: str) -> None:
        if name in self.experts.states and self.router.num_outputs == len(self.output_names):
            self.router.shrink(self.expert_names.index(name))
        if name in self.skills:
            skills = self.skills.copy()
            skills.forget(name, exact=False)
            self.skills = skills
        self.peft_config.pop(name, None)
        self.experts.drop(name, self.get_base_model())
        self.moe_config.set_experts(self.expert_names)
        self._refresh()

    @changing
    def merge_experts(
        self,
        names: Sequence[str],
        rank: int,
        name: str | None = None,
        weights: Sequence[float] | None = None,
    ) -> Truncation:
        """Put one expert in the place of several: the best of a given rank for their weighted sum (`experts/merge.py`).

        It comes last, has no dropout, and is frozen if all of them were. Their skills become one, as if it had been
        taught all the rows, and a router in closed form is computed anew. A trained router has no row for it: it is
        `new` until `start_routing`, unless it is the only expert.

        Args:
            names: at least two experts.
            rank: R, of every layer; where the ranks that meet in a layer sum to no more, the merge is exact.
            name: of the new expert, which may be one of the old ones; default the old ones' joined by `_`.
            weights: of each, any finite values; default 1 / number of experts.

        Returns:
            how much was cut off, over all and by layer.

        Raises:
            ValueError: unknown experts or fewer than two, a name that is taken, weights that do not fit, a rank that is
                no positive integer, a DoRA expert (its output is not linear in its weight), a skill that was compacted,
                or that no routed expert would be left. Nothing is changed.
        """
        names = [names] if isinstance(names, str) else list(names)
        for each in names:
            self.experts.check_known(each)
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"names={names}: at least two different experts are needed to merge.")
        name = "_".join(names) if name is None else name
        if name not in names:
            check_expert_name(name, taken=self.expert_names, base=self.get_base_model())
        weights = [1 / len(names)] * len(names) if weights is None else list(weights)
        if len(weights) != len(names):
            raise ValueError(f"weights={weights}: {len(names)} are needed, one for each of {', '.join(names)}.")
        state = self.experts.state_instead_of(names, self.router.computed, self.moe_config.route_to_base)
        library = self.skills.copy()
        library.unite(names, name)
        configs = {each: self.lora_config(each) for each in names}
        by_name = dict(zip(names, weights, strict=True))
        config, tensors, truncation = merged(self.experts, configs, by_name, rank, self.base_name)
        trainable = not self.experts.frozen.issuperset(names)
        place = name
        while place in self.expert_names:  # the old ones go when the new one is there
            place += "_"
        self._add_expert(place, Adapter(config, tensors), trainable)
        for each in names:
            self._drop(each)
        if place != name:
            self.rename_expert(place, name)
        self.experts.states[name] = state
        self._put_skills(library)
        return truncation

    @changing
    def rename_expert(self, old: str, new: str) -> None:
        """Give an expert another name; tensors, order and router stay."""
        self.experts.check_known(old)
        other_letters = new != old and new.casefold() == old.casefold()
        taken = [name for name in self.expert_names if not (other_letters and name == old)]
        check_expert_name(new, taken, self.get_base_model())
        self.experts.rename(old, new)
        self.base_model.peft_config = renamed(self.base_model.peft_config, old, new)
        self.hooks.rename(old, new)
        if old in self.skills:
            skills = self.skills.copy()
            skills.rename(old, new)
            self.skills = skills
        self.moe_config.set_experts(self.expert_names)
        self._refresh()

    @in_turn
    def freeze_expert(self, name: str) -> None:
        """Keep an expert as it is: it is used and routed, but not trained."""
        self.experts.check_known(name)
        self.experts.frozen.add(name)
        self.base_model.set_requires_grad(name, False)

    @in_turn
    def unfreeze_expert(self, name: str) -> None:
        """Let an expert train again."""
        self.experts.check_known(name)
        self.experts.frozen.discard(name)
        self.base_model.set_requires_grad(name, True)

    @changing
    def start_routing(self, *names: str) -> None:
        """Unmask the logits of new experts (default: all), so that the router can learn to choose them.

        Raises:
            ValueError: an unknown name, or a router in closed form, which knows an expert by what it was taught.
        """
        if self.router.computed:
            raise ValueError("a closed-form router has a row for what it was taught; call teach(name, rows).")
        for name in names or self.expert_names:
            self.experts.check_known(name)
            self.experts.states[name] = ROUTED

    @changing
    def load_expert(self, name: str, tensors: Mapping[str, Tensor], keep_dtype: bool = False) -> None:
        """Copy validated `tensors` (by stock key) into an expert; `keep_dtype` takes over the file's dtype."""
        self.experts.load(name, tensors, keep_dtype)

    # ------------------------------------------------------------------ skills

    @changing
    def teach(
        self,
        name: str,
        rows: Iterable[str | Mapping[str, Any] | Example],
        tokenizer: PreTrainedTokenizerBase | None = None,
        separator: str | None = None,
        source: str = "",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Add some texts to what an expert is for, and compute the router anew if it is one in closed form.

        Nothing is trained and no text is kept: each row goes through the layers below the router by itself, and its
        states are added to the skill's sums. The order of skills and rows makes no difference.

        Args:
            name: of the expert.
            rows: texts, or mappings with `prompt` and `completion`. With `model.chat` prompts go through the base's
                chat template.
            tokenizer: of the base; default the one in the checkpoint's folder, else the base's.
            separator: what stands between prompt and completion where no chat template is used, as the experts were
                trained; default that of the rows taught before, else a new line.
            source: what to note of where the rows are from, such as a file's hash.
            progress: called after each row with how many are done.

        Raises:
            ValueError: an unknown expert, no rows or unusable ones, no tokenizer, texts read otherwise than those
                before, or a skill that was compacted. Nothing is changed.
        """
        told = None if progress is None else (lambda _, count: progress(count))
        self.teach_many({name: rows}, tokenizer, separator, {name: source}, told)

    @changing
    def teach_many(
        self,
        rows: Mapping[str, Iterable[str | Mapping[str, Any] | Example]],
        tokenizer: PreTrainedTokenizerBase | None = None,
        separator: str | None = None,
        sources: Mapping[str, str] | None = None,
        progress: Callable[[str, int], None] | None = None,
    ) -> None:
        """Teach several experts as `teach` would one after the other, and compute the router once: all, or none.

        Args:
            rows: expert → texts.
            tokenizer: as of `teach`.
            separator: as of `teach`.
            sources: expert → what to note of where its rows are from.
            progress: called after each row with the expert and how many of its rows are done.

        Raises:
            ValueError: as `teach`; nothing is changed.
        """
        for name in rows:
            self.experts.check_known(name)
        tokenizer, reading = self._reading(tokenizer, separator)
        library = self.skills.copy()
        for name in rows:
            library.check_can_add(name, reading)
        read = {name: read_rows(rows[name], tokenizer, reading.separator, bool(self.chat)) for name in rows}
        for name, of_skill in read.items():
            told, digest = None if progress is None else functools.partial(progress, name), digest_of(of_skill)
            skill = None
            if self._latest is not None and self._latest[0] == (reading, digest):
                skill = self._latest[2]
            if skill is None:
                skill = Skill.of(self._states_of(of_skill, told), self.router.sizes[0])
            now, source = datetime.now(UTC).isoformat(timespec="seconds"), (sources or {}).get(name, "")
            taught = Teaching(now, source, digest, skill.rows, skill.tokens)
            library.add(name, replace(skill, taught=(taught,)), reading)
        self._put_skills(library)

    @overload
    def novelty(
        self,
        rows: Iterable[str | Mapping[str, Any] | Example],
        batch: Literal[False] = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        separator: str | None = None,
        false_alarm: float = FALSE_ALARM,
    ) -> list[Novelty]: ...

    @overload
    def novelty(
        self,
        rows: Iterable[str | Mapping[str, Any] | Example],
        batch: Literal[True],
        tokenizer: PreTrainedTokenizerBase | None = None,
        separator: str | None = None,
        false_alarm: float = FALSE_ALARM,
    ) -> Novelty: ...

    def novelty(
        self,
        rows: Iterable[str | Mapping[str, Any] | Example],
        batch: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        separator: str | None = None,
        false_alarm: float = FALSE_ALARM,
    ) -> list[Novelty] | Novelty:
        """Say of texts whether they are of a kind that was taught, related to one, or new.

        The first call for a base reads some hundred texts of no skill, which takes a minute or two on a small CPU; what
        it makes of them is kept in the user's cache folder (`DYLORA_MOE_CACHE`).

        Args:
            rows: as `teach` takes them, or mappings with a `prompt` alone.
            batch: one answer for all rows together, which are of one kind; far surer than one for each.
            tokenizer: as of `teach`.
            separator: as of `teach`.
            false_alarm: the share of texts of the kinds taught that may be called new. Promised for texts like the
                kept rows of all skills together, and possible from 1 / false_alarm − 1 of those on.

        Returns:
            a `Novelty` for each row, or one for all.

        Raises:
            ValueError: nothing was taught yet, or rows that cannot be used, see `teach`.
        """
        detector = self._novelty_detector(tokenizer, separator)
        judge = detector.of_batch if batch else detector.of_rows
        return judge(self.views(rows, tokenizer, separator), false_alarm)

    def nearest_skills(
        self,
        rows: Iterable[str | Mapping[str, Any] | Example],
        tokenizer: PreTrainedTokenizerBase | None = None,
        separator: str | None = None,
    ) -> list[list[tuple[str, float]]]:
        """For each text all skills, nearest first, with the score that `novelty` gives it where it is the nearest.

        Args, raises: as `novelty`.
        """
        return self._novelty_detector(tokenizer, separator).nearest(self.views(rows, tokenizer, separator))

    def prepare_novelty(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        separator: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read what `novelty` reads once for a base, ahead of its first call. Other threads get their turns meanwhile.

        Args:
            tokenizer, separator: as of `novelty`.
            progress: called with how many texts have been read and how many there are; what it raises stops it.
        """
        self._novelty_detector(tokenizer, separator, progress).known_scores()

    def _novelty_detector(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        separator: str | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Detector:
        """The detector for the library as it is, made if there is none."""
        if not self.skills:
            raise ValueError("no skill was taught yet, so that everything is new; call teach(name, rows) first.")
        with self.holder.lock.turn():
            skills = self.skills
            tokenizer, reading = self._reading(tokenizer, separator)
            skills.check_reading(reading, "these rows were read")
            background = self._background

        def read(texts: Sequence[Row]) -> RowViews:
            def told(count: int) -> None:
                if progress is not None:
                    progress(count, len(texts))

            return RowViews.of_each(self._states_of(texts, told))

        if background is None or background[0] != reading:
            texts = read_rows(background_texts(), tokenizer, reading.separator, bool(self.chat))
            background = self._background = (reading, background_views(reading, texts, read))
        detector = self._detector
        if detector is None or not detector.is_of(skills, background[1]):
            detector = self._detector = Detector(skills, background[1])
        return detector

    def views(
        self,
        rows: Iterable[str | Mapping[str, Any] | Example],
        tokenizer: PreTrainedTokenizerBase | None = None,
        separator: str | None = None,
        sums: bool = False,
    ) -> RowViews:
        """What `novelty` sees of some texts: means of their states. Those of the latest rows are kept.

        Other threads get their turns between two rows.

        Args:
            rows, tokenizer, separator: as of `teach`; without `sums` a row may be a `prompt` alone.
            sums: add their states up as well, so that `teach` with the same rows need not read them again.
        """
        with self.holder.lock.turn():
            tokenizer, reading = self._reading(tokenizer, separator)
        read = read_rows(rows, tokenizer, reading.separator, bool(self.chat), unanswered=not sums)
        key, latest = (reading, digest_of(read)), self._latest
        if latest is None or latest[0] != key or (sums and latest[2] is None):
            each: list[RowViews] = []
            states = self._states_of(read)
            skill = Skill.of(states, self.router.sizes[0], each.append) if sums else None
            views = RowViews.chained(each) if sums else RowViews.of_each(states)
            latest = self._latest = (key, views, skill)
        return latest[1]

    def _reading(
        self, tokenizer: PreTrainedTokenizerBase | None, separator: str | None
    ) -> tuple[PreTrainedTokenizerBase, Reading]:
        """The tokenizer, and how rows are read with it; the latest are kept, because finding out takes a second."""
        base = cast(PreTrainedModel, self.get_base_model())
        separator = self.skills.separator if separator is None else separator
        which = (self.folder, self.base_name)
        if tokenizer is not None:
            which = (id(tokenizer), len(tokenizer), str(tokenizer.chat_template))
        key = (which, separator, bool(self.chat), base.dtype, self.router_layer_index)
        if self._read_as is None or self._read_as[0] != key:
            tokenizer = self.tokenizer() if tokenizer is None else tokenizer
            reading = Reading.of(base, self.router_layer_index, tokenizer, separator, bool(self.chat))
            self._read_as = (key, tokenizer, reading)
        return self._read_as[1:]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one in the checkpoint's folder, else the base's.

        Raises:
            ValueError: neither can be loaded.
        """
        try:
            return load_tokenizer(self.folder, self.base_name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer to read the rows with: neither the checkpoint's folder ({self.folder}) nor the base "
                f"({self.base_name}) has one ({error}); pass tokenizer=..."
            ) from error

    def _states_of(self, rows: Sequence[Row], progress: Callable[[int], None] | None = None) -> Iterator[RowStates]:
        """What the bare base makes of some rows, each by itself and in a turn of its own."""
        base = cast(PreTrainedModel, self.get_base_model())
        where, window = (base, self.placement, self.router_layer_index), window_of(base)
        with self.holder.lock.turn():
            modules = list(self.modules())
        for number, row in enumerate(rows, start=1):
            with self.holder.lock.turn(), evaluating(modules), self.hooks.calling(Call(experts="base")):
                states = states_of(*where, row, window)
            yield states
            if progress is not None:
                progress(number)

    def learn(self, rows: Iterable[str | Mapping[str, Any] | Example], name: str | None = None, **options: Any) -> Any:
        """Look at some rows, and where they are new, train an expert for them alone and teach the router.

        Needs the extra `train`. The old experts keep every bit; whatever stops it leaves the mixture as it was.

        Args:
            rows: as `teach` takes them; those of known skills are left out.
            name: of the new expert; default `skill_1`, `skill_2`, …
            options: of `lifelong.learn.learn`: `tokenizer`, `separator`, `false_alarm`, `everything`, `source`,
                `training`.

        Returns:
            a `lifelong.learn.Learned`: the expert's name, or None where nothing is new, and what the rows were.
        """
        from .lifelong.learn import learn  # above this file, the one exception: it trains

        return learn(self, rows, name, **options)

    @changing
    def forget(self, name: str, exact: bool = True) -> None:
        """Remove an expert and its skill, and leave the others as if it had never been there.

        Args:
            name: of the expert.
            exact: False also forgets a skill of a compact library, whose share in the pooled scatter then stays.

        Raises:
            ValueError: as `remove_expert`, or a skill that cannot be taken out exactly. Nothing is changed.
        """
        self.experts.rest_without(name)
        library = self.skills.copy()
        if name in library:
            library.forget(name, exact)
        self._drop(name)
        self._put_skills(library)

    @changing
    def merge_skills(self, library: SkillLibrary) -> None:
        """Add another library's skills, each of which is one of this mixture's experts, and compute the router anew.

        Raises:
            ValueError: a skill that is no expert, or texts that were read otherwise, or of another base or layer.
                Nothing is changed.
        """
        for name in library:
            self.experts.check_known(name)
        if library.reading is not None:
            library.reading.check_same_states(self.get_base_model(), self.router_layer_index)
        merged = self.skills.copy()
        merged.merge(library)
        self._put_skills(merged)

    def _put_skills(self, library: SkillLibrary) -> None:
        """Take over a library; a router that is computed follows it."""
        if self.router.computed and library:
            fit = library.fit(GRANULARITIES[self.moe_config.granularity].calibration)
            weight, bias = fit.rows_for(self.expert_names)
            temperature = torch.tensor([fit.temperatures[kind] for kind in CALIBRATIONS])
            computed = {"weight": weight, "bias": bias, "temperature": temperature}
            for key, parameter in self.router.named_parameters():
                parameter.data.copy_(computed[key])
        if self.router.computed:
            for name in self.expert_names:
                self.experts.states[name] = ROUTED if name in library else NEW
        self.skills = library

    # ------------------------------------------------------------------ saving and exporting

    def state(self, gathered: Mapping[str, Tensor] | None = None) -> MixtureState:
        """The mixture as plain data: what a checkpoint holds.

        Args:
            gathered: full tensors by parameter name, where they are not those of this process.
        """
        base = cast(PreTrainedModel, self.get_base_model())
        self.experts.check_complete(self.peft_config, base)
        adapters, router = {}, self.router.state_dict()
        for name in self.expert_names:
            config = stock_config(self.experts, name, self.lora_config(name), self.base_name)
            parts = self.expert_tensors(name)
            tensors = {p.key: p.tensor.data if gathered is None else gathered[p.name] for p in parts}
            adapters[name] = Adapter(config, tensors)
        if gathered is not None:
            router = {key: gathered[f"router.{key}"] for key in router}
        revision = getattr(self.config, "_commit_hash", None)
        states, frozen = dict(self.expert_states), self.frozen_experts
        known = Description(
            self.moe_config, states, frozen, self.base_name, revision, self.vocabulary, self.chat, bool(self.skills)
        )
        own = {key.removeprefix(_ROWS): value for key, value in (gathered or {}).items() if key.startswith(_ROWS)}
        return MixtureState(known, adapters, router, own or self._added_rows(), self.skills)

    def _added_rows(self) -> dict[str, Tensor]:
        return added_rows(cast(PreTrainedModel, self.get_base_model()), self.vocabulary.added)

    def gathered(self) -> dict[str, Tensor]:
        """All tensors of experts and router by parameter name, whole and on the CPU; the base stays in its shards.

        With them the rows that a resized base gained. Where processes share parameters in shards, every one of them
        must call.
        """
        reshard(self)
        tensors = {name: whole(tensor.data).cpu() for name, tensor in self._trained_tensors().items()}
        return {**tensors, **{f"{_ROWS}{key}": rows.cpu() for key, rows in self._added_rows().items()}}

    def _trained_tensors(self) -> dict[str, Tensor]:
        """The tensors of experts and router by parameter name."""
        tensors = {part.name: part.tensor for name in self.expert_names for part in self.expert_tensors(name)}
        return {**tensors, **{f"router.{name}": parameter for name, parameter in self.router.named_parameters()}}

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        results: Mapping[str, Any] | None = None,
        metric: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the mixture as a checkpoint folder, atomically: a crash leaves an older one whole.

        Args:
            save_directory: the folder.
            state_dict: full tensors by parameter name, where a trainer gathered them from shards.
            is_main_process: False writes nothing.
            push_to_hub: upload it afterwards, to `repo_id` (default: the folder's name).
            results: measured values for the model card: column → {row → share between 0 and 1, or loss}.
            metric: a sentence for the card: what the results are, and whether higher or lower is better.
            kwargs: `token`, `private`, `commit_message`, … of the upload.
        """
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization=False asks for pickles; a mixture is written as safetensors only.")
        if kwargs.pop("save_embedding_layers", "auto") is True:
            raise ValueError(
                "save_embedding_layers=True: of the embeddings a mixture saves the rows that the base gained since it "
                "was loaded, and by itself; leave it out."
            )
        for ignored in ("max_shard_size", "save_function"):  # accelerate passes them
            kwargs.pop(ignored, None)
        if state_dict is None and is_sharded(next(self.router.parameters())):
            state_dict = self.gathered()  # every process must call
        if not is_main_process:
            return
        hub = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        if kwargs:
            raise TypeError(f"save_pretrained does not know {sorted(kwargs)}.")
        if state_dict is not None:
            check_gathered(state_dict, self._trained_tensors())
        state, directory = self.state(state_dict), Path(save_directory)
        card = self._card(state, results, metric)
        write_mixture(state, directory, card, for_trainer=is_trainer_checkpoint(directory))
        if push_to_hub:
            upload(directory, repo_id or directory.name, **hub)

    def _card(self, state: MixtureState, results: Mapping[str, Any] | None = None, metric: str | None = None) -> str:
        report = self.parameter_report()
        return model_card(state, report, self.router_layer, self.passes_per_step, results, metric)

    def export_expert(self, name: str, directory: str | Path) -> None:
        """Write one expert as a stock PEFT adapter, loadable with `PeftModel.from_pretrained(base, directory)`."""
        config = stock_config(self.experts, name, self.lora_config(name), self.base_name)
        self._write_stock(Path(directory), config, {p.key: p.tensor.data for p in self.expert_tensors(name)})

    def export_mixture(self, weights: Mapping[str, float], directory: str | Path) -> None:
        """Write a fixed mixture Σ_e w_e · expert_e as one exact LoRA, by concatenating the ranks.

        Args:
            weights: expert name → weight, any finite value.
            directory: folder of the stock PEFT adapter.

        Raises:
            ValueError: an unknown expert, a weight that is not finite, or a DoRA expert (its output is not linear).
        """
        weights = _mapping("weights", weights, "a number")
        configs = {name: self.lora_config(name) for name in self.expert_names}
        self._write_stock(Path(directory), *fixed_mixture(self.experts, configs, weights, self.base_name))

    def export_merged(self, expert: str | Mapping[str, float], directory: str | Path) -> None:
        """Write the base with one expert or a fixed mixture merged into its weights, as a stock transformers folder.

        Args:
            expert: its name, or expert name → weight.
            directory: the folder, new or empty. The tokenizer goes there, too.

        Raises:
            ValueError: an expert with DoRA or biases, one on a weight that another module shares, a quantized base, or
                a folder that is not empty. Nothing is written.
        """
        export_merged(self._source(), expert, directory)

    def export_vllm(
        self,
        directory: str | Path,
        mixtures: Mapping[str, Mapping[str, float]] | None = None,
        granularity: str | None = None,
        copy: bool = False,
    ) -> str:
        """Write a folder that vLLM serves with the plugin `dylora-moe-vllm`, every token routed as here; atomically.

        Args:
            directory: the folder; an earlier export there is replaced.
            mixtures: name → expert name → weight: fixed mixtures that a request can name, beside experts and base.
            granularity: `"token"` or `"prefix"`, where it is not to be the mixture's own.
            copy: copy the base's weights, which are hard-linked otherwise where the disk allows it.

        Returns:
            the command that serves it.

        Raises:
            ValueError: something that the plugin cannot serve, with the remedy (docs/vllm.md has a table), or a folder
                with other files in it. Nothing is written.
        """
        return export_routed(self._source(), directory, mixtures, granularity, copy)

    def export_vllm_lora(self, directory: str | Path, mixtures: Mapping[str, Mapping[str, float]] | None = None) -> str:
        """Write every expert, and fixed mixtures, as stock adapters that vLLM takes without a plugin, one per request.

        Args:
            directory: the folder, new or empty; each adapter gets a folder of its name in it.
            mixtures: name → expert name → weight; each becomes one exact LoRA, with zeros up to a rank vLLM allows.

        Returns:
            the command that serves them.

        Raises:
            ValueError: an expert with DoRA or biases, a rank above 512, a resized base, or a folder that is not empty.
                Nothing is written.
        """
        return export_adapters(self._source(), directory, mixtures)

    def _source(self) -> Source:
        base = cast(PreTrainedModel, self.get_base_model())
        self.experts.check_complete(self.peft_config, base)
        return Source(
            base,
            self.base_name,
            self.placement,
            self.experts,
            {name: self.lora_config(name) for name in self.expert_names},
            self.moe_config,
            self.router,
            self.router_layer_index,
            self.vocabulary,
            self.folder,
        )

    def _write_stock(self, directory: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
        """Write an adapter that stands alone: as stock PEFT does, with the embeddings of a resized base."""
        base = cast(PreTrainedModel, self.get_base_model())
        embeddings = whole_embeddings(base, tensors) if self.vocabulary.resized else {}
        write_adapter(directory, config, {**tensors, **embeddings})

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_description: str | None = None,
        create_pr: bool | None = None,
        **save_options: Any,
    ) -> str:
        """Upload the mixture as a checkpoint to the Hugging Face hub; returns the commit's address.

        `save_options` go to `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            place = (token, private, commit_message, revision, commit_description, create_pr)
            return upload(Path(folder), repo_id, *place)

    # ------------------------------------------------------------------ PEFT's names for the same

    @changing
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """PEFT's name for `add_expert`; TRL's `"ref"`, the adapter's copy to compare with, is the bare base.

        Args:
            adapter_name: of the new expert.
            peft_config: its configuration.
            low_cpu_mem_usage: without effect.
            autocast_adapter_dtype: keep the expert in float32 over a base in half precision.
        """
        if adapter_name == REFERENCE and peft_config is self.moe_config:
            if self.experts.trained:
                logger.warning(
                    "the reference is the bare base, not this mixture as it is now: with DPO and KTO pass "
                    "ref_model=other.get_base_model() of a second mixture to compare with that."
                )
            return  # TRL then switches the experts off
        self._add_expert(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)

    @changing
    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        subfolder: str | None = None,
        **download: Any,
    ) -> _IncompatibleKeys:
        """PEFT's name for importing an expert (`add_expert`), or for loading tensors into one that is there.

        `"default"`, which is the mixture as a whole, stands for `restore`: Trainer resumes and loads its best so.

        Args:
            model_id: folder or hub id of a stock PEFT LoRA adapter; for `"default"`, of a checkpoint.
            adapter_name: of the expert, or `"default"`.
            is_trainable: whether a new expert trains; one that is there, or the whole, stays as it is or was saved.
            torch_device: without effect; every tensor goes to the device of its layer.
            autocast_adapter_dtype: keep a new expert in float32 over a base in half precision.
            ephemeral_gpu_offload, key_mapping: refused.
            low_cpu_mem_usage: without effect.
            subfolder: of `model_id`.
            download: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, for a hub id.

        Returns:
            what stock callers look at: no missing and no unexpected keys, as either is an error.

        Raises:
            CheckpointError: an adapter or checkpoint that is missing, damaged or made for something else.
            ValueError: a name that cannot be an expert's, or an argument that a mixture cannot heed.
        """
        if ephemeral_gpu_offload or key_mapping:
            raise ValueError(
                "load_adapter of a mixture takes neither ephemeral_gpu_offload nor key_mapping: leave the first out, "
                "and rename the tensors in the file instead of the second."
            )
        if torch_device is not None:
            torch.device(torch_device)  # what is no device is refused, as PEFT would
        folder = local_folder(model_id, [ADAPTER_TENSORS], **download) / (subfolder or "")
        if adapter_name == WHOLE:
            self.restore(folder)
        elif adapter_name in self.expert_names:
            self.experts.load(adapter_name, self._read_again(folder, adapter_name).tensors)
        else:
            self._add_expert(adapter_name, folder, is_trainable, autocast_adapter_dtype)
        return _IncompatibleKeys([], [])

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's name for `remove_expert`."""
        self.remove_expert(adapter_name)

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        """Refused but for `"default"`, the mixture as a whole: all its experts are active, and the router chooses."""
        if adapter_name in (WHOLE, [WHOLE]) and not inference_mode:
            return
        raise ValueError(
            "a mixture keeps all its experts active; to force one, pass experts=... to forward or generate, or use "
            "`with model.use_experts(name)`. What trains is set with freeze_expert and unfreeze_expert."
        )

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """PEFT's name for `unfreeze_expert` and `freeze_expert`; `"default"` is the router with all experts."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name == WHOLE:
                self.set_requires_grad(self.expert_names, requires_grad)
                self.router.requires_grad_(requires_grad and not self.router.computed)
            elif requires_grad:
                self.unfreeze_expert(name)
            else:
                self.freeze_expert(name)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """As in transformers; TRL's trainers give their tag when they are made, and what cannot work is refused."""
        config = self.moe_config
        balanced = config.balance_loss != "none" and config.balance_coefficient != 0
        router_loss = balanced or config.z_loss_coefficient != 0
        check_trainer(tags, self.config, GRANULARITIES[config.granularity].per_sequence, router_loss)
        cast(PreTrainedModel, self.get_base_model()).add_model_tags(tags)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as `merge_and_unload`."""
        self.merge_and_unload()

    def enable_adapter_layers(self) -> None:
        """End what `disable_adapter_layers` began; frozen experts stay frozen, and the others train again."""
        self.base_model.enable_adapter_layers()
        for name in self.expert_names:
            self.base_model.set_requires_grad(name, name not in self.experts.frozen)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the mixture's own card to the folder's README.md."""
        write_file(Path(output_dir) / CARD_FILE, self._card(self.state()))

    def prepare_model_for_gradient_checkpointing(self, model: PreTrainedModel) -> PreTrainedModel:
        """Nothing, as `enable_input_require_grads`."""
        return model

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """As the base's own; what it adds is saved with the mixture.

        Raises:
            ValueError: an expert adapts the embeddings or the head, so that its tensors would keep the old size.
        """
        if new_num_tokens is not None:
            self._check_plain_embeddings(f"resize_token_embeddings({new_num_tokens})")
        return cast(PreTrainedModel, self.get_base_model()).resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the base's own.

        Raises:
            ValueError: an expert adapts the embeddings or the head.
        """
        self._check_plain_embeddings("tie_weights()")
        cast(PreTrainedModel, self.get_base_model()).tie_weights(*args, **kwargs)

    def _check_plain_embeddings(self, call: str) -> None:
        base = cast(PreTrainedModel, self.get_base_model())
        if any(layer in (base.get_input_embeddings(), base.get_output_embeddings()) for layer in self.routed_layers):
            raise ValueError(
                f"{call}: experts adapt the embeddings or the head, which stay as they are; call it on the base before "
                "the mixture is made."
            )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the sum would be an adapter that the router does not know."""
        raise ValueError(
            "a mixture adds its experts up token by token; write a fixed sum with export_mixture({name: weight}, "
            "folder) and take it in with add_expert(name, folder)."
        )

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the router would not know the adapter."""
        raise ValueError("an adapter put into the layers is no expert; use add_expert(name, config or folder).")

    def get_prompt(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: experts are LoRA adapters."""
        raise ValueError("a mixture has LoRA experts, which have no virtual prompt.")

    def get_prompt_embedding_to_save(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: experts are LoRA adapters."""
        return self.get_prompt()

    def unload(self) -> nn.Module:
        """Take the base back, bare: without experts and without hooks. The mixture is of no use afterwards."""
        self.hooks.remove()
        base = self.base_model.unload()
        give_back_checkpoints(base)
        return base

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: routing decides per token, so there is no single merged weight."""
        raise ValueError(
            "a routed mixture has no single merged weight; write a fixed mixture as one LoRA with export_mixture and "
            "merge that, or call unload() for the bare base."
        )


def _mapping(argument: str, value: Any, what: str) -> Mapping[str, Any]:
    """`value` if it is a mapping, or a `TypeError` that says what it should map."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{argument} must map the name of an expert to {what}, not be {value!r:.60}: "
            f'{argument}={{"sql": …, "math": …}}.'
        )
    return value


def _check_config(config: Any) -> None:
    if not isinstance(config, MoELoraConfig):
        raise TypeError(f"config must be a MoELoraConfig(…), not {config!r:.60}.")
