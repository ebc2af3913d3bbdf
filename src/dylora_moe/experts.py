"""The life of an expert: add, import, rename, freeze, remove, export.

Shapes: E experts, R rank of one expert.
"""

from __future__ import annotations

import tempfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import MoELoraConfig, check_expert_name, check_mixable
from .recompute import KeepRouting
from .sharding import shard_like
from .trace import ParameterReport, parameter_report

if TYPE_CHECKING:
    from .model import DyLoraMoE

NEW, ROUTED = "new", "routed"


class ExpertTensor(NamedTuple):
    """One tensor of an expert: its key in a stock adapter file, its name in the model, the parameter."""

    key: str
    name: str
    tensor: nn.Parameter


def layer_tensors(layer: LoraLayer, path: str, expert: str) -> list[ExpertTensor]:
    """The tensors of `expert` in one LoRA layer at `path` of the base."""
    found = []
    prefix = f"base_model.model.{path}"
    for attribute in dict.fromkeys(layer.adapter_layer_names):  # DoRA names its magnitudes once more
        container = getattr(layer, attribute)
        if expert not in container:
            continue
        part = container[expert]
        if isinstance(part, nn.Parameter):
            found.append(ExpertTensor(f"{prefix}.{attribute}", f"{prefix}.{attribute}.{expert}", part))
            continue
        for name, parameter in part.named_parameters():
            # PEFT saves DoRA's magnitude without the ".weight" of its module
            suffix = "" if attribute == "lora_magnitude_vector" else f".{name}"
            found.append(
                ExpertTensor(f"{prefix}.{attribute}{suffix}", f"{prefix}.{attribute}.{expert}.{name}", parameter)
            )
    return found


class ExpertLifecycle:
    """Mix-in of `DyLoraMoE`. Every change leaves the other experts' tensors and router rows bit-identical."""

    if TYPE_CHECKING:
        expert_states: dict[str, str]
        moe_config: MoELoraConfig
        _layers: list[Any]
        _frozen_experts: set[str]

    def expert_tensors(self: DyLoraMoE, name: str) -> list[ExpertTensor]:  # type: ignore[misc]
        """All tensors of one expert, collected layer by layer."""
        self._check_known(name)
        return [tensor for layer in self._layers for tensor in layer_tensors(layer, layer.routing_name, name)]

    def lora_config(self: DyLoraMoE, name: str) -> LoraConfig:  # type: ignore[misc]
        """The stock configuration of one expert."""
        self._check_known(name)
        return cast(LoraConfig, self.peft_config[name])

    def parameter_report(self: DyLoraMoE) -> ParameterReport:  # type: ignore[misc]
        """Parameters per expert, of the router and of the base; overhead in %."""
        return parameter_report(self)

    # ------------------------------------------------------------------ adding and removing

    def add_expert(
        self: DyLoraMoE,  # type: ignore[misc]
        name: str,
        source: LoraConfig | str | Path | None = None,
        trainable: bool | None = None,
    ) -> None:
        """Add an expert; its logit is masked until `start_routing`, its forced output works at once.

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
        from .checkpoint import read_adapter

        base = cast(PreTrainedModel, self.get_base_model())
        check_expert_name(name, taken=self.expert_names, base=base)
        tensors: dict[str, Tensor] | None = None
        if isinstance(source, (str, Path)):
            adapter = read_adapter(str(source), base, name)
            config, tensors = adapter.config, adapter.tensors
        else:
            config = self._fresh_config(source)
        position = self.num_experts
        try:
            PeftModelForCausalLM.add_adapter(self, name, config)
            self.expert_states[name] = NEW
            self.moe_config.set_experts(self.expert_names)
            self.router.grow(position)
            self._refresh()
            self._match_modes(name)
            if tensors is not None:
                self._load_expert(name, tensors)
        except BaseException:
            self._drop(name)
            raise
        if not (tensors is None if trainable is None else trainable):
            self.freeze_expert(name)

    def remove_expert(self: DyLoraMoE, name: str) -> None:  # type: ignore[misc]
        """Remove an expert and its row of the router.

        Raises:
            ValueError: an unknown name, the last expert, one without which no routed expert is left, or one that is
                merged into the base.
        """
        self._check_known(name)
        if any(name in layer.merged_adapters for layer in self._layers):
            raise ValueError(f"expert {name!r} is merged into the base's weights; call unmerge_adapter() first.")
        rest = {other: state for other, state in self.expert_states.items() if other != name}
        if not rest:
            raise ValueError(f"{name!r} is the only expert; a mixture needs at least one.")
        if ROUTED not in rest.values():
            raise ValueError(
                f"without {name!r} only experts that are not routed yet are left ({', '.join(rest)}); "
                "call start_routing() for one of them first."
            )
        self._drop(name)

    def _drop(self: DyLoraMoE, name: str) -> None:  # type: ignore[misc]
        if name in self.expert_states:
            if self.router.num_outputs == self.num_experts + self.moe_config.route_to_base:
                self.router.shrink(self.expert_names.index(name))
            del self.expert_states[name]
        self._frozen_experts.discard(name)
        self.active_adapter = self.expert_names[0]
        self.peft_config.pop(name, None)
        base = self.get_base_model()
        for path, layer in list(base.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.delete_adapter(name)
                if not layer.r:  # nobody adapts it any more
                    parent, _, child = path.rpartition(".")
                    setattr(base.get_submodule(parent), child, layer.base_layer)
        self.moe_config.set_experts(self.expert_names)
        self._refresh()

    def rename_expert(self: DyLoraMoE, old: str, new: str) -> None:  # type: ignore[misc]
        """Give an expert another name; tensors, order and router stay."""
        self._check_known(old)
        check_expert_name(new, taken=self.expert_names, base=self.get_base_model())
        for layer in self._layers:
            for attribute in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
                container = getattr(layer, attribute)
                if old in container:
                    setattr(layer, attribute, _renamed(container, old, new))
            layer.merged_adapters = [new if name == old else name for name in layer.merged_adapters]
            if old in layer.frozen_peft_weight_names:
                layer.frozen_peft_weight_names = _renamed(layer.frozen_peft_weight_names, old, new)
        self.base_model.peft_config = _renamed(self.base_model.peft_config, old, new)
        self.expert_states = _renamed(self.expert_states, old, new)
        if self._default_experts == old:
            self._default_experts = new
        self._frozen_experts = {new if name == old else name for name in self._frozen_experts}
        self.moe_config.set_experts(self.expert_names)
        self._refresh()

    def freeze_expert(self: DyLoraMoE, name: str) -> None:  # type: ignore[misc]
        """Keep an expert as it is: it is used and routed, but not trained."""
        self._check_known(name)
        self._frozen_experts.add(name)
        self.base_model.set_requires_grad(name, False)

    def unfreeze_expert(self: DyLoraMoE, name: str) -> None:  # type: ignore[misc]
        """Let an expert train again."""
        self._check_known(name)
        self._frozen_experts.discard(name)
        self.base_model.set_requires_grad(name, True)

    def start_routing(self: DyLoraMoE, *names: str) -> None:  # type: ignore[misc]
        """Unmask the logits of new experts (default: all), so that the router can learn to choose them."""
        for name in names or self.expert_names:
            self._check_known(name)
            self.expert_states[name] = ROUTED

    # ------------------------------------------------------------------ exporting

    def export_expert(self: DyLoraMoE, name: str, directory: str | Path) -> None:  # type: ignore[misc]
        """Write one expert as a stock PEFT adapter, loadable with `PeftModel.from_pretrained(base, directory)`."""
        from .checkpoint import export_adapter

        self._check_known(name)
        export_adapter(self, name, directory)

    def export_mixture(self: DyLoraMoE, weights: Mapping[str, float], directory: str | Path) -> None:  # type: ignore[misc]
        """Write a fixed mixture Σ_e w_e · expert_e as one exact LoRA, by concatenating the ranks.

        Args:
            weights: expert name → weight, any finite value.
            directory: folder of the stock PEFT adapter.

        Raises:
            ValueError: an unknown expert, a weight that is not finite, or a DoRA expert (its output is not linear).
        """
        from .checkpoint import write_adapter

        config, tensors = self._concatenated(weights)
        write_adapter(Path(directory), config, tensors)

    def push_to_hub(  # type: ignore[override]
        self: DyLoraMoE,  # type: ignore[misc]
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
        from .checkpoint import upload

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            place = (token, private, commit_message, revision, commit_description, create_pr)
            return upload(Path(folder), repo_id, *place)

    def _concatenated(self: DyLoraMoE, weights: Mapping[str, float]) -> tuple[LoraConfig, dict[str, Tensor]]:  # type: ignore[misc]
        if not weights:
            raise ValueError("weights={}: name at least one expert.")
        for name, value in weights.items():
            self._check_known(name)
            if not torch.isfinite(torch.tensor(float(value))):
                raise ValueError(f"weight of {name!r} is {value}; it must be finite.")
            if self.lora_config(name).use_dora:
                raise ValueError(f"expert {name!r} uses DoRA, whose output is not linear in its weight.")
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        any_bias = any(self.lora_config(name).lora_bias for name in weights)
        for layer in self._layers:
            present = [name for name in weights if name in layer.lora_A or name in layer.lora_embedding_A]
            if not present:
                continue
            path, prefix = layer.routing_name, f"base_model.model.{layer.routing_name}"
            gates = [weights[name] * layer.scaling[name] for name in present]
            if layer.lora_embedding_A:
                if any_bias:
                    raise ValueError(
                        f"{path} is an embedding, and PEFT knows no adapter with lora_bias on embeddings: an expert "
                        "with lora_bias cannot go into one adapter with an expert on the embeddings."
                    )
                A = torch.cat([layer.lora_embedding_A[name].data for name in present])
                B = torch.cat([g * layer.lora_embedding_B[n].data for g, n in zip(gates, present, strict=True)], 1)
                tensors[f"{prefix}.lora_embedding_A"], tensors[f"{prefix}.lora_embedding_B"] = A, B
            else:
                A = torch.cat([layer.lora_A[name].weight.data for name in present])
                B = torch.cat([g * layer.lora_B[n].weight.data for g, n in zip(gates, present, strict=True)], 1)
                tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = A, B
                if any_bias:
                    bias = B.new_zeros(B.shape[0])
                    for gate, name in zip(gates, present, strict=True):
                        if layer.lora_B[name].bias is not None:
                            bias += gate * layer.lora_B[name].bias.data
                    tensors[f"{prefix}.lora_B.bias"] = bias
            ranks[path] = A.shape[0]
        rank = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {path: r for path, r in ranks.items() if r != rank}
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,  # the scalings are inside B
            rank_pattern=pattern,
            alpha_pattern=dict(pattern),
            target_modules=sorted(ranks),
            lora_bias=any_bias,
            fan_in_fan_out=any(
                getattr(layer, "fan_in_fan_out", False) for layer in self._layers if layer.routing_name in ranks
            ),
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base_name,
            inference_mode=True,
        )
        return config, tensors

    # ------------------------------------------------------------------ PEFT's names for the same

    def add_adapter(self: DyLoraMoE, adapter_name: str, peft_config: LoraConfig) -> None:  # type: ignore[misc]
        """PEFT's name for `add_expert`."""
        self.add_expert(adapter_name, peft_config)

    def load_adapter(self: DyLoraMoE, model_id: str, adapter_name: str, is_trainable: bool = False) -> None:  # type: ignore[misc]
        """PEFT's name for importing an expert; see `add_expert`."""
        self.add_expert(adapter_name, model_id, trainable=is_trainable)

    def delete_adapter(self: DyLoraMoE, adapter_name: str) -> None:  # type: ignore[misc]
        """PEFT's name for `remove_expert`."""
        self.remove_expert(adapter_name)

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        """Refused: all experts of a mixture are active, and the router chooses among them."""
        raise ValueError(
            "a mixture keeps all its experts active; to force one, pass experts=... to forward or generate, or use "
            "`with model.use_experts(name)`."
        )

    def unload(self: DyLoraMoE) -> nn.Module:  # type: ignore[misc]
        """Take the base back, bare: without experts and without hooks. The mixture is of no use afterwards."""
        for handle in self._hooks:
            handle.remove()
        base = self.base_model.unload()
        for module in base.modules():
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(checkpoint, KeepRouting):
                module._gradient_checkpointing_func = checkpoint.checkpoint
        return base

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: routing decides per token, so there is no single merged weight."""
        raise ValueError(
            "a routed mixture has no single merged weight; write a fixed mixture as one LoRA with export_mixture and "
            "merge that, or call unload() for the bare base."
        )

    # ------------------------------------------------------------------ internals

    def _fresh_config(self: DyLoraMoE, source: LoraConfig | None) -> LoraConfig:  # type: ignore[misc]
        if source is None:
            source = self.moe_config
        if not isinstance(source, LoraConfig):
            raise TypeError(f"an expert is made from a LoraConfig or an adapter's folder or id, not {source!r:.80}.")
        check_mixable(source)
        first = 0 if self.moe_config.router_layer == "last" else self.router_layer_index
        return self.placement.fresh_expert(cast(PreTrainedModel, self.get_base_model()), source, first)

    def _load_expert(self: DyLoraMoE, name: str, tensors: Mapping[str, Tensor], keep_dtype: bool = False) -> None:  # type: ignore[misc]
        """Copy validated `tensors` (stock keys) into an expert; `keep_dtype` takes over the file's dtype."""
        for key, _, parameter in self.expert_tensors(name):
            value = shard_like(tensors[key], parameter)
            with torch.no_grad():
                if keep_dtype and value.dtype != parameter.dtype:
                    parameter.data = value.clone()
                else:
                    parameter.copy_(value)

    def _match_modes(self: DyLoraMoE, name: str) -> None:  # type: ignore[misc]
        """PEFT makes new modules in training mode; give an expert's parts the mode of the layer they sit in."""
        for layer in self._layers:
            if name not in layer.r:
                continue
            mode = layer.base_layer.training
            layer.training = mode
            for attribute in (*layer.adapter_layer_names, "lora_dropout"):
                container = getattr(layer, attribute)
                container.training = mode
                if isinstance(container, nn.ModuleDict) and name in container:
                    container[name].train(mode)

    def _check_known(self: DyLoraMoE, name: str) -> None:  # type: ignore[misc]
        if name not in self.expert_states:
            raise ValueError(f"unknown expert {name!r}; the experts are {', '.join(self.expert_names)}.")


def _renamed(container: Any, old: str, new: str) -> Any:
    """`container` with one key renamed in place of the old one, so that the order stays."""
    items = {new if key == old else key: value for key, value in container.items()}
    if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
        renamed = type(container)(OrderedDict(items))  # a ParameterDict sorts what is no OrderedDict
        renamed.training = container.training
        return renamed
    return items
