"""Recipes: one typed YAML file that says which base, which experts, which data and how to train them.

    base:    {model: embedded}
    experts: {sql: {data: {train: sql.jsonl, test: sql-test.jsonl}}, json: {data: {skill: json}}}
    mixture: {r: 8, lora_alpha: 16, top_k: 2}           # fields of MoELoraConfig
    train:   {method: joint, max_steps: 120}            # our keys and any field of trl.SFTConfig
    eval:    {metric: exact_match}
    output:  runs/mixture
    seed:    0

Unknown keys are errors that name the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from dylora_moe.data.sources import files_of
from dylora_moe.schema import RecipeError, build, check_keys, check_mapping, check_value, join, nearest, parse_yaml

from .bounds import check_arguments
from .combinations import check_combinations
from .sections import BaseRecipe, ExpertRecipe, Recipe, TrainRecipe

_OWN_TRAIN_KEYS = {f.name for f in dataclasses.fields(TrainRecipe)} - {"arguments"}
# Settings of the libraries that a recipe decides elsewhere, and where.
MIXTURE_ELSEWHERE = {
    "num_experts": "it follows from `experts`",
    "expert_names": "the keys of `experts` are the names",
    "base_model_name_or_path": "set `base.model`",
    "revision": "set `base.revision`",
}
MIXTURE_INTERNAL = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "runtime_config",
}
OF_A_DATASET = (
    *("path", "name", "split", "test_split", "revision"),
    *("columns", "template", "test_columns", "test_template", "filter"),
)
"""Keys of `data` that say where a data set's rows are and what they look like."""
TRAIN_ELSEWHERE = {
    "output_dir": "set `output`",
    "seed": "set the top-level `seed`",
    "resume_from_checkpoint": "resume is asked for on the command line",
    "dataset_text_field": "set `experts.NAME.data.columns: {text: …}`",
    "dataset_kwargs": "the data is handed over tokenised",
    "assistant_only_loss": "of `messages` only the assistant's turns are learnt anyway",
    "chat_template_path": "set `base.chat_template`",
    "eos_token": "it is the base's",
}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file; relative data paths in it are looked up beside it first, then in the current folder.
        overrides: `a.b=value` texts, see `apply_overrides`.

    Raises:
        RecipeError: the file is missing or not valid YAML, a key is unknown, a value has the wrong type or
            cannot be used, or a data file does not exist.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error}") from error
    data = check_mapping(parse_yaml(text, str(path)), str(path))
    return parse_recipe(apply_overrides(data, overrides), folder=path.parent)


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with every `a.b=value` put in place; values are read as YAML.

    `experts.NAME.data.train=FILE` takes the place of a `path`: what says where in that data set the rows lie, and how
    their columns are called, goes with it.

    Raises:
        RecipeError: an override without `=` or key, one that descends into something that is no mapping, or one of an
            expert that there is not (`experts.NAME={…}` as a whole adds one).
    """
    result = deepcopy(dict(data))
    split = [(override, *_split_override(override)) for override in overrides]
    for _, keys, _ in split:
        if len(keys) == 4 and (keys[0], *keys[2:]) == ("experts", "data", "train"):
            _leave_dataset(result, keys[1])
    for override, keys, text in split:
        experts = result.get("experts")
        if keys[0] == "experts" and len(keys) > 2 and experts and isinstance(experts, dict) and keys[1] not in experts:
            known = ", ".join(map(str, experts))
            raise RecipeError(
                f"override {override!r}: no expert {keys[1]!r}.{nearest(keys[1], map(str, experts))} Experts: {known}."
            )
        node = result
        for depth, key in enumerate(keys[:-1], start=1):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
            if not isinstance(node, dict):
                raise RecipeError(f"override {override!r}: {'.'.join(keys[:depth])} is {node!r}, not a mapping.")
        node[keys[-1]] = parse_yaml(text, f"override {override!r}")
    return result


def _split_override(override: str) -> tuple[list[str], str]:
    place, equals, text = override.partition("=")
    keys = place.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {override!r}: expected KEY.KEY=VALUE, for example train.max_steps=5.")
    return keys, text


def _leave_dataset(recipe: dict[str, Any], name: str) -> None:
    """Take out of an expert's data what goes with its `path`."""
    experts = recipe.get("experts")
    expert = experts.get(name) if isinstance(experts, dict) else None
    data = expert.get("data") if isinstance(expert, dict) else None
    if isinstance(data, dict) and data.get("path") is not None:
        for key in OF_A_DATASET:
            data.pop(key, None)


def parse_recipe(data: Mapping[str, Any], folder: str | Path = ".") -> Recipe:
    """Check plain values and make a `Recipe` of them; `folder` is where relative data paths are looked up first.

    Raises:
        RecipeError: as `load_recipe`.
    """
    data = check_mapping(data, "")
    if "train" in data:
        data["train"] = _gather_arguments(check_mapping(data["train"], "train"))
    recipe = build(Recipe, data)
    experts = {name: _find_data(name, expert, Path(folder)) for name, expert in recipe.experts.items()}
    start = recipe.start and _found_folder(recipe.start, Path(folder))
    base = _found_base(recipe.base, Path(folder))
    recipe = dataclasses.replace(recipe, experts=experts, start=start, base=base)
    # what the libraries know comes last, because loading them takes seconds
    _check_trainer_fields(recipe.train.arguments)
    _check_mixture(recipe)
    check_arguments(recipe.train.arguments)
    check_combinations(recipe)
    return recipe


def _gather_arguments(train: dict[str, Any]) -> dict[str, Any]:
    """`train` with the fields of SFTConfig moved under `arguments`."""
    others = {key: value for key, value in train.items() if key not in _OWN_TRAIN_KEYS}
    return {**{key: value for key, value in train.items() if key in _OWN_TRAIN_KEYS}, "arguments": others}


def _check_trainer_fields(arguments: Mapping[str, Any]) -> None:
    if not arguments:
        return
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise RecipeError("train: TRL is missing; pip install 'dylora-moe[train]'.") from error
    _check_library_fields(arguments, SFTConfig, "train", TRAIN_ELSEWHERE, own=_OWN_TRAIN_KEYS)


def _check_mixture(recipe: Recipe) -> None:
    from peft import LoraConfig

    from dylora_moe.config import CHANGEABLE, MoELoraConfig

    _check_library_fields(
        recipe.mixture, MoELoraConfig, "mixture", MIXTURE_ELSEWHERE, hidden=MIXTURE_INTERNAL, parent=LoraConfig
    )
    if recipe.start is not None:
        for key in recipe.mixture:
            if key not in CHANGEABLE:
                raise RecipeError(
                    f"mixture.{key}: decided by the mixture in `start`; free are {', '.join(sorted(CHANGEABLE))}."
                )
        return
    config = recipe.mixture_config()
    for name, expert in recipe.experts.items():
        path = f"experts.{name}.lora"
        _check_library_fields(expert.lora, LoraConfig, path, MIXTURE_ELSEWHERE, hidden=MIXTURE_INTERNAL)
        try:
            config.expert_config(**expert.lora)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{path}: {error}") from error


def library_fields(cls: type, without: set[str]) -> set[str]:
    """The names of a dataclass' fields that can be given."""
    return {f.name for f in dataclasses.fields(cls) if f.init} - without


def _check_library_fields(
    values: Mapping[str, Any],
    cls: type,
    path: str,
    elsewhere: Mapping[str, str],
    own: Iterable[str] = (),
    hidden: Iterable[str] = (),
    parent: type | None = None,
) -> None:
    """Check keys and types of `values` against the dataclass `cls` of a library, without making an instance.

    Args:
        values: what the recipe gives.
        cls: the dataclass.
        path: of the section.
        elsewhere: fields that a recipe sets in another place, and where.
        own: further keys of the section.
        hidden: fields that no recipe sets.
        parent: the library's class, where `cls` is ours and adds to it.
    """
    for key in values:
        if key in elsewhere:
            raise RecipeError(f"{join(path, key)}: not set here; {elsewhere[key]}.")
    fields = library_fields(cls, {*elsewhere, *hidden})
    inherited = fields & library_fields(parent, set()) if parent else fields
    owner = parent or cls
    check_keys(
        values, (fields - inherited) | set(own), path, inherited, f"{owner.__module__.split('.')[0]}.{owner.__name__}"
    )
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if not (key == "fsdp" and value is True):  # allowed, though its type hint says otherwise
            check_value(value, hints[key], join(path, key))


def _find_data(name: str, expert: ExpertRecipe, folder: Path) -> ExpertRecipe:
    """`expert` with the paths of its data resolved; a `path` that is no folder here is left to be a hub id."""
    found = {}
    if expert.adapter is not None:
        expert = dataclasses.replace(expert, adapter=_found_folder(expert.adapter, folder))
    if expert.data is None:
        return expert
    for key in ("train", "test"):
        value = getattr(expert.data, key)
        if isinstance(value, str | list):
            files = [file for entry in ([value] if isinstance(value, str) else value) for file in _files(folder, entry)]
            if missing := [entry for entry, found_file in files if found_file is None]:
                place = f"experts.{name}.data.{key}"
                raise RecipeError(f"{place}: no file {missing[0]!r}; looked for {_tried(folder, missing[0])}.")
            paths = [str(file) for _, file in files]
            found[key] = paths[0] if isinstance(value, str) and len(paths) == 1 else paths
    if (value := expert.data.path) is not None:
        existing = [path for path in _candidates(folder, value) if path.exists()]
        if existing and not existing[0].is_dir():
            raise RecipeError(f"experts.{name}.data.path: {value!r} is a file; give it as `train`.")
        if existing:
            found["path"] = str(existing[0].resolve())
        elif value.startswith(("/", ".", "~")):
            raise RecipeError(f"experts.{name}.data.path: no folder {value!r}; looked for {_tried(folder, value)}.")
    return dataclasses.replace(expert, data=dataclasses.replace(expert.data, **found))


def _found_base(base: BaseRecipe, folder: Path) -> BaseRecipe:
    if base.chat_template is not None:
        found = next((path for path in _candidates(folder, base.chat_template) if path.is_file()), None)
        if found is None:
            tried = _tried(folder, base.chat_template)
            raise RecipeError(f"base.chat_template: no file {base.chat_template!r}; looked for {tried}.")
        base = dataclasses.replace(base, chat_template=str(found.resolve()))
    if base.model is None or base.model == "embedded":
        return base
    found = _found_folder(base.model, folder)
    if base.model.startswith(("/", ".", "~")) and not Path(found).is_dir():
        raise RecipeError(f"base.model: no folder {base.model!r}; looked for {_tried(folder, base.model)}.")
    return dataclasses.replace(base, model=found)


def _files(folder: Path, entry: str) -> list[tuple[str, Path | None]]:
    """The files that a name or a pattern stands for beside the recipe, else here."""
    for candidate in _candidates(folder, entry):
        if files := [Path(file) for file in files_of(str(candidate)) if Path(file).is_file()]:
            return [(entry, file.resolve()) for file in files]
    return [(entry, None)]


def _candidates(folder: Path, value: str) -> list[Path]:
    return [folder / Path(value).expanduser(), Path(value).expanduser()]


def _tried(folder: Path, value: str) -> str:
    return " and ".join(dict.fromkeys(str(path.absolute()) for path in _candidates(folder, value)))


def _found_folder(value: str, folder: Path) -> str:
    """The folder `value`, looked up beside the recipe and then here; a name that is none is left as a hub id."""
    found = [path for path in _candidates(folder, value) if path.is_dir()]
    return str(found[0].resolve()) if found else value
