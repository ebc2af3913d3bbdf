"""Stock PEFT LoRA adapters: read, checked against a base without touching it, written.

dir/adapter_config.json
dir/adapter_model.safetensors
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, load_peft_weights
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dylora_moe.config import check_mixable
from dylora_moe.experts.tensors import ExpertTensor, layer_tensors

from .files import CheckpointError, local_folder, read_json, read_tensors, replacing
from .settings import UNFIT, check_kinds

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
_PROBE = "default"  # what PeftModel.from_pretrained calls the adapter it reads: keys may carry it


class Adapter(NamedTuple):
    """A validated stock adapter: its configuration and its tensors by stock key."""

    config: LoraConfig
    tensors: dict[str, Tensor]


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
    check_kinds(LoraConfig, fields, config_file)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        assert isinstance(config, LoraConfig)
        check_mixable(config, name)
    except UNFIT as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    config.inference_mode = False  # whether an expert trains is the mixture's business
    file = folder / ADAPTER_TENSORS
    tensors = read_tensors(file)
    probe = _probe(base, config, config_file)
    layers = [(path, m) for path, m in probe.get_base_model().named_modules() if isinstance(m, LoraLayer)]
    config.fan_in_fan_out = any(getattr(layer, "fan_in_fan_out", False) for _, layer in layers)
    parts = [part for path, layer in layers for part in layer_tensors(layer, path, _PROBE)]
    expected = {part.key: tuple(part.tensor.shape) for part in parts}
    _drop_base_weights(tensors, expected, base, file)
    if set(tensors) != set(expected):
        tensors = _as_stock_peft_reads(tensors, parts, probe, base, file)
    check_tensors(tensors, expected, file, f"this {type(base).__name__}", config)
    return Adapter(config, tensors)


def _probe(base: PreTrainedModel, config: LoraConfig, file: Path) -> PeftModel:
    """What PEFT itself would make of this adapter on a base of this architecture, on no memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out with a warning; we keep what it found
        skeleton = type(base)(copy.deepcopy(base.config))
        try:
            probe = PeftModel(skeleton, copy.deepcopy(config), _PROBE, low_cpu_mem_usage=True)
            check_mixable(cast(LoraConfig, probe.peft_config[_PROBE]))  # it is rewritten for some architectures
        except UNFIT as error:
            made_for = config.base_model_name_or_path or "an unnamed base"
            raise CheckpointError(
                f"{file}: made for {made_for}, does not fit {type(base).__name__}: {error}"
            ) from error
    return probe


def _as_stock_peft_reads(
    tensors: dict[str, Tensor], parts: Sequence[ExpertTensor], probe: PeftModel, base: PreTrainedModel, file: Path
) -> dict[str, Tensor]:
    """The tensors of a file by the stock keys of the layers that `PeftModel.from_pretrained` would put them in.

    It knows the names that other versions of transformers and PEFT gave them. Where it would leave out any, the tensors
    are returned as they were.
    """
    names = {part.name: part.key for part in parts}
    config = cast(LoraConfig, probe.peft_config[_PROBE])
    try:
        mapping = getattr(base, "_checkpoint_conversion_mapping", None)
        found = load_peft_weights(str(file.parent), device="cpu", key_mapping=mapping) if mapping else dict(tensors)
        # the two steps of peft.set_peft_model_state_dict, which would copy into the probe's meta tensors
        found = convert_peft_adapter_state_dict_for_transformers(probe, config, found, _PROBE)
        found = LoraModel._remap_adapter_state_dict_for_load(probe, config, _PROBE, found)
    except UNFIT:
        return tensors
    found = {names.get(name, name): tensor for name, tensor in found.items()}
    _drop_base_weights(found, dict.fromkeys(names.values(), ()), base, file)
    return found if set(found) == set(names.values()) and len(found) >= len(tensors) else tensors


def _drop_base_weights(
    tensors: dict[str, Tensor], expected: Mapping[str, tuple], base: PreTrainedModel, file: Path
) -> None:
    """Stock PEFT writes the base's embeddings beside an adapter on them: leave them out if they are this base's."""
    own = {name.replace(".base_layer.", "."): p for name, p in base.named_parameters(remove_duplicate=False)}
    for key in sorted(set(tensors) - set(expected)):
        weight = own.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if weight is None or weight.shape[1:] != tensors[key].shape[1:]:
            continue
        if len(weight) != len(tensors[key]):
            raise CheckpointError(
                f"{file}: {key} has {len(tensors[key])} rows, this base {len(weight)}: the adapter was trained with "
                "another vocabulary; resize the base with resize_token_embeddings and give it these rows first."
            )
        if not torch.equal(tensors[key].to(weight), weight):
            raise CheckpointError(
                f"{file}: {key} differs from the base's weight, which all experts share; give the base these values "
                "first, if they are the ones to use."
            )
        del tensors[key]


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple],
    file: Path,
    what: str,
    config: LoraConfig | None = None,
) -> None:
    """Raise `CheckpointError` unless the `tensors` of a file are those `expected`, name by name and shape by shape."""
    origin = f" (made for {config.base_model_name_or_path})" if config and config.base_model_name_or_path else ""
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    both = ""
    if missing and unknown:  # names given by something else: three of them say by what
        both = f" The file has {', '.join(unknown[:3])}; expected are {', '.join(missing[:3])}."
    if missing:
        raise CheckpointError(
            f"{file}{origin}: {len(missing)} of {len(expected)} tensors missing, first {missing[0]}.{both}"
        )
    if unknown:
        raise CheckpointError(f"{file}{origin}: {len(unknown)} tensors that {what} does not have, first {unknown[0]}.")
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(
                f"{file}{origin}: {key} has shape {list(tensors[key].shape)}, {what} expects {list(shape)}."
            )
        if not bool(torch.isfinite(tensors[key]).all()):
            raise CheckpointError(f"{file}{origin}: {key} holds values that are not finite.")


def write_adapter(directory: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a stock adapter folder atomically."""
    with replacing(directory, owned=(ADAPTER_CONFIG, ADAPTER_TENSORS)) as folder:
        write_adapter_files(folder, config, tensors)


def write_adapter_files(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's two files into `folder`."""
    folder.mkdir(exist_ok=True)
    config = copy.copy(config)
    if isinstance(config.target_modules, set):  # would be written in any order
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    save_file(plain, folder / ADAPTER_TENSORS, metadata={"format": "pt"})
