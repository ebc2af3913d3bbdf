"""The checkpoint format: save, load, validate. Everything is checked before a model is touched.

dir/moe_config.json                    mixture configuration, expert order and state, base name, revision and rows
dir/router.safetensors                 router tensors
dir/<expert>/adapter_config.json       stock PEFT
dir/<expert>/adapter_model.safetensors
dir/skills.safetensors, skills.json    the library of skills, if anything was taught
dir/vocabulary.safetensors             rows that the base's embeddings and head gained since it was loaded, if any
dir/README.md                          model card

`format_version` is 1 where an older version of this package reads the checkpoint rightly, 2 where the base is resized,
a skill was taught, the router is computed from skills or the granularity is cumulative.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dylora_moe.base.loading import load_base
from dylora_moe.base.placement import Placement
from dylora_moe.config import MoELoraConfig, check_expert_name
from dylora_moe.experts.expert_set import NEW, ROUTED
from dylora_moe.routing.granularity import GRANULARITIES
from dylora_moe.routing.router import ROUTERS, Router
from dylora_moe.skills.library import SkillLibrary
from dylora_moe.version import __version__

from .adapters import ADAPTER_TENSORS, Adapter, check_tensors, read_adapter, write_adapter_files
from .files import CheckpointError, local_folder, read_json, read_tensors, replacing
from .settings import UNFIT, check_kinds, shown
from .skills import SKILL_FILES, read_skills, write_skills
from .vocabulary import Vocabulary, resize_as_saved, row_shapes, rows_of

FORMAT_VERSION = 2
CONFIG_FILE = "moe_config.json"
ROUTER_FILE = "router.safetensors"
VOCABULARY_FILE = "vocabulary.safetensors"
CARD_FILE = "README.md"
OWN_FILES = (CONFIG_FILE, ROUTER_FILE, VOCABULARY_FILE, CARD_FILE, *SKILL_FILES)
"""What is replaced or removed in a folder that a mixture is saved to, beside the folders of its experts."""
LATER_FIELDS = {"policy": "top_k"}
"""Fields that came later; left out where they have this value, so that older versions read the file."""


class Description(NamedTuple):
    """What `moe_config.json` says.

    Attributes:
        config: the configuration.
        states: expert → `"routed"` or `"new"`, in order.
        frozen: experts that do not train.
        base_name, base_revision: of the base, if they were known.
        vocabulary: rows of its embeddings.
        chat: whether prompts go through the base's chat template; None if nobody said.
        skills: whether there is a library of skills.
    """

    config: MoELoraConfig
    states: dict[str, str]
    frozen: set[str]
    base_name: str | None
    base_revision: str | None
    vocabulary: Vocabulary = Vocabulary()
    chat: bool | None = None
    skills: bool = False


@dataclass(frozen=True)
class MixtureState:
    """A mixture as plain data: what a checkpoint holds and an export needs.

    Attributes:
        description: configuration, experts and base.
        experts: name → stock configuration and tensors by stock key, in order.
        router: tensors by name.
        added_rows: what the base's embeddings and head gained since it was loaded by its name.
        skills: what it was taught.
    """

    description: Description
    experts: dict[str, Adapter]
    router: dict[str, Tensor]
    added_rows: dict[str, Tensor] = field(default_factory=dict)
    skills: SkillLibrary = field(default_factory=SkillLibrary)


def write_mixture(state: MixtureState, directory: Path, card: str, for_trainer: bool = False) -> None:
    """Write a checkpoint folder atomically, with the text of its model card.

    Args:
        state: the mixture.
        directory: the folder.
        card: the text of its model card.
        for_trainer: beside it write an adapter file without tensors, by which transformers' Trainer, which looks into
            the folder only, knows that it holds adapters.
    """
    owned = {*OWN_FILES, *saved_experts(directory), *((ADAPTER_TENSORS,) if for_trainer else ())}
    with replacing(directory, owned) as folder:
        if for_trainer:
            save_file({}, folder / ADAPTER_TENSORS, metadata={"format": "pt", "see": CONFIG_FILE})
        for name, adapter in state.experts.items():
            write_adapter_files(folder / name, adapter.config, adapter.tensors)
        save_file(_plain(state.router), folder / ROUTER_FILE)
        if state.added_rows:
            save_file(_plain(state.added_rows), folder / VOCABULARY_FILE)
        if state.skills:
            write_skills(folder, state.skills)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        text = json.dumps(_fields(state.description), indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def read_description(directory: str | Path) -> tuple[Path, Description]:
    """The local folder of a checkpoint (a hub id is downloaded), and what its `moe_config.json` says."""
    folder = local_folder(directory, [CONFIG_FILE])
    return folder, _parse(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)


def load_base_of(
    folder: Path, description: Description, base: PreTrainedModel | str | None, base_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, str | None]:
    """The base of the checkpoint in `folder`, with as many rows as it had, and the name it is saved under, if any.

    Args:
        folder: of the checkpoint.
        description: what it says.
        base: overrides the base named there; a loaded one is taken as it is.
        base_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: no base is named, or the one that is cannot be loaded.
    """
    if base is None:
        if not description.base_name:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} names no base; pass base=... (a loaded model, its name or folder)."
            )
        revision = {"revision": description.base_revision} if description.base_revision else {}
        base_kwargs = {**revision, **base_kwargs}
    try:
        model, name = load_base(base or description.base_name or "", base_kwargs)
    except OSError as error:
        if base is not None:
            raise
        raise moved_base(folder, description, error) from error
    if model is not base:
        resize_as_saved(model, description.vocabulary)
    return model, name


def moved_base(folder: Path, description: Description, error: Exception) -> CheckpointError:
    """What to say where the base that a checkpoint names is not to be had."""
    return CheckpointError(
        f"{folder / CONFIG_FILE} names the base {description.base_name}, which cannot be loaded: {error} If it has "
        "moved, say where it is: base=... (a loaded model, its name or folder), --base on the command line, base.model "
        "in a recipe."
    )


def read_mixture(folder: Path, description: Description, base: PreTrainedModel) -> MixtureState:
    """The checkpoint in `folder`, every tensor of it checked against `base` without touching it.

    Raises:
        CheckpointError: a missing, truncated, mis-shaped, pickled or unknown file.
    """
    router = empty_router(folder, description, base)
    added_rows = read_vocabulary(folder, description, base)
    experts = {name: read_adapter(folder / name, base, name) for name in description.states}
    skills = read_library(folder, description, base.config.get_text_config().hidden_size)
    return MixtureState(description, experts, read_router(folder / ROUTER_FILE, router), added_rows, skills)


def empty_router(folder: Path, description: Description, base: PreTrainedModel) -> Router:
    """A router without values (on the device `meta`) of the kind that the checkpoint in `folder` describes.

    Raises:
        CheckpointError: one that does not fit `base`.
    """
    config, num_layers = description.config, Placement.of(base).num_layers
    outputs, width = len(description.states) + config.route_to_base, base.config.get_text_config().hidden_size
    try:
        config.resolve_router_layer(num_layers)
        with torch.device("meta"):
            return Router(width, outputs, config.router_type, config.router_hidden_size)
    except UNFIT as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: does not fit {type(base).__name__}: {error}") from error


def read_library(folder: Path, description: Description, width: int) -> SkillLibrary:
    """The skills of a checkpoint, empty if it has none, checked against its experts and the base's width D.

    Raises:
        CheckpointError: a file that is missing, damaged or of another mixture.
    """
    return read_skills(folder, list(description.states), width) if description.skills else SkillLibrary()


def read_vocabulary(folder: Path, description: Description, base: PreTrainedModel) -> dict[str, Tensor]:
    """The rows that a checkpoint adds to the embeddings of its base; checks that `base` has as many as it had.

    Raises:
        CheckpointError: a base of another size, or a file that is missing or damaged.
    """
    saved, rows = description.vocabulary, rows_of(base)
    if saved.rows is not None and rows != saved.rows:
        was = f"its base had {saved.rows} rows in its embeddings"
        if saved.resized:
            was += f" ({saved.named_rows} of {description.base_name}, which was resized after it was loaded)"
        remedy = f"call base.resize_token_embeddings({saved.rows}) first"
        if saved.resized:
            remedy += ", or pass the base's name: the rows are then added and filled from the checkpoint"
        raise CheckpointError(f"{folder / CONFIG_FILE}: when it was saved, {was}; this base has {rows}: {remedy}.")
    if not saved.added:
        return {}
    tensors = read_tensors(folder / VOCABULARY_FILE)
    check_tensors(tensors, row_shapes(base, saved.added), folder / VOCABULARY_FILE, f"this {type(base).__name__}")
    return tensors


def read_router(file: Path, router: Router) -> dict[str, Tensor]:
    """Read a router's tensors and check that they fit `router`, without touching it."""
    tensors = read_tensors(file)
    shapes = {key: tuple(value.shape) for key, value in router.state_dict().items()}
    check_tensors(tensors, shapes, file, "the router of the mixture")
    return tensors


def check_gathered(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless `state_dict` holds all of the `expected` tensors, in their shapes."""
    for name, tensor in expected.items():
        if name not in state_dict:
            raise CheckpointError(
                f"state_dict: {name} is missing. It must hold all tensors of experts and router (FULL_STATE_DICT)."
            )
        if state_dict[name].shape != tensor.shape:
            raise CheckpointError(
                f"state_dict: {name} has shape {list(state_dict[name].shape)}, expected {list(tensor.shape)}."
            )


def saved_experts(directory: Path) -> set[str]:
    """Names of the experts of the mixture in `directory`, if there is one."""
    try:
        states, _ = _parse_experts(read_json(directory / CONFIG_FILE).get("experts"), directory / CONFIG_FILE)
        for name in states:
            check_expert_name(name)  # these folders will be replaced: none may lie elsewhere
        return set(states)
    except ValueError:
        return set()


def check_free(folder: Path) -> None:
    """Raise `ValueError` if there is a mixture in `folder`, or it is that of an expert of one."""
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} holds a mixture already; choose another folder.")
    place = folder.resolve()
    if place.name in saved_experts(place.parent):
        raise ValueError(f"{folder} is an expert's folder of the mixture in {place.parent}; choose another folder.")


def check_room(folder: Path) -> None:
    """Raise `ValueError` as `check_free`, or if a mixture saved to `folder` would replace a file of somebody else's."""
    check_free(folder)
    for file in (folder / name for name in OWN_FILES):
        if file.exists():
            raise ValueError(
                f"{file} is in the way: a mixture has a file of this name. Move it, or choose another folder."
            )


def _fields(description: Description) -> dict[str, Any]:
    config, default = description.config.to_dict(), MoELoraConfig().to_dict()
    lora = {f.name for f in dataclasses.fields(LoraConfig) if f.name in config}
    kept = {key: value for key, value in config.items() if key not in lora or value != default[key]}
    kept = {key: value for key, value in kept.items() if key not in LATER_FIELDS or value != LATER_FIELDS[key]}
    vocabulary, computed = description.vocabulary, ROUTERS[description.config.router_type].computed
    cumulative = GRANULARITIES[description.config.granularity].cumulative
    rows = {"vocabulary_rows": vocabulary.rows, "base_vocabulary_rows": vocabulary.named_rows}
    if not vocabulary.resized:
        del rows["base_vocabulary_rows"]
    return {
        "format_version": 2 if vocabulary.resized or description.skills or computed or cumulative else 1,
        **rows,
        "dylora_moe_version": __version__,
        "base_model_name_or_path": description.base_name,
        "base_revision": description.base_revision,
        "experts": [
            {"name": name, "state": state, "frozen": name in description.frozen}
            for name, state in description.states.items()
        ],
        "config": kept,
        **({} if description.chat is None else {"chat": description.chat}),
        **({"skills": True} if description.skills else {}),
    }


def _parse(fields: dict[str, Any], file: Path) -> Description:
    version = fields.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{file}: format_version is {version!r}; not a mixture's configuration.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format_version {version} is newer than {FORMAT_VERSION}, the newest this version of dylora-moe "
            "reads; upgrade dylora-moe."
        )
    states, frozen = _parse_experts(fields.get("experts"), file)
    settings = check_kinds(MoELoraConfig, fields.get("config"), file, "config")
    try:
        config = MoELoraConfig(**settings)
    except UNFIT as error:
        raise CheckpointError(f"{file} does not describe a mixture: config: {error}.") from error
    if list(states) != config.expert_names or any(state not in (NEW, ROUTED) for state in states.values()):
        raise CheckpointError(f"{file}: experts {states} do not agree with expert_names {config.expert_names}.")
    if ROUTED not in states.values() and not ROUTERS[config.router_type].computed:
        raise CheckpointError(f"{file}: no expert is {ROUTED!r}, so no token could be routed: {states}.")
    for key in ("base_model_name_or_path", "base_revision"):
        if not isinstance(fields.get(key), str | None):
            raise CheckpointError(f"{file}: {key} is {shown(fields[key])}; expected text.")
    for key in ("vocabulary_rows", "base_vocabulary_rows"):
        rows = fields.get(key)
        if rows is not None and (type(rows) is not int or rows < 1):
            raise CheckpointError(f"{file}: {key} is {shown(rows)}; expected a positive integer.")
    vocabulary = Vocabulary(fields.get("vocabulary_rows"), fields.get("base_vocabulary_rows"))
    base, revision = fields.get("base_model_name_or_path"), fields.get("base_revision")
    chat = fields.get("chat")
    if chat is not None and not isinstance(chat, bool):
        raise CheckpointError(f"{file}: chat is {shown(chat)}; expected true or false.")
    skills = fields.get("skills", False)
    if not isinstance(skills, bool):
        raise CheckpointError(f"{file}: skills is {shown(skills)}; expected true or false.")
    return Description(config, states, frozen, base or None, revision or None, vocabulary, chat, skills)


def _parse_experts(entries: Any, file: Path) -> tuple[dict[str, str], set[str]]:
    """The states of the experts by name, in order, and which are frozen."""
    if not isinstance(entries, list):
        raise CheckpointError(f"{file}: experts is {shown(entries)}; expected a list.")
    kinds = {"name": str, "state": str, "frozen": bool}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise CheckpointError(f"{file}: experts[{position}] is {shown(entry)}; expected an object.")
        for key, kind in kinds.items():
            if not isinstance(entry.get(key, False if kind is bool else None), kind):
                raise CheckpointError(
                    f"{file}: experts[{position}].{key} is {shown(entry.get(key))}; expected "
                    f"{'true or false' if kind is bool else 'text'}."
                )
    return {e["name"]: e["state"] for e in entries}, {e["name"] for e in entries if e.get("frozen")}
