"""What the Dockerfile names exists; nothing here builds it."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import typer

from dylora_moe.cli import app
from dylora_moe.skills.background import CACHE_VARIABLE
from pages import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def of(instruction: str) -> list[str]:
    """What follows an instruction, each time."""
    return re.findall(rf"^{instruction}\s+(.*)$", TEXT, re.MULTILINE)


def test_what_is_copied_is_there_and_sent_to_the_builder():
    sources = [source for line in of("COPY") for source in line.split()[:-1]]
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert sent[0] == "*"
    assert set(sources) == {line[1:] for line in sent if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "src"} <= set(sources)


def test_what_is_installed_is_known():
    (extras,) = re.findall(r"'\.\[(.*?)\]'", TEXT)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert '--index-url "$TORCH_INDEX" torch' in TEXT


def test_the_command_is_one_of_ours_and_what_it_opens_is_told():
    (entry,), (command,) = map(json.loads, of("ENTRYPOINT")), map(json.loads, of("CMD"))
    assert entry == [next(iter(PROJECT["scripts"]))]
    group: Any = typer.main.get_command(app)
    with group.make_context("dylora-moe", list(command)) as context:
        name, chosen, rest = group.resolve_command(context, list(command))
        given = chosen.make_context(name, rest).params
    assert given["host"] == "0.0.0.0"
    assert of("EXPOSE") == [str(given["port"])]


def test_its_health_is_looked_at_where_the_page_of_serving_does():
    """Whose commands run in `test_docs_blocks.py`."""
    (address,) = re.findall(r"urlopen\('(http://[^']+)'", TEXT)
    assert f"\ncurl {address}\n" in (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_cache_lies_on_the_volume_of_whoever_runs_it():
    (volume,), (user,) = of("VOLUME"), of("USER")
    (places,) = [line for line in of("ENV") if "HF_HOME" in line]
    assert all(place.partition("=")[2].startswith(f"{volume}/") for place in places.split())
    assert f"{CACHE_VARIABLE}={volume}" in places
    assert f"--owner={user} {volume}" in TEXT
    assert user != "root"
    assert TEXT.index("USER") < TEXT.index("ENTRYPOINT")
