"""`dylora-moe learn`: what it says and writes; killed at any step it leaves the folder as before or as after."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dylora_moe import DyLoraMoE
from dylora_moe.checkpoint import files
from dylora_moe.cli import app
from dylora_moe.lifelong import command
from dylora_moe.lifelong import learn as module
from dylora_moe.lifelong import look as module_of_look
from dylora_moe.skills.novelty import KNOWN, NEW, Novelty
from tinybase import save_tiny_base
from topics import NAMES, mixture, teach, texts

OLD, SHORT = NAMES[:2], ("--steps", "2", "--batch-size", "2")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def folder(tmp_path):
    """A mixture that knows two skills, and beside it a file with rows of another."""
    model = teach(mixture(OLD))
    model.base_name = save_tiny_base(tmp_path / "base")
    model.save_pretrained(tmp_path / "mine")
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    write(tmp_path / "code.jsonl", texts(NAMES.index("code"), 15))
    return tmp_path / "mine"


@pytest.fixture(autouse=True)
def judged(monkeypatch):
    """Every row is new, but those that begin with an a."""

    def novelty(self, rows, batch=False, **how):
        kind = [KNOWN if (row.prompt or row.completion).startswith("a") else NEW for row in rows]
        found = [Novelty(answer, "sql", 0.5, 0.0) for answer in kind]
        return found[0] if batch else found

    monkeypatch.setattr(DyLoraMoE, "novelty", novelty)


def write(file, rows) -> None:
    lines = [json.dumps({"text": row} if isinstance(row, str) else row) for row in rows if isinstance(row, dict)]
    file.write_text("".join(f"{line}\n" for line in lines))


def run(*words):
    result = CliRunner().invoke(app, ["learn", *map(str, words)])
    return result, " ".join(result.output.split())


def load(folder) -> DyLoraMoE:
    return DyLoraMoE.from_pretrained(str(folder))


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_becomes_an_expert(folder):
    result, said = run(folder, folder.parent / "code.jsonl", *SHORT)
    assert result.exit_code == 0, said
    assert "Learned 'code' from 10 rows" in said
    assert "Of 12 kept rows of the skills before" in said
    model = load(folder)
    assert model.expert_names == [*OLD, "code"]
    assert model.skills["code"].taught[0].source.startswith("sha256:")
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / command.WORK).exists()


def test_another_folder_can_be_written(folder):
    before = contents(folder)
    result, _ = run(folder, folder.parent / "code.jsonl", "--output", folder.parent / "grown", "--name", "law2", *SHORT)
    assert result.exit_code == 0
    assert contents(folder) == before
    assert load(folder.parent / "grown").expert_names == [*OLD, "law2"]
    assert AutoTokenizer.from_pretrained(folder.parent / "grown").get_vocab()


def test_a_dry_run_writes_nothing(folder):
    before = contents(folder)
    result, said = run(folder, folder.parent / "code.jsonl", "--dry-run")
    assert result.exit_code == 0
    assert "would train 'code' on 10 rows" in said
    assert contents(folder) == before


def test_known_rows_are_not_learnt_unless_asked(folder):
    write(folder.parent / "more.jsonl", [{"prompt": f"a{n}", "completion": "b"} for n in range(9)])
    before = contents(folder)
    result, said = run(folder, folder.parent / "more.jsonl", *SHORT)
    assert result.exit_code == 0
    assert "Nothing was learnt: nothing new: the rows are of sql (9 rows)" in said
    assert contents(folder) == before
    result, _ = run(folder, folder.parent / "more.jsonl", "--all", *SHORT)
    assert load(folder).expert_names == [*OLD, "more"]


def test_several_skills_in_a_file_are_proposed_and_learnt_where_asked(folder, monkeypatch):
    monkeypatch.setattr(module_of_look, "proposal", lambda rows, fewest: torch.arange(len(rows)) % 2)
    before = contents(folder)
    result, said = run(folder, folder.parent / "code.jsonl", *SHORT)
    assert result.exit_code == 0, said
    assert "look like 2 skills" in said
    assert "--skills 2 learns them so, --skills 1 all as one" in said
    assert contents(folder) == before
    _, said = run(folder, folder.parent / "code.jsonl", "--skills", "2", "--dry-run")
    assert "Dry run: would train 'code_1' on" in said
    result, said = run(folder, folder.parent / "code.jsonl", "--skills", "2", *SHORT)
    assert result.exit_code == 0, said
    assert load(folder).expert_names == [*OLD, "code_1", "code_2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("code.jsonl", "--all", "--skills", "2"), "--all with --skills 2"),
        (("none.jsonl",), "no file"),
        (("code.jsonl", "--name", "sql"), "expert 'sql' exists already"),
        (("empty.jsonl",), "no examples"),
        ((), "give a file with rows, or --watch FOLDER"),
        (("code.jsonl", "--watch", "."), "give a file with rows, or --watch FOLDER"),
        (("--watch", "nowhere"), "no such folder"),
    ],
)
def test_what_cannot_be_is_said(folder, monkeypatch, words, message):
    (folder.parent / "empty.jsonl").write_text("")
    monkeypatch.chdir(folder.parent)
    before = contents(folder)
    result, _ = run("mine", *words)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert contents(folder) == before


def test_a_watched_folder_is_learnt_file_by_file(folder, monkeypatch):
    inbox, looks = folder.parent / "inbox", []
    inbox.mkdir()
    shutil.copy(folder.parent / "code.jsonl", inbox / "one.jsonl")
    (inbox / "notes.txt").write_text("no rows")
    (inbox / "empty.jsonl").write_text("")
    for file in inbox.iterdir():
        os.utime(file, (1, 1))

    def rest(seconds):
        looks.append(seconds)
        if len(looks) == 1:
            write(inbox / "two.jsonl", texts(NAMES.index("chat"), 12))
            os.utime(inbox / "two.jsonl", (1, 1))
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", rest)
    result, said = run(folder, "--watch", inbox, *SHORT)
    assert result.exit_code in (1, 130)
    assert load(folder).expert_names == [*OLD, "one", "two"]
    assert said.count("Learned") == 2
    assert "empty.jsonl: " in said
    looks[:] = [0, 0]
    _, said = run(folder, "--watch", inbox, *SHORT)
    assert "one.jsonl was learnt before." in said
    assert load(folder).expert_names == [*OLD, "one", "two"]


def killed(at: str, folder) -> None:
    """Learn in this process, which kills itself once it has done a step."""
    places = {"_train": module, "teach": DyLoraMoE, "save_pretrained": DyLoraMoE, "_exchange": files, "rmtree": shutil}
    place = places[at]
    original, calls = getattr(place, at), []

    def last(*args, **kwargs):
        calls.append(args)
        if at == "save_pretrained" and str(args[1]) != str(folder):
            return original(*args, **kwargs)  # the trainer's own
        if at == "_exchange" and args[1] != folder:
            return original(*args, **kwargs)
        original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, at, last)
    CliRunner().invoke(app, ["learn", str(folder), str(folder.parent / "code.jsonl"), *SHORT])


@pytest.mark.slow  # processes of their own
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that go on from this one")
@pytest.mark.parametrize(
    ("at", "names"),
    [("_train", OLD), ("teach", OLD), ("_exchange", (*OLD, "code")), ("save_pretrained", (*OLD, "code"))],
)
def test_killed_after_any_step_the_folder_is_before_or_after(folder, at, names):
    process = multiprocessing.get_context("fork").Process(target=killed, args=(at, folder))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert load(folder).expert_names == list(names)
    assert (folder / "notes.txt").read_text() == "mine"
    if "code" not in names:
        result, said = run(folder, folder.parent / "code.jsonl", *SHORT)
        assert result.exit_code == 0, said
        assert load(folder).expert_names == [*OLD, "code"]
        assert not (folder / command.WORK).exists()
