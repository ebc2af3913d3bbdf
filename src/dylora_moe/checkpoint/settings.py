"""Settings as they stand in a JSON file, checked for the dataclass they are for: what does not fit is named."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import CheckpointError

UNFIT = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    ImportError,
    re.error,
)
"""What libraries raise where a setting is of the wrong kind: none of them checks all of its own."""

_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
_NEVER_NULL = ("rank_pattern", "alpha_pattern")  # PEFT's hints allow null, its code does not


def check_kinds(cls: type, values: Any, file: Path, place: str = "") -> dict[str, Any]:
    """The `values` of a JSON object, each of a kind that its field of the dataclass `cls` can be.

    Items of lists and objects are left to whoever reads them, keys that are no field as well; null stands for nothing.

    Args:
        cls: the dataclass.
        values: what the file holds.
        file: it, for messages.
        place: where in it the object stands.

    Raises:
        CheckpointError: a value of another kind.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{file}: {place or 'the file'} is {shown(values)}; expected an object.")
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, kinds = values[field.name], _kinds(hints[field.name])
        if value is None:
            fits = field.name not in _NEVER_NULL
        elif isinstance(value, bool):  # which is an int
            fits = not kinds or bool in kinds
        else:
            fits = not kinds or isinstance(value, tuple(kinds))
        if fits:
            continue
        expected = " or ".join(dict.fromkeys(_NAMES[kind] for kind in _NAMES if kind in kinds))
        key = f"{place}.{field.name}" if place else field.name
        raise CheckpointError(f"{file}: {key} is {shown(value)}; expected {expected}.")
    return dict(values)


def shown(value: Any) -> str:
    """A value of a JSON file for a message, however long or deep it is."""
    if isinstance(value, (list, dict)) and value:
        return f"{_NAMES[type(value)]} of {len(value)}"
    return "null" if value is None else f"{value!r:.60}"


def _kinds(hint: Any) -> set[type]:
    """The kinds of JSON values that a type hint takes; empty for any."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [_kinds(option) for option in arguments if option is not type(None)]
        return set().union(*options) if all(options) else set()
    if origin is typing.Literal:
        return {type(option) for option in arguments}
    if dataclasses.is_dataclass(hint):
        return {dict}
    kind = origin or hint
    if kind in (int, float):  # lora_alpha is often a float
        return {int, float}
    if isinstance(kind, type) and issubclass(kind, str):
        return {str}
    return {kind} if kind in _NAMES else set()
