"""The checkpoint format (`format_version: 1`): save, load, validate. Everything is checked before a model is touched.

dir/moe_config.json                    mixture configuration, expert order and state, base name and revision
dir/router.safetensors                 router tensors
dir/<expert>/adapter_config.json       stock PEFT
dir/<expert>/adapter_model.safetensors
dir/README.md                          model card
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .base import load_base
from .card import model_card
from .config import MoELoraConfig, check_mixable
from .experts import NEW, ROUTED, layer_tensors
from .files import CheckpointError, local_folder, read_json, read_tensors, replacing
from .router import Router
from .sharding import gather, is_sharded

if TYPE_CHECKING:
    from .model import DyLoraMoE

FORMAT_VERSION = 1
CONFIG_FILE = "moe_config.json"
ROUTER_FILE = "router.safetensors"
CARD_FILE = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"


_HUB_OPTIONS = ("token", "private", "commit_message", "revision", "commit_description", "create_pr")


class Adapter(NamedTuple):
    """A validated stock adapter: its configuration and its tensors by stock key."""

    config: LoraConfig
    tensors: dict[str, Tensor]


# ---------------------------------------------------------------------- adapters


def read_adapter(source: str | Path, base: PreTrainedModel, name: str = "adapter") -> Adapter:
    """Read a stock PEFT LoRA adapter and check that it fits `base`, without touching `base`.

    Args:
        source: a folder or a hub id.
        base: the model it is meant for.
        name: of the expert, for messages.

    Raises:
        CheckpointError: missing, damaged, pickled, not a LoRA adapter, or made for another architecture.
    """
    folder = local_folder(source, [ADAPTER_CONFIG, ADAPTER_TENSORS])
    config_file = folder / ADAPTER_CONFIG
    fields = read_json(config_file)
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{config_file}: peft_type is {fields.get('peft_type')!r}; only LORA adapters can be mixed."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        assert isinstance(config, LoraConfig)
        check_mixable(config, name)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    config.inference_mode = False  # whether an expert trains is the mixture's business
    tensors = read_tensors(folder / ADAPTER_TENSORS)
    expected, config.fan_in_fan_out = _expected_tensors(base, config, config_file)
    _drop_base_weights(tensors, expected, base, folder / ADAPTER_TENSORS)
    _check_tensors(tensors, expected, folder / ADAPTER_TENSORS, f"this {type(base).__name__}", config)
    return Adapter(config, tensors)


def _expected_tensors(base: PreTrainedModel, config: LoraConfig, file: Path) -> tuple[dict[str, tuple], bool]:
    """Shapes by stock key that PEFT itself would give this adapter on a base of this architecture (on no memory)."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out with a warning; we keep what it found
        skeleton = type(base)(copy.deepcopy(base.config))
        try:
            model = LoraModel(skeleton, {"probe": copy.deepcopy(config)}, "probe", low_cpu_mem_usage=True)
        except (ValueError, TypeError) as error:
            made_for = config.base_model_name_or_path or "an unnamed base"
            raise CheckpointError(
                f"{file}: made for {made_for}, does not fit {type(base).__name__}: {error}"
            ) from error
    layers = [(path, m) for path, m in model.model.named_modules() if isinstance(m, LoraLayer)]
    tensors = [tensor for path, layer in layers for tensor in layer_tensors(layer, path, "probe")]
    fan_in_fan_out = any(getattr(layer, "fan_in_fan_out", False) for _, layer in layers)
    return {tensor.key: tuple(tensor.tensor.shape) for tensor in tensors}, fan_in_fan_out


def _drop_base_weights(
    tensors: dict[str, Tensor], expected: Mapping[str, tuple], base: PreTrainedModel, file: Path
) -> None:
    """Stock PEFT writes the base's embeddings beside an adapter on them: leave them out if they are this base's."""
    own = {name.replace(".base_layer.", "."): p for name, p in base.named_parameters(remove_duplicate=False)}
    for key in sorted(set(tensors) - set(expected)):
        weight = own.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if weight is None or weight.shape != tensors[key].shape:
            continue
        if not torch.equal(tensors[key].to(weight), weight):
            raise CheckpointError(f"{file}: {key} differs from the base's weight, which all experts share.")
        del tensors[key]


def _check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple],
    file: Path,
    what: str,
    config: LoraConfig | None = None,
) -> None:
    origin = f" (made for {config.base_model_name_or_path})" if config and config.base_model_name_or_path else ""
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    if missing:
        raise CheckpointError(f"{file}{origin}: {len(missing)} of {len(expected)} tensors missing, first {missing[0]}.")
    if unknown:
        raise CheckpointError(f"{file}{origin}: {len(unknown)} tensors that {what} does not have, first {unknown[0]}.")
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(
                f"{file}{origin}: {key} has shape {list(tensors[key].shape)}, {what} expects {list(shape)}."
            )
        if not bool(torch.isfinite(tensors[key]).all()):
            raise CheckpointError(f"{file}{origin}: {key} holds values that are not finite.")


def read_router(file: Path, router: Router) -> dict[str, Tensor]:
    """Read a router's tensors and check that they fit `router`, without touching it."""
    tensors = read_tensors(file)
    shapes = {key: tuple(value.shape) for key, value in router.state_dict().items()}
    _check_tensors(tensors, shapes, file, "the router of the mixture")
    return tensors


def export_adapter(model: DyLoraMoE, name: str, directory: str | Path) -> None:
    """Write one expert of a mixture as a stock adapter folder."""
    write_adapter(Path(directory), *_stock_adapter(model, name, None))


def write_adapter(directory: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a stock adapter folder atomically."""
    with replacing(directory, owned=(ADAPTER_CONFIG, ADAPTER_TENSORS)) as folder:
        _write_adapter_files(folder, config, tensors)


def _write_adapter_files(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    config = copy.copy(config)
    if isinstance(config.target_modules, set):  # would be written in any order
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    save_file(plain, folder / ADAPTER_TENSORS, metadata={"format": "pt"})


def _stock_adapter(model: DyLoraMoE, name: str, gathered: Mapping[str, Tensor] | None) -> Adapter:
    config = copy.deepcopy(model.lora_config(name))
    config.inference_mode = True
    config.base_model_name_or_path = model.base_name
    config.task_type = config.task_type or "CAUSAL_LM"
    # PEFT repairs a wrong fan_in_fan_out on the layer, not in the configuration: write what is true
    config.fan_in_fan_out = any(getattr(layer, "fan_in_fan_out", False) for layer in model._layers if name in layer.r)
    parts = model.expert_tensors(name)
    return Adapter(config, {p.key: p.tensor.data if gathered is None else gathered[p.name] for p in parts})


# ---------------------------------------------------------------------- mixtures


def save_mixture(
    model: DyLoraMoE,
    directory: str | Path,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    results: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Write a mixture; see `DyLoraMoE.save_pretrained`."""
    if not kwargs.pop("safe_serialization", True):
        raise ValueError("safe_serialization=False asks for pickles; a mixture is written as safetensors only.")
    for ignored in ("save_embedding_layers", "max_shard_size", "save_function"):  # PEFT and accelerate pass them
        kwargs.pop(ignored, None)
    if state_dict is None and is_sharded(next(model.router.parameters())):
        state_dict = gather(model)  # every process must call
    if not is_main_process:
        return
    hub = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
    if kwargs:
        raise TypeError(f"save_pretrained does not know {sorted(kwargs)}.")
    directory = Path(directory)
    if state_dict is not None:
        _check_gathered(model, state_dict)
    with replacing(directory, owned={CONFIG_FILE, ROUTER_FILE, CARD_FILE, *_saved_experts(directory)}) as folder:
        for name in model.expert_names:
            _write_adapter_files(folder / name, *_stock_adapter(model, name, state_dict))
        router = model.router.state_dict()
        if state_dict is not None:
            router = {key: state_dict[f"router.{key}"] for key in router}
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in router.items()}, folder / ROUTER_FILE)
        (folder / CARD_FILE).write_text(model_card(model, results), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(
            json.dumps(_describe(model), indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    if push_to_hub:
        upload(directory, repo_id or directory.name, **hub)


def _check_gathered(model: DyLoraMoE, state_dict: Mapping[str, Tensor]) -> None:
    parts = [(part.name, part.tensor) for expert in model.expert_names for part in model.expert_tensors(expert)]
    for name, tensor in [*parts, *((f"router.{key}", value) for key, value in model.router.state_dict().items())]:
        if name not in state_dict:
            raise CheckpointError(
                f"state_dict: {name} is missing. It must hold all tensors of experts and router (FULL_STATE_DICT)."
            )
        if state_dict[name].shape != tensor.shape:
            raise CheckpointError(
                f"state_dict: {name} has shape {list(state_dict[name].shape)}, expected {list(tensor.shape)}."
            )


def upload(
    directory: Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    commit_description: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Upload a saved mixture to the Hugging Face hub; returns the commit's address."""
    api = HfApi(token=token)
    further = {"commit_description": commit_description, "create_pr": create_pr}
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        # the folder may also hold a trainer's states and logs
        allow_patterns=[CONFIG_FILE, ROUTER_FILE, CARD_FILE, *(f"{name}/*" for name in _saved_experts(directory))],
        commit_message=commit_message or "Upload mixture",
        revision=revision,
        **{key: value for key, value in further.items() if value is not None},
    )


def _saved_experts(directory: Path) -> set[str]:
    """Names of the experts of the mixture in `directory`, if there is one."""
    try:
        return {entry["name"] for entry in read_json(directory / CONFIG_FILE)["experts"]}
    except (CheckpointError, KeyError, TypeError):
        return set()


def load_mixture(
    cls: type[DyLoraMoE],
    directory: str | Path,
    base: PreTrainedModel | str | None,
    trainable: bool,
    base_kwargs: dict[str, Any],
) -> DyLoraMoE:
    """Load a mixture; see `DyLoraMoE.from_pretrained`."""
    folder = local_folder(directory, [CONFIG_FILE])
    file = folder / CONFIG_FILE
    fields = read_json(file)
    config, states, frozen = _parse_description(fields, file)
    name = fields.get("base_model_name_or_path")
    if base is None:
        if not name:
            raise CheckpointError(f"{file} names no base; pass base=... (a loaded model, its name or folder).")
        base_kwargs = {**({"revision": fields["base_revision"]} if fields.get("base_revision") else {}), **base_kwargs}
    model, given_name = load_base(str(name) if base is None else base, base_kwargs)
    experts = {expert: read_adapter(folder / expert, model, expert) for expert in states}
    with torch.device("meta"):
        width = model.config.get_text_config().hidden_size
        router = Router(width, len(states) + config.route_to_base, config.router_type, config.router_hidden_size)
    router_tensors = read_router(folder / ROUTER_FILE, router)
    mixture = cls(model, config, {k: a.config for k, a in experts.items()}, base_name=given_name or name)
    for expert, adapter in experts.items():
        mixture._load_expert(expert, adapter.tensors, keep_dtype=True)
    for key, parameter in mixture.router.named_parameters():
        parameter.data = router_tensors[key].to(parameter.device)  # in the dtype it was saved in
    mixture.expert_states.update(states)
    for expert in states:
        if expert in frozen or not trainable:
            mixture.freeze_expert(expert)
    mixture.router.requires_grad_(trainable)
    mixture.eval()
    return mixture


def _describe(model: DyLoraMoE) -> dict[str, Any]:
    from . import __version__

    config, default = model.moe_config.to_dict(), MoELoraConfig().to_dict()
    lora = {f.name for f in dataclasses.fields(LoraConfig) if f.name in config}
    kept = {key: value for key, value in config.items() if key not in lora or value != default[key]}
    return {
        "format_version": FORMAT_VERSION,
        "dylora_moe_version": __version__,
        "base_model_name_or_path": model.base_name,
        "base_revision": getattr(model.config, "_commit_hash", None),
        "experts": [
            {"name": name, "state": state, "frozen": name in model._frozen_experts}
            for name, state in model.expert_states.items()
        ],
        "config": kept,
    }


def _parse_description(fields: dict[str, Any], file: Path) -> tuple[MoELoraConfig, dict[str, str], set[str]]:
    version = fields.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{file}: format_version is {version!r}; not a mixture's configuration.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format_version {version} is newer than {FORMAT_VERSION}, the newest this version of dylora-moe "
            "reads; upgrade dylora-moe."
        )
    try:
        experts = {entry["name"]: entry for entry in fields["experts"]}
        states = {name: entry["state"] for name, entry in experts.items()}
        config = MoELoraConfig(**fields["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} does not describe a mixture: {type(error).__name__} {error}.") from error
    if list(states) != config.expert_names or any(state not in (NEW, ROUTED) for state in states.values()):
        raise CheckpointError(f"{file}: experts {states} do not agree with expert_names {config.expert_names}.")
    if ROUTED not in states.values():
        raise CheckpointError(f"{file}: no expert is {ROUTED!r}, so no token could be routed: {states}.")
    return config, states, {name for name, entry in experts.items() if entry.get("frozen")}
