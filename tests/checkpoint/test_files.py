"""Folders are replaced as a whole: nothing stale stays, nothing foreign goes, a failure leaves the old one."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError

from dylora_moe import CheckpointError, DyLoraMoE, model
from dylora_moe.checkpoint import adapters, files, mixture
from stock import logits, save_stock_adapter
from tiny import tiny_base, tiny_mixture, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An older checkpoint among a trainer's and a user's files."""
    folder = tmp_path / "mixture"
    tiny_mixture().save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "results.json").write_text("{}")
    save_stock_adapter(folder / "single_lora", LoraConfig(r=2, target_modules=["q_proj"]))
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "trainer_state.json").write_text("{}")
    return folder


def test_saving_over_an_older_checkpoint_drops_removed_experts_and_keeps_foreign_files(saved):
    foreign = {name: data for name, data in contents(saved).items() if name.split("/")[0] not in ("red", "green")}
    model = DyLoraMoE.from_pretrained(str(saved), base=tiny_base())
    model.remove_expert("blue")
    model.save_pretrained(saved)
    after = contents(saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md",
        "checkpoint-10",
        "green",
        "moe_config.json",
        "optimizer.pt",
        "red",
        "results.json",
        "router.safetensors",
        "single_lora",
    ]
    for name in ("optimizer.pt", "results.json", "checkpoint-10/trainer_state.json"):
        assert after[name] == foreign[name]
    assert after["single_lora/adapter_model.safetensors"] == foreign["single_lora/adapter_model.safetensors"]
    loaded = DyLoraMoE.from_pretrained(str(saved), base=tiny_base())
    assert loaded.expert_names == ["red", "green"]
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert [path.name for path in saved.parent.iterdir()] == ["mixture"]


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("after", [0, 2, 3])
def test_a_failure_while_writing_leaves_the_old_checkpoint_whole(saved, monkeypatch, failure, after):
    before = contents(saved.parent)
    model = DyLoraMoE.from_pretrained(str(saved), base=tiny_base())
    model.router.up.data.zero_()
    written = []

    def fail_later(tensors, file, **options):
        if len(written) == after:
            raise failure
        written.append(file)
        Path(file).write_bytes(b"half")

    for module in (adapters, mixture):
        monkeypatch.setattr(module, "save_file", fail_later)
    with pytest.raises(type(failure), match="No space left"):
        model.save_pretrained(saved)
    assert contents(saved.parent) == before
    monkeypatch.undo()
    assert DyLoraMoE.from_pretrained(str(saved), base=tiny_base()).router.up.abs().max() > 0


def test_a_failure_in_a_new_folder_leaves_nothing(tmp_path, monkeypatch):
    built = tiny_mixture()
    monkeypatch.setattr(model, "model_card", lambda *_: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        built.save_pretrained(tmp_path / "mixture")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_while_renaming_puts_the_old_checkpoint_back(saved, monkeypatch, failing):
    before = contents(saved.parent)
    model = DyLoraMoE.from_pretrained(str(saved), base=tiny_base())
    rename, renames = Path.rename, []

    def fail_once(self, target):
        renames.append(target)
        if len(renames) == failing:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    with pytest.raises(OSError, match="busy"):
        model.save_pretrained(saved)
    assert contents(saved.parent) == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may have no exchange of folders")
def test_folders_change_places_in_one_step(saved, monkeypatch):
    """No moment without the folder, or without what lies in it beside the mixture."""
    (saved / "stages" / "one").mkdir(parents=True)
    (saved / "stages" / "one" / "log").write_text("mine")
    monkeypatch.setattr(Path, "rename", None)
    exchange, seen = files._exchange, []

    def look(one, other):
        seen.append(contents(one)["stages/one/log"] == contents(other)["stages/one/log"] == b"mine")
        return exchange(one, other)

    monkeypatch.setattr(files, "_exchange", look)
    model = DyLoraMoE.from_pretrained(str(saved), base=tiny_base())
    model.remove_expert("blue")
    model.save_pretrained(saved)
    assert seen == [True]
    assert DyLoraMoE.from_pretrained(str(saved), base=tiny_base()).expert_names == ["red", "green"]
    assert contents(saved)["stages/one/log"] == b"mine"
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_without_an_exchange_the_rest_of_the_folder_stays_too(saved, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    before = contents(saved)
    DyLoraMoE.from_pretrained(str(saved), base=tiny_base()).save_pretrained(saved)
    assert contents(saved).keys() == before.keys()
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_the_old_checkpoint_is_whole_until_the_new_one_is(saved, monkeypatch):
    """At the moment of the swap the new folder is complete, beside the old one."""
    before, seen = contents(saved), []
    swap = files._swap

    def look(folder, target, owned):
        assert folder.parent == target.parent
        assert contents(target) == before
        seen.append(sorted(contents(folder)))
        swap(folder, target, owned)

    monkeypatch.setattr(files, "_swap", look)
    DyLoraMoE.from_pretrained(str(saved), base=tiny_base()).save_pretrained(saved)
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    experts = [f"{name}/{file}" for name in ("red", "green", "blue") for file in adapter]
    assert seen == [sorted(["README.md", "moe_config.json", "router.safetensors", *experts])]


def test_a_new_checkpoint_is_as_readable_as_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    tiny_mixture().save_pretrained(tmp_path / "mixture")
    assert (tmp_path / "mixture").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("exchange", [True, False])
def test_a_private_folder_stays_private(saved, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    saved.chmod(0o750)
    DyLoraMoE.from_pretrained(str(saved), base=tiny_base()).save_pretrained(saved)
    assert saved.stat().st_mode & 0o777 == 0o750


def test_missing_parents_are_made(tmp_path):
    tiny_mixture().save_pretrained(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b" / "moe_config.json").is_file()


def test_a_link_to_a_folder_stays_a_link(saved):
    link = saved.parent / "latest"
    link.symlink_to(saved)
    model = DyLoraMoE.from_pretrained(str(link), base=tiny_base())
    model.remove_expert("blue")
    model.save_pretrained(link)
    assert link.is_symlink()
    assert not (saved / "blue").exists()
    assert (saved / "optimizer.pt").is_file()


def test_the_folder_one_stands_in_may_hold_links_for_experts(saved, monkeypatch):
    elsewhere = saved.parent / "elsewhere"
    (saved / "red").rename(elsewhere)
    (saved / "red").symlink_to(elsewhere)
    there = contents(elsewhere)
    monkeypatch.chdir(saved)
    model = DyLoraMoE.from_pretrained(".", base=tiny_base())
    model.remove_expert("blue")
    model.save_pretrained(".")
    assert DyLoraMoE.from_pretrained(".", base=tiny_base()).expert_names == ["red", "green"]
    assert not (saved / "red").is_symlink()
    assert contents(elsewhere) == there
    assert sorted(entry.name for entry in saved.parent.iterdir()) == ["elsewhere", "mixture"]
    assert not list(saved.glob(".*"))


@pytest.mark.parametrize("failing", ["move", "rename"])
def test_what_fails_in_a_mounted_folder_leaves_the_old_checkpoint_whole(saved, monkeypatch, failing):
    before = contents(saved.parent)
    model = DyLoraMoE.from_pretrained(str(saved), base=tiny_base())
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    rename, renames = Path.rename, []

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail_once(self, target):
        renames.append(target)
        return full() if len(renames) == 8 else rename(self, target)  # when six old entries are out and a new one is in

    if failing == "move":
        monkeypatch.setattr(files.shutil, "move", full)
    else:
        monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(saved)
    assert contents(saved.parent) == before


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "mixture").write_text("mine")
    model = tiny_mixture()
    for save in (model.save_pretrained, lambda target: model.export_expert("red", target)):
        with pytest.raises(CheckpointError, match=r"mixture is a file; give a folder"):
            save(tmp_path / "mixture")
    assert contents(tmp_path) == {"mixture": b"mine"}


def test_a_foreign_folder_with_an_experts_name_is_not_overwritten(tmp_path):
    (tmp_path / "mixture" / "red").mkdir(parents=True)
    (tmp_path / "mixture" / "red" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"mixture/red is in the way"):
        tiny_mixture().save_pretrained(tmp_path / "mixture")
    assert contents(tmp_path) == {"mixture/red/notes.txt": b"mine"}


@pytest.mark.parametrize("export", ["export_expert", "export_mixture"])
def test_exporting_into_a_used_folder_keeps_what_lies_there(tmp_path, export):
    model = tiny_mixture()
    (tmp_path / "work" / "data").mkdir(parents=True)
    (tmp_path / "work" / "data" / "train.jsonl").write_text("{}")
    what = "red" if export == "export_expert" else {"red": 0.5, "green": 0.5}
    for _ in range(2):
        getattr(model, export)(what, tmp_path / "work")
        names = ["work/adapter_config.json", "work/adapter_model.safetensors", "work/data/train.jsonl"]
        assert sorted(contents(tmp_path)) == names


def test_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_mixture().save_pretrained("mixture")
    assert os.listdir(tmp_path) == ["mixture"]
    assert DyLoraMoE.from_pretrained("mixture", base=tiny_base()).num_experts == 3


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    files.write_file(file, "ä\n")
    assert file.read_bytes() == "ä\n".encode()
    files.write_file(file, b"old")

    def fail(self, content):
        with self.open("wb") as part:
            part.write(content[:1])
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        files.write_file(file, "new")
    assert contents(tmp_path) == {"results.json": b"old"}
