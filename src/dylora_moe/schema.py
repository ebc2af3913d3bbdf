"""Strict reading of YAML: plain values to typed dataclasses, every mistake named with its place and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")

_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
_CHOICES = "choices"  # key of a field's metadata


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, its value and what was expected."""


class _StrictLoader(yaml.SafeLoader):
    """YAML where `1e-3` is a number and `no` is text, as in YAML 1.2, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|false)\Z", re.IGNORECASE), list("tTfF")
)


def parse_yaml(text: str, source: str) -> Any:
    """The value of one YAML document.

    Args:
        text: the document.
        source: what to call it in an error, for example the file's path.

    Raises:
        RecipeError: it is not valid YAML, or a mapping gives a key twice; the message has line and column.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError as error:
        raise RecipeError(f"{source}: nested too deeply to be read.") from error
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that cannot be one is a ValueError
        raise RecipeError(f"{source}: not valid YAML: {error}") from error


def choice(table: Iterable[str], default: str) -> Any:
    """A dataclass field whose value is one of the names in `table`; `build` refuses others."""
    return dataclasses.field(default=default, metadata={_CHOICES: tuple(table)})


def choices(field: Any) -> str:
    """The names that a field made by `choice` can have, in words; empty for any other field."""
    return describe(Literal[field.metadata[_CHOICES]]) if _CHOICES in field.metadata else ""


def build(cls: type[T], value: Any, path: str = "") -> T:
    """An instance of the dataclass `cls` from a mapping, every key and type checked, nested classes included.

    Args:
        cls: a dataclass; fields without a default must be given.
        value: the mapping; `None` (an empty YAML section) counts as empty.
        path: where the mapping stands, for example `experts.sql.data`.

    Raises:
        RecipeError: an unknown or missing key, a wrong type, or a value that `cls` itself refuses.
    """
    value = check_mapping(value, path)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_keys(value, fields, path)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise RecipeError(f"{join(path, name)}: missing; it has no default.")
    hints = typing.get_type_hints(cls)
    hints |= {name: Literal[f.metadata[_CHOICES]] for name, f in fields.items() if _CHOICES in f.metadata}
    values = {name: check_value(item, hints[name], join(path, name)) for name, item in value.items()}
    try:
        return cls(**values)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{path}: {error}" if path else str(error)) from error


def check_mapping(value: Any, path: str) -> dict[str, Any]:
    """`value` as a mapping with text keys (empty for `None`), or a `RecipeError`."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RecipeError(f"{path or 'the recipe'}: expected a mapping, got {value!r}.")
    for key in value:
        if not isinstance(key, str):
            raise RecipeError(f"{path or 'the recipe'}: the key {key!r} is not text; write it in quotes.")
    return dict(value)


def check_keys(
    value: Mapping[str, Any], valid: Iterable[str], path: str, library: Iterable[str] = (), owner: str = ""
) -> None:
    """Raise a `RecipeError` for the first unknown key, naming the nearest one and the section's own.

    Args:
        value: the mapping.
        valid: the section's own keys.
        path: where the mapping stands.
        library: further keys that are valid, too many to be listed.
        owner: whose they are, for example `trl.SFTConfig`.
    """
    valid, library = sorted(valid), sorted(library)
    for key in value:
        if key not in valid and key not in library:
            own = f" Valid keys: {', '.join(valid)}" if valid else ""
            rest = (" and the fields of " if own else " Valid keys: the fields of ") + owner if library else ""
            raise RecipeError(f"{join(path, key)}: unknown key.{nearest(key, [*valid, *library])}{own}{rest}.")


def check_value(value: Any, hint: Any, path: str) -> Any:
    """`value` if it has the type `hint` (a nested dataclass is built), or a `RecipeError`.

    Types other than scalars, literals, lists, mappings, unions of them and dataclasses built here are left to
    the library that owns the field.
    """
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    optional = [option for option in typing.get_args(hint) if union and dataclasses.is_dataclass(option)]
    if value is not None and optional:
        return build(optional[0], value, path)  # type: ignore[arg-type]
    if typing.get_origin(hint) is dict:
        item_hint = typing.get_args(hint)[1]
        items = check_mapping(value, path).items()
        return {key: check_value(item, item_hint, join(path, key)) for key, item in items}
    if not _matches(value, hint):
        raise RecipeError(f"{path}: expected {describe(hint)}, got {value!r}.")
    return value


def at_least(section: Any, key: str, least: int) -> None:
    """Raise a `ValueError` if the number at `key` is below `least`."""
    value = getattr(section, key)
    if isinstance(value, (int, float)) and not value >= least:
        raise ValueError(f"{key}={value}: must be {least} or more.")


def nearest(key: str, valid: Iterable[str]) -> str:
    """The sentence ` Did you mean '…'?` with the nearest of `valid`, or nothing."""
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def join(path: str, key: str) -> str:
    """The path of `key` inside the mapping at `path`."""
    return f"{path}.{key}" if path else key


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in arguments)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, arguments[0]) for item in value)
    if origin is dict or hint is dict:
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if hint in _SCALARS:
        return isinstance(value, hint)
    return True


def describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = {describe(option) for option in arguments}  # Python may keep equal unions in another order
        return " or ".join(sorted(kinds, key=lambda kind: (kind == "null", kind)))
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in arguments)
    if origin is list:
        return f"a list (each {describe(arguments[0])})"
    if origin is dict or hint is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    return _SCALARS.get(hint, getattr(hint, "__name__", str(hint)))
