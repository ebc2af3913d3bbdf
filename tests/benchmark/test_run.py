"""A run: what it measures is written with figures and reads back."""

from __future__ import annotations

import json
import re

import pytest

from dylora_moe.benchmark.page import add_run
from dylora_moe.benchmark.run import run, tokens_of
from dylora_moe.benchmark.settings import Settings


def test_run_is_written_with_figures_and_reads_back(tmp_path):
    settings = Settings("train", "tiny", (1, 2, 4), ("base", "peft", "auto"), 1, 8, rank=4, rounds=2, warmup=0)
    measured = run(settings)
    folder = tmp_path / "day"
    page = add_run(measured, folder).read_text()
    assert json.loads((folder / f"{settings.name}.json").read_text())["rows"] == measured["rows"]
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert len(pictures) == 3
    assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert measured["command"] in page
    assert Settings.from_dict(json.loads(json.dumps(measured["settings"]))) == settings


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "tpu", "cuda:x"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=device):
        run(Settings("train", "tiny", (2,), ("base",), rounds=0, device=device))


def test_every_variant_is_timed_in_every_round_and_compared_with_the_base():
    told = []
    settings = Settings("linear", "tiny", (2,), ("base", "auto"), 1, 4, rank=4, rounds=3, warmup=1, repeats=2)
    rows = {row["key"]: row for row in run(settings, told.append)["rows"]}
    assert all(len(row["seconds"]) == 3 for row in rows.values())
    assert rows["base"]["ratio"] == [1, 1, 1]
    low, high = rows["auto/2"]["ratio"][1:]
    assert low <= rows["auto/2"]["ratio"][0] <= high
    assert told[-1] == "round 4 of 4"


@pytest.mark.parametrize(("work", "tokens"), [("train", 24), ("prefill", 24), ("decode", 6), ("linear-token", 1)])
def test_tokens_of_a_step(work, tokens):
    assert tokens_of(Settings(work, "tiny", (2,), ("base",), batch=2, length=12, new_tokens=3)) == tokens
