"""The folder of a run: what it was begun with is kept, and only the same run goes on in it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml

from dylora_moe import CheckpointError
from dylora_moe.schema import RecipeError
from dylora_moe.training.recipe.recipe import load_recipe, parse_recipe
from dylora_moe.training.recipe.sections import Recipe
from dylora_moe.training.run.arguments import resolved
from dylora_moe.training.run.folder import differences
from dylora_moe.training.run.job import Job
from runs import QUIET, run, tensors


def test_resume_with_another_recipe_is_refused(content, tmp_path):
    run(content(max_steps=2))
    with pytest.raises(RecipeError, match=r"train\.learning_rate was 0\.01, is 0\.02"):
        run(content(max_steps=2, learning_rate=2e-2), resume=True)
    changed = content(max_steps=2)
    changed["eval"]["batch_size"] = 1  # does not touch the training
    run(changed, resume=True)


def test_resume_needs_a_run(content, tmp_path):
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        run(content(max_steps=2), resume=True)
    run(content(max_steps=2))
    file = tmp_path / "run" / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "world_size": 4}))
    with pytest.raises(RecipeError, match="begun with 4 processes; resume with as many, not with 1"):
        run(content(max_steps=2), resume=True)


def test_unfinished_work_is_not_thrown_away(content, tmp_path):
    run(content(max_steps=2))
    run(content(max_steps=2))  # a finished run is replaced
    (tmp_path / "run" / "results.json").unlink()
    before = tensors(tmp_path / "run")
    with pytest.raises(ValueError, match=r"cut off .*--resume"):
        run(content(max_steps=2))
    assert all(torch.equal(value, before[key]) for key, value in tensors(tmp_path / "run").items())


def test_resume_with_other_data_is_refused(content, tmp_path):
    file = tmp_path / "date.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    changed = content(max_steps=2)
    changed["experts"]["date"]["data"] = {"train": str(file)}
    run(changed)
    file.write_text('{"prompt": "a", "completion": "c"}\n')
    with pytest.raises(RecipeError, match=r"begun with other data for 'date' \(1 examples"):
        run(changed, resume=True)


def test_output_that_cannot_be_written_is_said_before_training(content, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((CheckpointError, ValueError), match="file"):
        run({**content(max_steps=2), "output": str(tmp_path / "file" / "run")})


def test_tokens_stay_out_of_the_folder(content, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dylora-moe", "train", "--set", "train.hub_token=hf_secret"])
    Job(parse_recipe(content(hub_token="hf_secret")), QUIET).begin()
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) == 2
    assert not any("hf_secret" in file.read_text() for file in files)


def test_environment_and_recipe_are_kept(content, tmp_path):
    run(content(max_steps=1))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["seed"] == 0
    assert environment["world_size"] == 1
    assert environment["versions"]["torch"] == torch.__version__
    kept = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert isinstance(kept, Recipe)
    assert resolved(kept, 256) == resolved(parse_recipe(content(max_steps=1)), 256)
    assert kept.train.arguments["max_length"] == 256  # the base's context


def test_a_run_begun_when_fewer_keys_were_written_still_resumes(content, tmp_path):
    """Its recipe had the keys of its own and what it set, and no field of SFTConfig beside that."""
    recipe = parse_recipe(content(max_steps=2))
    run(content(max_steps=2))
    written = recipe.to_dict()
    for key in ("quantization", "chat_template", "attn_implementation", "device_map", "trust_remote_code"):
        del written["base"][key]
    for expert in written["experts"].values():
        for key in ("template", "test_columns", "test_template"):
            del expert["data"][key]
    file = tmp_path / "run" / "recipe.yaml"
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    assert run(content(max_steps=2), resume=True).results.columns
    file.write_text(yaml.safe_dump({**written, "train": {**written["train"], "weight_decay": 0.5}}))
    with pytest.raises(RecipeError, match=r"train\.weight_decay was 0\.5, is None"):
        run(content(max_steps=2), resume=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000, r"recipe\.yaml: nested too deeply"),
        ("experts: null", r"recipe\.yaml: experts: none given"),
        ("base: 3\nexperts: {a: {data: {skill: sql}}}", r"recipe\.yaml: base: expected a mapping, got 3"),
        ("at: 2020-99-99", r"recipe\.yaml: not valid YAML: month must be"),
        ("seed: [1,", r"recipe\.yaml: not valid YAML"),
    ],
)
def test_a_recipe_of_a_run_that_is_none_is_named(content, tmp_path, text, message):
    Job(parse_recipe(content()), QUIET).begin()
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        run(content(), resume=True)


@pytest.mark.parametrize("text", ["null", "{}", "[1]", "[" * 100000])
def test_a_history_without_rows_is_named(content, tmp_path, text):
    job = Job(parse_recipe(content()), QUIET)
    folder = job.folder.stage(job.stages[0])
    folder.mkdir(parents=True)
    (folder / "history.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"joint/history\.json is damaged"):
        job.folder.history(job.stages)


def test_an_environment_with_null_where_a_mapping_belongs_is_named(content, tmp_path):
    run(content(max_steps=1))
    file = tmp_path / "run" / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "data": ["x"]}))
    with pytest.raises(CheckpointError, match=r"environment\.json: 'data' holds \['x'\]; expected a mapping"):
        run(content(max_steps=1), resume=True)


@pytest.mark.parametrize(("name", "text"), [("recipe.yaml", ""), ("environment.json", "[]"), ("environment.json", "")])
def test_damaged_descriptions_of_a_run_are_named(content, tmp_path, name, text):
    Job(parse_recipe(content()), QUIET).begin()
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{name}.* start afresh"):
        run(content(), resume=True)


def test_a_damaged_history_is_named(content, tmp_path):
    job = Job(parse_recipe(content()), QUIET)
    folder = job.folder.stage(job.stages[0])
    folder.mkdir(parents=True)
    (folder / "history.json").write_text("")
    with pytest.raises(CheckpointError, match=r"joint/history\.json is damaged"):
        job.folder.history(job.stages)


def test_differences_name_the_leaves():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c was 2, is 3",
        "d was None, is 4",
    ]
