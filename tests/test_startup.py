"""What is loaded before it is used: nothing heavy, whichever question a command can answer without it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

import dylora_moe

HEAVY = ("torch", "transformers", "peft", "trl", "datasets")
RUN = """
import sys
from dylora_moe.__main__ import run
sys.argv = {words!r}
try:
    run()
except SystemExit:
    pass
"""
SEEN = f"print('loaded:', [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
HELPS = (
    [],
    ["train"],
    ["compose"],
    ["generate"],
    ["inspect"],
    ["report"],
    ["bench"],
    ["recipe"],
    ["recipe", "check"],
    ["merge"],
    ["serve"],
    ["chat"],
    ["gateway"],
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def loaded(words: list[str], **environment: str) -> tuple[str, str]:
    """What a command printed, and which of the heavy modules it loaded."""
    done = python(RUN.format(words=["dylora-moe", *words]) + SEEN, **environment)
    *message, last = done.stderr.strip().splitlines()
    return done.stdout + " ".join(" ".join(message).split()), last


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_loads_nothing_heavy(command):
    text, found = loaded([*command, "--help"])
    assert "Usage: dylora-moe" in text
    assert found == "loaded: []"


def test_completion_is_on_and_loads_nothing_heavy():
    asked = {"_DYLORA_MOE_COMPLETE": "complete_bash", "COMP_WORDS": "dylora-moe rec", "COMP_CWORD": "1"}
    assert loaded([], **asked) == ("recipe\n", "loaded: []")
    assert "--install-completion" in loaded(["--help"])[0]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("experts: [", "not valid YAML"),
        ("expert: {}", "unknown key. Did you mean 'experts'?"),
        ("experts: {a: {data: {skil: sql}}}", "unknown key. Did you mean 'skill'?"),
        ("experts: {a: {data: {skill: sql}}}\ntrain: {method: jont, max_steps: 3}", "train.method: expected one of"),
        ("experts: {a: {data: {train: gone.jsonl}}}\ntrain: {max_steps: 3}", "no file 'gone.jsonl'"),
        ("experts: {a: {data: {skill: sql}}}\nbase: {model: ./gone}\ntrain: {max_steps: 3}", "no folder './gone'"),
    ],
)
def test_what_is_wrong_in_a_recipe_itself_is_told_at_once(tmp_path, recipe, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    text, found = loaded(["recipe", "check", str(file)])
    assert message in text
    assert found == "loaded: []"


def test_help_costs_little():
    """0.2 to 0.4 s on one core alone; with torch it would be 4 s and more, so 2 s leave room for a busy machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "dylora_moe", "--help"], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2


def test_importing_the_package_loads_nothing_and_its_names_do():
    code = f"import sys, dylora_moe\nassert not any(name in sys.modules for name in {HEAVY})\ndylora_moe.DyLoraMoE"
    assert python(code).stderr == ""


def test_every_public_name_is_there_and_listed():
    """A star takes what a core installation has; `MoETrainer` needs an extra."""
    names = {*dylora_moe.__all__, "MoETrainer"}
    for name in names:
        assert getattr(dylora_moe, name) is not None
    assert names <= set(dir(dylora_moe))
    assert set(dylora_moe._MODULES) == names - {"__version__"}
    with pytest.raises(AttributeError, match="module 'dylora_moe' has no attribute 'DyLoraMOE'"):
        dylora_moe.DyLoraMOE  # noqa: B018
