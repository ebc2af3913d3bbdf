"""Every value of the two JSON files replaced by what does not belong there: our error with the file, or it loads."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig
from dylora_moe.checkpoint.settings import check_kinds, shown
from stock import assert_unchanged, snapshot
from tiny import tiny_base, tiny_mixture

pytestmark = pytest.mark.filterwarnings("ignore")
DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]
WRONG = (None, [], {"q_proj": None}, "(", -1, DEEP, 10**30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "mixture"
    tiny_mixture(expert_names=["red"], target_modules=["q_proj"]).save_pretrained(folder)
    return folder


def places(fields: dict[str, Any], file: str) -> Iterator[tuple[str | int, ...]]:
    """Where a value stands, or could stand, in one of the two files."""
    lora = {field.name for field in dataclasses.fields(LoraConfig)}
    if file == "adapter_config.json":
        yield from ((key,) for key in sorted(lora | set(fields)))
        return
    yield from ((key,) for key in sorted(fields))
    yield from (("experts", 0, key) for key in fields["experts"][0])
    own = {field.name for field in dataclasses.fields(MoELoraConfig)} - lora
    yield from (("config", key) for key in sorted(own | set(fields["config"])))


@pytest.mark.parametrize("file", ["moe_config.json", "red/adapter_config.json"])
def test_any_value_of_another_kind_is_our_error_or_loads(file, folder):
    path = folder / file
    text = path.read_text()
    fields = json.loads(text)
    base, loaded, refused = tiny_base(), [], []
    try:
        for place in places(fields, path.name):
            for value in WRONG:
                changed = copy.deepcopy(fields)
                owner = changed
                for step in place[:-1]:
                    owner = owner[step]
                owner[place[-1]] = value
                path.write_text(json.dumps(changed))
                try:
                    model = DyLoraMoE.from_pretrained(str(folder), base=base)
                    model.unload()
                    loaded.append((place, value))
                except CheckpointError as error:
                    refused.append((place, value, str(error)))
    finally:
        path.write_text(text)
    named = str(path.parent if path.name == "adapter_config.json" else path)  # an alien rank shows in the tensors
    assert [case for case in refused if named not in case[-1]] == []
    assert (len(refused) > 50, len(loaded) > 20) == (True, True)


@pytest.mark.parametrize("file", ["moe_config.json", "red/adapter_config.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"r": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        ('{"peft_type": "LORA", "peft_type": ', "cannot be read as JSON"),
        ("null", "holds NoneType; expected a JSON object"),
    ],
    ids=["deep", "digits", "pointer", "cut", "null"],
)
def test_damaged_text_is_named(file, damage, message, folder):
    path = folder / file
    text = path.read_text()
    base = tiny_base()
    before = snapshot(base)
    path.write_text(damage)
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            DyLoraMoE.from_pretrained(str(folder), base=base)
    finally:
        path.write_text(text)
    assert str(path) in str(caught.value)
    assert_unchanged(base, before)


@pytest.mark.parametrize("name", ["router.safetensors", "red/adapter_model.safetensors"])
def test_a_git_lfs_pointer_in_place_of_tensors_is_called_one(name, folder):
    path = folder / name
    content = path.read_bytes()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    try:
        with pytest.raises(CheckpointError, match=r"is a Git LFS pointer.*git lfs pull") as caught:
            DyLoraMoE.from_pretrained(str(folder), base=tiny_base())
    finally:
        path.write_bytes(content)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_pattern": None}, r"a.json: rank_pattern is null; expected an object\."),
        ({"alpha_pattern": ["x"]}, r"alpha_pattern is a list of 1; expected an object\."),
        ({"target_modules": {"q": 1}}, r"target_modules is an object of 1; expected a list or text\."),
        ({"r": True}, r"r is True; expected a number\."),
        ({"use_dora": "yes"}, r"use_dora is 'yes'; expected true or false\."),
        ([], r"the file is \[\]; expected an object\."),
    ],
)
def test_the_kind_of_a_value_is_checked(values, message):
    with pytest.raises(CheckpointError, match=message):
        check_kinds(LoraConfig, values, Path("a.json"))


def test_what_stock_peft_takes_is_taken():
    values = {"lora_alpha": 1.5, "loftq_config": None, "use_rslora": None, "of_a_later_version": {}}
    assert check_kinds(LoraConfig, values, Path("a.json")) == values


def test_a_place_inside_a_file_is_named():
    with pytest.raises(CheckpointError, match=r"m.json: config.granularity is -1; expected text\."):
        check_kinds(MoELoraConfig, {"granularity": -1}, Path("m.json"), "config")


def test_a_deep_value_is_shown_shortly():
    assert shown(DEEP) == "a list of 1"
    assert len(shown("y" * 10_000)) <= 60


def test_a_damaged_older_checkpoint_names_no_folder_to_replace(tmp_path):
    """What an older file calls its experts is removed on saving: a name that leads elsewhere must not be."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "mixture").mkdir()
    entries = [{"name": "../outside", "state": "routed", "frozen": False}]
    (tmp_path / "mixture" / "moe_config.json").write_text(json.dumps({"experts": entries}))
    torch.save({}, outside / "mine.pt")
    tiny_mixture(expert_names=["red"]).save_pretrained(tmp_path / "mixture")
    assert (outside / "mine.pt").exists()
