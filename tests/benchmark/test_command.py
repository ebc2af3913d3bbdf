"""`dylora-moe bench`: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json
import re
import sys

import pytest
from typer.testing import CliRunner

from dylora_moe.cli import app, main

cli = CliRunner()
TINY = ["--shape", "tiny", "--experts", "4", "--batch", "1", "--length", "8", "--rank", "4"]


def test_command_measures_and_writes(tmp_path):
    options = ["--work", "linear", "--variants", "base,base-again,peft,auto", "--against", "peft"]
    done = cli.invoke(
        app, ["bench", *TINY, *options, "--rounds", "2", "--repeats", "2", "--output", str(tmp_path)],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0
    (folder,) = tmp_path.iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+", folder.name)
    assert (folder / "README.md").is_file()
    assert "tiny" in done.output
    again = cli.invoke(app, ["bench", "--page", str(folder)], catch_exceptions=False)
    assert again.exit_code == 0


def test_command_line_of_settings_gives_the_same_settings(tmp_path):
    options = ["--work", "train", "--variants", "base,auto", "--rounds", "0", "--fake", "--output", str(tmp_path)]
    cli.invoke(app, ["bench", *TINY, *options], catch_exceptions=False)
    (file,) = tmp_path.glob("*/*.json")
    told = json.loads(file.read_text())
    _, _, *words = told["command"].split()
    cli.invoke(app, ["bench", *words, "--output", str(tmp_path / "again")], catch_exceptions=False)
    (second,) = tmp_path.glob("again/*/*.json")
    assert json.loads(second.read_text())["settings"] == told["settings"]


def test_lists_and_help_teach():
    listed = cli.invoke(app, ["bench", "--list"], env={"COLUMNS": "200"}).output
    assert all(word in listed for word in ("training", "xlora", "gathered"))
    assert "causes.md" in cli.invoke(app, ["bench", "--help"]).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--work", "sing"], "work='sing': choose one of train"),
        (["--shape", "huge"], "choose one of tiny, small"),
        (["--experts", "one"], "1,8,64"),
        (["--experts", "0"], "from 1 upwards"),
        (["--plan", "none"], "plan='none': choose one of counts"),
        (["--work", "linear", "--variants", "xlora"], "not part of the work 'linear'"),
        (["--fake"], "needs rounds=0"),
        (["--against", "nobody"], "not a timed variant"),
        (["--shape", "tiny", "--router-layer", "9"], "the base has 2 layers"),
        (["--page", "no-such-folder"], "holds no results"),
    ],
)
def test_mistakes_are_one_message(options, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dylora-moe", "bench", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
