"""A failed command: one message, the extra that is missing, the traceback where it was asked for."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from rich.console import Console

from dylora_moe.failures import EXTRAS, missing_extra, one_message

ROOT = Path(__file__).parents[1]


def run(*words: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({without!r}))\nsys.argv = ['dylora-moe', *{words!r}]\n"
        "from dylora_moe.__main__ import run\nrun()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_every_module_is_in_the_extra_that_brings_it():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        packages = {re.split(r"[<>=;\[ ]", requirement)[0].lower() for requirement in declared[extra]}
        for module in modules:
            names = packages_distributions().get(module, [module])
            known = {name.lower().replace("_", "-") for name in names}
            assert known & packages, module


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("train", "trl"),
        pytest.param("train", "datasets", marks=pytest.mark.slow),
        pytest.param("train", "psutil", marks=pytest.mark.slow),
        ("recipe check", "trl"),
        ("recipe check", "datasets"),
    ],
)
def test_a_core_installation_names_the_extra(tmp_path, command, missing):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: {model: x/y}\nexperts: {sql: {data: {skill: sql}}}\ntrain: {max_steps: 1}\n")
    done = run(*command.split(), str(recipe), without=(missing,))
    assert done.returncode == 2
    assert "dylora-moe[train]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_a_command_line_the_extra_is_named_too(missing):
    done = run("--help", without=(missing,))
    assert done.returncode == 1
    assert done.stderr == f"{missing} is not installed; the command line needs pip install 'dylora-moe[train]'.\n"


def test_other_missing_modules_keep_their_message():
    assert missing_extra(ImportError("no dice", name="numpy")) is None
    outer = RuntimeError("could not be loaded")
    outer.__cause__ = ImportError("No module named 'PIL.Image'", name="PIL.Image")
    assert missing_extra(outer) == "PIL is not installed; pip install 'dylora-moe[plot]'."


@pytest.mark.parametrize(
    "words", [pytest.param(["--verbose", "report"], marks=pytest.mark.slow), ["report", "--verbose"]], ids=" ".join
)
def test_verbose_shows_the_traceback(words, tmp_path):
    plain = run("report", str(tmp_path))
    assert plain.returncode == 2
    assert plain.stderr.startswith("CheckpointError: ") or plain.stderr.startswith("ValueError: ")
    assert "Traceback" not in plain.stderr
    done = run(*words, str(tmp_path))
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr


@pytest.mark.parametrize("bug", [KeyError, AttributeError, RuntimeError])
def test_what_only_a_bug_raises_keeps_its_traceback(bug):
    with pytest.raises(bug), one_message(Console(quiet=True)):
        raise bug("x")
