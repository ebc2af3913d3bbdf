"""Several processes through the command line: what one process would do, signals and failures included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from dylora_moe.training.recipe.recipe import load_recipe
from dylora_moe.training.run import launch
from dylora_moe.training.run.job import Job
from runs import QUIET, STAGED, assert_same_run, history, run, small_recipe, tensors, write
from tinybase import save_tiny_base

FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
}
EQUAL = {"train_sampling_strategy": "sequential", "learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def content(base, tmp_path):
    """A recipe as plain values without dropout; keyword arguments are keys of `train`."""

    def make(name="run", **train):
        recipe = small_recipe(base, tmp_path / name, **train)
        recipe["mixture"] |= {"lora_dropout": 0.0, "balance_coefficient": 1.0}
        return recipe

    return make


def start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dylora_moe", "train", "--no-report", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def assert_close_runs(one, other) -> None:
    """The same run within the rounding of float32, whose sums are cut differently.

    Adam divides by the gradient's size, so a gradient near zero moves its tensor by rounding alone: the tensors may
    differ by a 300th of what three steps of 1e-3 move them.
    """
    ours, theirs = tensors(one), tensors(other)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5, msg=key)
    first, second = ([row for row in history(folder) if "loss" in row] for folder in (one, other))
    assert len(first) == len(second)
    for row, reference in zip(first, second, strict=True):
        for key in {"loss", "aux_loss", "router/balance", "router/load/date", "grad_norm"} & set(reference):
            assert row[key] == pytest.approx(reference[key], rel=2e-4, abs=1e-6), key


def test_accumulation_1x8_equals_8x1(content, tmp_path):
    run(content("whole", **EQUAL, per_device_train_batch_size=8))
    run(content("parts", **EQUAL, per_device_train_batch_size=1, gradient_accumulation_steps=8))
    assert_close_runs(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "train",
    [EQUAL, {**EQUAL, **STAGED, **FSDP2}],
    ids=["DDP joint", "FSDP2 staged"],
)
@pytest.mark.slow
def test_two_processes_times_four_equal_one_times_eight(content, tmp_path, train):
    train = {key: value for key, value in train.items() if not (train.get("method") and key == "max_steps")}
    alone = {key: value for key, value in train.items() if not key.startswith("fsdp")}
    run(content("one", **alone, per_device_train_batch_size=8))
    file = write(content("two", **train, per_device_train_batch_size=4), tmp_path / "recipe.yaml")
    child = start(str(file), "--num-processes", "2")
    output, message = child.communicate()
    assert child.returncode == 0, message.decode()[-3000:]
    assert b"identical answers" in output
    assert_close_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_signal_stops_all_processes_and_the_run_goes_on(content, tmp_path):
    train = {**EQUAL, "max_steps": 60, "save_steps": 50}
    file = write(content(**train, per_device_train_batch_size=4), tmp_path / "recipe.yaml")
    child = start(str(file), "--num-processes", "2")
    assert child.stdout is not None
    for line in child.stdout:
        if b"joint 3/" in line:
            break
    child.send_signal(signal.SIGTERM)
    message = child.communicate()[1].decode()
    assert child.returncode == 143, message[-3000:]
    [mark] = (tmp_path / "run").glob("stages/joint/checkpoint-*/complete")
    stopped_at = int(mark.parent.name.removeprefix("checkpoint-"))
    assert 3 <= stopped_at < 50
    child = start(str(file), "--num-processes", "2", "--resume")
    message = child.communicate()[1].decode()
    assert child.returncode == 0, message[-3000:]
    steps = [row["step"] for row in history(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 61))


def test_a_failed_rank_is_said(content, tmp_path, capfd):
    file = write(content(max_steps=2), tmp_path / "recipe.yaml")
    with pytest.raises(launch.LaunchError, match="a rank of the 2 processes failed"):
        launch.processes(["train", str(file), "--set", "train.no_such_key=1"], 2)
    assert "no_such_key" in capfd.readouterr().err


@pytest.mark.slow
def test_experts_can_be_trained_at_the_same_time(content, tmp_path):
    run(content("whole", **STAGED))
    file = write(content("apart", **STAGED), tmp_path / "recipe.yaml")
    job = Job(load_recipe(file), QUIET)
    job.begin()
    launch.stages(job, launch.arguments(file, [], resume=True), 2, QUIET)
    done = sorted(folder.parent.name for folder in (tmp_path / "apart" / "stages").glob("*/complete"))
    assert done == ["expert-cart", "expert-date"]
    Job(load_recipe(file), QUIET).run(resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "apart")


def test_a_failed_stage_names_its_log(content, tmp_path):
    file = write(content("apart", **STAGED), tmp_path / "recipe.yaml")
    job = Job(load_recipe(file), QUIET)
    job.begin()
    with pytest.raises(launch.LaunchError, match=r"expert-date.*log\.txt.*--resume"):
        launch.stages(job, ["no-such-command"], 2, QUIET)


@pytest.mark.parametrize(("visible", "given"), [(None, ["0", "1"]), ("4,7", ["4", "7"]), ("", ["", ""])])
def test_stages_at_the_same_time_have_a_device_each(content, tmp_path, monkeypatch, visible, given):
    """Two GPUs; the processes that would use them are not started."""
    environments = []

    class Ended:
        pid = returncode = 0

        def __init__(self, *command, env, **options):
            environments.append(env.get("CUDA_VISIBLE_DEVICES"))

        def poll(self):
            return 0

    job = Job(load_recipe(write(content("apart", **STAGED), tmp_path / "recipe.yaml")), QUIET)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch.subprocess, "Popen", Ended)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launch.stages(job, [], 2, QUIET)
    assert environments == given
