"""The background: its texts, and what is kept of them in the user's cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from dylora_moe.skills import background
from dylora_moe.skills.background import background_texts, background_views, cache_folder
from dylora_moe.skills.skill import RowViews
from topics import READING, row_states

STATES = [row_states(seed) for seed in range(5)]
ROWS = [states.row for states in STATES]


class Reader:
    """Counts how often it reads."""

    times = 0

    def __call__(self, rows) -> RowViews:
        self.times += 1
        return RowViews.of_each(STATES)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_texts_are_rows_of_which_some_are_plain():
    rows = background_texts()
    assert all(row.keys() == {"prompt", "completion"} and row["completion"].strip() for row in rows)
    assert 0 < sum(not row["prompt"] for row in rows) < len(rows)


def test_they_are_read_once(cache):
    read = Reader()
    for _ in range(2):
        views = background_views(READING, ROWS, read)
        assert torch.equal(views.states, RowViews.of_each(STATES).states)
        assert torch.equal(views.keys, RowViews.of_each(STATES).keys)
    assert read.times == 1
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]
    background_views(replace(READING, layer=2), ROWS, read)
    assert read.times == 2


def rounded(data: bytes) -> bytes:
    tensors = load(data)
    return save({**tensors, "states": tensors["states"].float()})


def of_other_rows(data: bytes) -> bytes:
    tensors = load(data)
    return save({**tensors, "keys": tensors["keys"] + 1})


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: b"", lambda data: save({}), rounded, of_other_rows]
)
def test_a_damaged_or_foreign_file_is_read_anew(cache, damage):
    read = Reader()
    background_views(READING, ROWS, read)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    background_views(READING, ROWS, read)
    assert read.times == 2
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "file"))
    assert len(background_views(READING, ROWS, Reader()).keys) == 5


def test_a_crash_while_writing_leaves_no_half_file(cache, monkeypatch):
    def fails(*names):
        raise OSError("disk full")

    monkeypatch.setattr(background.os, "replace", fails)
    assert len(background_views(READING, ROWS, Reader()).keys) == 5
    assert list(cache.iterdir()) == []


def test_where_it_is_kept(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DYLORA_MOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/dylora-moe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/dylora-moe"
