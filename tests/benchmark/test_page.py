"""What a run leaves behind, and the figures that are to be reached."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from dylora_moe.benchmark.kinds import KINDS
from dylora_moe.benchmark.machine import slug
from dylora_moe.benchmark.page import add_run, read_causes, write_page
from dylora_moe.benchmark.run import FORMAT_VERSION, run
from dylora_moe.benchmark.settings import Settings
from dylora_moe.benchmark.targets import PLANS, TARGETS, is_plan, outcome
from dylora_moe.cli import app, main

cli = CliRunner()
TINY = ["--shape", "tiny", "--experts", "4", "--batch", "1", "--length", "8", "--rank", "4"]


def results(plan="training", **seconds):
    machine = {"name": "Some CPU, 2 cores", "threads": 2, "python": "3.11", "versions": {"torch": "2"}}
    rows = [
        {"key": key, "title": key, "experts": None, "seconds": values, "ratio": [1.0, 1.0, 1.0]}
        for key, values in seconds.items()
    ]
    settings = PLANS[plan]
    told = {"settings": settings.to_dict(), "command": settings.command(), "machine": machine, "seconds": 1.0}
    return {"format_version": FORMAT_VERSION, **told, "missing": {"xlora/8": "it does not run"}, "rows": rows}


TIMES = {"auto/8": [1.0, 2.0, 3.0], "peft-wide/8": [1.0, 2.0, 3.0], "loop/8": [1.5, 3.0, 4.5]}


def test_page_says_what_is_met_what_is_missed_and_why(tmp_path):
    folder = tmp_path / "day"
    page = add_run(results(**TIMES), folder).read_text()
    assert "| training step, against PEFT of rank 8r | ≤ 1.05 | 1.000 [1.000, 1.000] | met |" in page
    assert (
        "| training step, the loop takes longer | ≥ 1.8 | 1.500 [1.500, 1.500] | **missed by 16.7%**: cause not" in page
    )
    assert "not measured: it does not run" in page
    assert "not measured: `dylora-moe bench --plan generation`" in page
    assert PLANS["training"].command() in page
    (folder / "causes.md").write_text("# Causes\n\n## training step, the loop takes longer\n\nThe loop\nis quick.\n")
    assert "**missed by 16.7%**: The loop is quick. |" in write_page(folder).read_text()
    (folder / "causes.md").write_text("## no such figure\n\nText.\n")
    with pytest.raises(ValueError, match="no such figure"):
        write_page(folder)


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


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}', '{"format_version": 99}'])
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        write_page(tmp_path)


@pytest.mark.parametrize("part", ["rows", "machine", "missing", "command"])
def test_a_result_that_lacks_a_part_is_named(tmp_path, part):
    whole = results(**TIMES)
    del whole[part]
    (tmp_path / "x.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"x\.json"):
        write_page(tmp_path)


def test_runs_that_differ_have_files_of_their_own():
    one = Settings("decode", "tiny", (4,), ("base", "auto"))
    others = [
        replace(one, **change)
        for change in (
            {"variants": ("base", "dense")},
            {"new_tokens": 5},
            {"top_k": 1},
            {"router_layer": 1},
            {"rounds": 0},
            {"seed": 3},
            {"experts": (4, 8)},
        )
    ]
    assert len({settings.name for settings in (one, *others)}) == len(others) + 1
    assert replace(one, rounds=3).name == one.name


@pytest.mark.parametrize("change", [{"variants": ()}, {"experts": (8, 8)}])
def test_nothing_or_twice_the_same_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Settings("train", "tiny", **change)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "tpu", "cuda:x"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=device):
        run(Settings("train", "tiny", (2,), ("base",), rounds=0, device=device))


def test_targets_name_variants_of_their_plans():
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        settings = PLANS[target.plan]
        for key in filter(None, (target.of, target.against)):
            kind, _, size = key.partition("/")
            assert kind in settings.kinds, target.name
            assert KINDS[kind].per_experts == bool(size), target.name
            assert not size or int(size) in settings.experts, target.name
    assert {target.plan for target in TARGETS} | {"experts", "experts-prefill", "generation-peers"} == set(PLANS)


def test_plan_is_recognised_by_what_it_measures():
    training = PLANS["training"]
    assert is_plan(replace(training, plan=None, rounds=3, seed=5), "training")
    assert not is_plan(replace(training, batch=1), "training")
    assert not is_plan(replace(training, rounds=0), "training")


def test_counted_target():
    counted = results("saved")
    counted["rows"] = [
        {"key": "auto/8", "saved_in_layers": 106},
        {"key": "peft-same-dtype", "saved_in_layers": 100},
    ]
    target = next(t for t in TARGETS if t.name == "saved bytes, against one bf16 PEFT adapter")
    found = outcome(target, counted)
    assert (found.value, found.met) == (1.06, False)
    assert found.gap == pytest.approx(0.01 / 1.05)


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


def test_machine_names_become_file_names():
    assert slug("AMD EPYC 9V74, 2 cores") == "amd-epyc-9v74-2-cores"


def test_no_causes_is_no_mistake(tmp_path):
    assert read_causes(tmp_path / "causes.md") == {}
