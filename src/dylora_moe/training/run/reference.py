"""The reference of a recipe's keys, made from the dataclasses:

python -m dylora_moe.training.run.reference > docs/recipe-reference.md
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

from peft import LoraConfig
from trl import SFTConfig

from dylora_moe.config import MoELoraConfig
from dylora_moe.data.section import DataRecipe
from dylora_moe.schema import choices, describe
from dylora_moe.training.recipe.methods import Way
from dylora_moe.training.recipe.recipe import MIXTURE_ELSEWHERE, MIXTURE_INTERNAL, TRAIN_ELSEWHERE, library_fields
from dylora_moe.training.recipe.sections import BaseRecipe, EvalRecipe, ExpertRecipe, Recipe, TrainRecipe, TwoPhase

from .arguments import DEFAULT_ARGUMENTS

Row = tuple[str, str, str, str]
"""Key, type, default and meaning."""
_HEAD = """# Keys of a recipe

Every key with its type, default and meaning, made from the dataclasses by
`python -m dylora_moe.training.run.reference > docs/recipe-reference.md`. [training.md](training.md) and
[data.md](data.md) say what they are for.
"""
_CONTEXT = "the base's context"


def reference_page() -> str:
    """The page, in Markdown."""
    own = library_fields(MoELoraConfig, {*MIXTURE_ELSEWHERE, *MIXTURE_INTERNAL})
    lora = own & library_fields(LoraConfig, set())
    trainer = library_fields(SFTConfig, {*TRAIN_ELSEWHERE, "gradient_checkpointing", "gradient_checkpointing_kwargs"})
    train = {f.name for f in dataclasses.fields(TrainRecipe)} - {"arguments"}
    versions = f"peft {version('peft')}, trl {version('trl')} and transformers {version('transformers')}"
    sections: list[tuple[str, str, Iterator[Row]]] = [
        ("The recipe", "", _own(Recipe)),
        ("base", "", _own(BaseRecipe)),
        ("experts.NAME", "", _own(ExpertRecipe)),
        ("experts.NAME.data", "", _own(DataRecipe)),
        ("mixture", "Fields of `MoELoraConfig`:", _own(MoELoraConfig, own - lora)),
        (
            "mixture, and experts.NAME.lora",
            f"Fields of `peft.LoraConfig`, as of {versions}:",
            _library(LoraConfig, lora),
        ),
        ("train", "", _own(TrainRecipe, train, Way)),
        ("train.two_phase", "", _own(TwoPhase)),
        ("train, further", f"Fields of `trl.SFTConfig`, as of {versions}:", _library(SFTConfig, trainer)),
        ("eval", "", _own(EvalRecipe)),
    ]
    return _HEAD + "".join(_section(*section) for section in sections)


def _section(title: str, note: str, rows: Iterator[Row]) -> str:
    lines = [f"\n## {title}\n", *([f"{note}\n"] if note else []), "| key | type | default | meaning |"]
    lines += ["| --- | --- | --- | --- |"]
    lines += [f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(text)} |" for key, kind, default, text in rows]
    return "\n".join(lines) + "\n"


def _own(cls: Any, names: set[str] | None = None, parent: type | None = None) -> Iterator[Row]:
    """The fields of a dataclass of ours, with the words of its docstring."""
    meanings = {**documented(parent), **documented(cls)}
    yield from _rows(cls, names, lambda field: meanings[field.name])


def _library(cls: Any, names: set[str]) -> Iterator[Row]:
    """The fields of a library's dataclass, with the first sentence of its help."""
    yield from _rows(cls, names, lambda field: _sentence(str(field.metadata.get("help", ""))))


def _rows(cls: Any, names: set[str] | None, meaning: Callable[[Any], str]) -> Iterator[Row]:
    hints = typing.get_type_hints(cls)
    ours: Mapping[str, Any] = DEFAULT_ARGUMENTS if cls is SFTConfig else {}
    for field in dataclasses.fields(cls):
        if names is not None and field.name not in names:
            continue
        kind = choices(field) or describe(hints[field.name])
        default = f"`{ours[field.name]!r}`" if field.name in ours else _default(field)
        if cls is SFTConfig and field.name == "max_length":
            default = _CONTEXT
        yield field.name, kind, default, meaning(field)


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = getattr(field.default, "value", field.default)  # of an enumeration
        return "" if value is None else f"`{value!r}`"
    if field.default_factory is dataclasses.MISSING:
        return "must be given"
    value = field.default_factory()
    return "" if not value or dataclasses.is_dataclass(value) else f"`{value!r}`"


def documented(cls: type | None) -> dict[str, str]:
    """Argument → its words in the docstring of `cls`."""
    text = (cls.__doc__ or "") if cls else ""
    _, _, arguments = text.partition("Args:\n")
    arguments = arguments.split("\n\n")[0]
    found: dict[str, str] = {}
    for names, words in re.findall(r"^ {8}([\w, ]+): (.*(?:\n {9,}.*)*)", arguments, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(words.split()))
    return found


def _sentence(text: str) -> str:
    return re.split(r"(?<=[.!])\s+(?=[A-Z`'])", " ".join(text.split()))[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference_page())
