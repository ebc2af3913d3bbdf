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
from dylora_moe.skills.reading import digest_of, read_rows
from dylora_moe.training.trainer.trainer import MoETrainer
from tinybase import save_tiny_base, tiny_tokenizer
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
    write(folder.parent / "code.jsonl", [*texts(NAMES.index("code"), 15), *texts(NAMES.index("math"), 15)])
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


@pytest.fixture
def two_skills(folder, monkeypatch) -> list[list[dict]]:
    """The rows of two skills, which code.jsonl has in turn, and which are known as soon as one skill is learnt."""
    monkeypatch.setattr(module_of_look, "split", lambda rows, count: torch.arange(len(rows)) % count)
    parts = [[row for row in texts(NAMES.index(name), 15) if isinstance(row, dict)] for name in ("code", "math")]
    write(folder.parent / "code.jsonl", [row for pair in zip(*parts, strict=True) for row in pair])

    def novelty(self, rows, batch=False, **how):
        found = [Novelty(KNOWN if "code_1" in self.skills else NEW, "code_1", 0.5, 0.0)] * len(rows)
        return found[0] if batch else found

    monkeypatch.setattr(DyLoraMoE, "novelty", novelty)
    return parts


def cut_off_after(count: int, folder, monkeypatch) -> None:
    """End the command, as a kill would, once it has saved the mixture so often."""
    original, saved = DyLoraMoE.save_pretrained, []

    def last(self, directory, *args, **kwargs):
        original(self, directory, *args, **kwargs)
        saved.extend([directory] if directory == folder else [])
        if len(saved) == count:
            raise SystemExit(137)

    monkeypatch.setattr(DyLoraMoE, "save_pretrained", last)


@pytest.mark.parametrize(
    ("learnt", "output"),
    [(1, True), pytest.param(1, False, marks=pytest.mark.slow), pytest.param(2, False, marks=pytest.mark.slow)],
)
def test_cut_off_between_two_skills_the_same_command_goes_on(folder, monkeypatch, two_skills, learnt, output):
    target = folder.parent / "grown" if output else folder
    words = (folder, folder.parent / "code.jsonl", "--skills", "2", *SHORT, *(("--output", target) if output else ()))
    with monkeypatch.context() as patched:
        cut_off_after(learnt, target, patched)
        assert run(*words)[0].exit_code == 137
    names = ["code_1", "code_2"]
    assert load(target).expert_names == [*OLD, *names[:learnt]]
    before = contents(target)
    result, said = run(*words, "--dry-run")
    assert result.exit_code == 0, said
    assert "would train 'code_2' on 10 rows." in said if learnt == 1 else "would train" not in said
    assert contents(target) == before
    result, said = run(*words)
    assert result.exit_code == 0, said
    assert f"Learnt before: {', '.join(names[:learnt])}, of code_1, code_2." in said
    model = load(target)
    assert model.expert_names == [*OLD, *names]
    for name, rows in zip(names, two_skills, strict=True):
        assert [each.sha256 for each in model.skills[name].taught] == [digest_of(read_rows(rows, tiny_tokenizer()))]
    assert not (target / command.WORK).exists()


@pytest.mark.slow
def test_a_split_is_not_gone_on_with_for_another_file_or_number(folder, monkeypatch, two_skills):
    file = folder.parent / "code.jsonl"
    with monkeypatch.context() as patched:
        cut_off_after(1, folder, patched)
        run(folder, file, "--skills", "2", *SHORT)
    assert "Nothing was learnt: nothing new" in run(folder, file, "--skills", "3", *SHORT)[1]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    assert "Nothing was learnt: nothing new" in run(folder, file, "--skills", "2", *SHORT)[1]
    assert load(folder).expert_names == [*OLD, "code_1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("code.jsonl", "--all", "--skills", "2"), "--all with --skills 2"),
        (("none.jsonl",), "no file"),
        (("code.jsonl", "--name", "sql"), "expert 'sql' exists already"),
        (("empty.jsonl",), "no examples"),
        ((), "give a file with rows, or --watch FOLDER"),
        (("code.jsonl", "--watch", "."), "give a file with rows, or --watch FOLDER"),
        (("code.jsonl", "--skills", "5"), "of so many skills one would have"),
        (("code.jsonl", "--name", "tidy"), "in the way of the expert"),
        (("12.jsonl",), "Say how the expert is to be called with --name"),
        (("code.jsonl", "--output", "notes"), "README.md is in the way"),
        (("code.jsonl", "--output", "mine/sql"), "is an expert's folder of the mixture"),
        (("chats.jsonl",), "chats.jsonl, line 1, 'messages' is made of chat messages"),
        (("--watch", "nowhere"), "no such folder"),
    ],
)
def test_what_cannot_be_is_said(folder, monkeypatch, words, message):
    (folder.parent / "empty.jsonl").write_text("")
    (folder.parent / "12.jsonl").write_text((folder.parent / "code.jsonl").read_text())
    write(folder.parent / "chats.jsonl", [{"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}])
    (folder / "tidy").mkdir()
    (folder.parent / "notes").mkdir()
    (folder.parent / "notes" / "README.md").write_text("mine")
    monkeypatch.chdir(folder.parent)
    before = contents(folder)
    result, _ = run("mine", *words)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert contents(folder) == before


@pytest.mark.parametrize("words", [("--dry-run",), ()])
def test_a_folder_that_is_not_there_is_not_made(tmp_path, words):
    write(tmp_path / "code.jsonl", texts(0, 3))
    result, _ = run(tmp_path / "owner" / "typo", tmp_path / "code.jsonl", *words)
    assert "no such folder" in str(result.exception)
    assert not (tmp_path / "owner").exists()


def test_with_all_known_rows_are_learnt_as_one_skill(folder):
    write(folder.parent / "more.jsonl", [{"prompt": f"a{n}", "completion": "b"} for n in range(9)])
    result, said = run(folder, folder.parent / "more.jsonl", "--all", "--skills", "1", "--dry-run")
    assert result.exit_code == 0
    assert "would train 'more' on 9 rows" in said


def test_beside_an_expert_that_was_never_taught(folder):
    model = load(folder)
    model.add_expert("later")
    model.save_pretrained(folder)
    result, said = run(folder, folder.parent / "code.jsonl", *SHORT)
    assert result.exit_code == 0, said
    assert load(folder).expert_states == {"sql": "routed", "law": "routed", "later": "new", "code": "routed"}


def stopped_after(step, monkeypatch) -> None:
    """Let a training get the signal of Ctrl-C once it has saved so many checkpoints."""
    original, saved = MoETrainer._save_checkpoint, []

    def last(self, *args, **kwargs):
        original(self, *args, **kwargs)
        saved.append(self.state.global_step)
        if len(saved) == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MoETrainer, "_save_checkpoint", last)


LONG = ("--steps", "8", "--batch-size", "2")


@pytest.mark.parametrize(
    "words", [LONG, (*LONG, "--rank", "4"), ("--steps", "4", "--batch-size", "3")], ids=["same", "rank", "fewer"]
)
def test_stopped_and_gone_on_with_whatever_options(folder, monkeypatch, words):
    with monkeypatch.context() as patched:
        stopped_after(1, patched)
        result, said = run(folder, folder.parent / "code.jsonl", *LONG)
    assert result.exit_code == 130
    assert "the same command goes on with the training" in said
    assert load(folder).expert_names == list(OLD)
    made = []
    monkeypatch.setattr(MoETrainer, "training_step", counted(MoETrainer.training_step, made))
    result, said = run(folder, folder.parent / "code.jsonl", *words)
    assert result.exit_code == 0, said
    assert len(made) < 8 if words == LONG else len(made) == int(words[1])
    assert load(folder).lora_config("code").r == (4 if "--rank" in words else 2)
    assert not (folder / command.WORK).exists()


def counted(method, calls):
    def wrapped(*args, **kwargs):
        calls.append(args)
        return method(*args, **kwargs)

    return wrapped


def test_what_changed_while_a_training_was_stopped_stays(folder, monkeypatch):
    with monkeypatch.context() as patched:
        stopped_after(1, patched)
        run(folder, folder.parent / "code.jsonl", *LONG)
    model = load(folder)
    for part in model.expert_tensors("law"):
        part.tensor.data.fill_(0.5)
    teach(model, "sql", count=100)
    model.save_pretrained(folder)
    result, said = run(folder, folder.parent / "code.jsonl", *LONG)
    assert result.exit_code == 0, said
    model = load(folder)
    assert (model.skills["sql"].rows, model.skills["law"].rows) == (106, 6)
    assert all(bool((part.tensor == 0.5).all()) for part in model.expert_tensors("law"))


@pytest.mark.slow  # four trainings
def test_a_watched_folder_is_learnt_file_by_file(folder, monkeypatch):
    inbox, looks = folder.parent / "inbox", []
    inbox.mkdir()
    shutil.copy(folder.parent / "code.jsonl", inbox / "one.jsonl")
    (inbox / "notes.txt").write_text("no rows")
    (inbox / "empty.jsonl").write_text("")
    (inbox / "folder.jsonl").mkdir()
    (inbox / "gone.jsonl").symlink_to("nowhere")

    def rest(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            write(inbox / "two.jsonl", texts(NAMES.index("chat"), 12))
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", rest)
    result, said = run(folder, "--watch", inbox, *SHORT)
    assert result.exit_code in (1, 130)
    assert load(folder).expert_names == [*OLD, "one", "two"]
    assert said.count("Learned") == 2
    assert "empty.jsonl: " in said
    assert [said.count(f"{name}.jsonl: [Errno") for name in ("folder", "gone")] == [1, 1]
    looks[:] = [0, 0]
    _, said = run(folder, "--watch", inbox, *SHORT)
    assert "one.jsonl was learnt before." in said
    assert load(folder).expert_names == [*OLD, "one", "two"]


def test_a_watched_file_is_learnt_once_it_no_longer_grows(folder, monkeypatch):
    inbox, looks, learnt = folder.parent / "inbox", [], []
    inbox.mkdir()
    file, whole = inbox / "code.jsonl", (folder.parent / "code.jsonl").read_text()

    def rest(seconds):
        looks.append(seconds)
        if len(looks) <= 3:  # by a writer that is slow, or keeps an old time, or writes over what is there
            file.write_text(whole[: 100 * len(looks)] if len(looks) < 3 else whole)
            os.utime(file, (1, 1))
        if len(looks) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", rest)
    monkeypatch.setattr(command, "_learn_file", lambda session, file, *asked: learnt.append(file.read_text()))
    run(folder, "--watch", inbox, *SHORT)
    assert learnt == [whole]
    assert set(looks) == {command.SECONDS}


@pytest.mark.slow
def test_a_watched_file_of_which_some_skills_were_learnt_is_gone_on_with(folder, monkeypatch, two_skills):
    inbox, looks = folder.parent / "inbox", []
    inbox.mkdir()
    shutil.copy(folder.parent / "code.jsonl", inbox)

    def rest(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", rest)
    with monkeypatch.context() as patched:
        cut_off_after(1, folder, patched)
        run(folder, "--watch", inbox, "--skills", "2", *SHORT)
    looks.clear()
    _, said = run(folder, "--watch", inbox, "--skills", "2", *SHORT)
    assert "Learnt before: code_1, of code_1, code_2." in said
    looks.clear()
    assert "code.jsonl was learnt before." in run(folder, "--watch", inbox, "--skills", "2", *SHORT)[1]
    assert load(folder).expert_names == [*OLD, "code_1", "code_2"]


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
