"""Imports point downwards in the order that docs/architecture.md draws, type-only and late ones included; no circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dylora_moe"


EXCEPTIONS = {("model", "lifelong.learn")}
"""Who may import upwards, inside a function: `model.learn` trains, as users expect of a method of that name."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name without `dylora_moe.`; the package itself is `""`."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    file = MODULES[name]
    package = name.split(".") if file.name == "__init__.py" and name else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["dylora_moe", *package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in names:
            if full == "dylora_moe" or full.startswith("dylora_moe."):
                parts = full.split(".")[1:]
                while ".".join(parts) not in MODULES:  # the last parts are names inside a module
                    parts.pop()
                found.add(".".join(parts))
    return found - {name} - {other for importer, other in EXCEPTIONS if importer == name}


def order() -> list[set[str]]:
    """The rooms from the bottom up, as the page lists them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = text.split("<!-- order:begin -->")[1].split("<!-- order:end -->")[0]
    return [set(re.findall(r"`([^`]+)`", line.split(":")[0])) for line in listed.splitlines() if line.strip()]


def place(module: str, rooms: list[set[str]]) -> int:
    """The number of the room that a module is in; the package's own names are above all."""
    if not module:
        return len(rooms)
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, room in enumerate(rooms):
            if ".".join(parts[:length]) in room:
                return number
    pytest.fail(f"{module} is in no room of docs/architecture.md")


def test_imports_point_downwards():
    rooms = order()
    empty = {name for name, file in MODULES.items() if name and file.name == "__init__.py" and not imports_of(name)}
    upward = [
        f"{name} imports {other}"
        for name in MODULES
        if name and name not in empty
        for other in imports_of(name) - empty
        if place(other, rooms) > place(name, rooms)
    ]
    assert upward == []


def test_there_is_no_circle():
    TopologicalSorter({name: imports_of(name) for name in MODULES}).prepare()  # raises CycleError with the circle


def test_every_room_exists():
    for room in order():
        for name in room:
            assert name in MODULES, name


def test_deciding_and_applying_do_not_know_each_other():
    for name in MODULES:
        for half, other in (("routing", "layers"), ("routing", "mixing"), ("layers", "routing"), ("mixing", "routing")):
            if name.split(".")[0] == half:
                assert not [found for found in imports_of(name) if found.split(".")[0] == other], name
