"""A run that was cut off and resumed ends exactly where the uninterrupted one does."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import TrainerCallback
from trl import SFTConfig

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig
from dylora_moe.training.trainer.checkpoints import (
    COMPLETE_FILE,
    EXEMPT_FROM_RESUME,
    RestoreAverages,
    last_complete,
)
from dylora_moe.training.trainer.interrupted import Interrupted
from dylora_moe.training.trainer.trainer import MoETrainer
from tinybase import tiny_base, tiny_tokenizer

STEPS = 6


class Killed(Exception):
    """Stands for kill -9."""


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class Send(TrainerCallback):
    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def trainer(folder, callbacks=(), **options) -> MoETrainer:
    torch.manual_seed(1)
    config = MoELoraConfig(expert_names=["a", "b"], r=4, target_modules="all-linear", lora_dropout=0.2)
    rows = [{"prompt": f"ask {i}", "completion": f" answer {i * i}", "domain": "ab"[i % 2]} for i in range(20)]
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "activation_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 3,  # not a multiple of the saves: averages are resumed in the middle
        "disable_tqdm": True,
        **options,
    }
    return MoETrainer(
        DyLoraMoE.from_base(tiny_base(), config),
        args=SFTConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        domain_coefficient=0.1,
    )


def state(run: MoETrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.mixture.state_dict().items()}


def logs(run: MoETrainer) -> list[dict]:
    """The log without the fields that are exempt."""
    return [{k: v for k, v in row.items() if k not in EXEMPT_FROM_RESUME} for row in run.state.log_history]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("whole"))
    run.train()
    return state(run), logs(run)


@pytest.mark.parametrize("step", [3, 5])
def test_resumed_equals_uninterrupted_bitwise(tmp_path, uninterrupted, step):
    with pytest.raises(Killed):
        trainer(tmp_path, [Die(step)]).train()
    run = trainer(tmp_path)
    torch.manual_seed(99)  # the RNG comes from the checkpoint
    run.train(resume_from_checkpoint=True)
    expected, expected_logs = uninterrupted
    for name, value in state(run).items():
        assert torch.equal(value, expected[name]), name
    assert logs(run) == expected_logs


def test_dropout_and_data_order_matter_to_this_test(tmp_path, uninterrupted):
    run = trainer(tmp_path, seed=7)
    run.train()
    assert any(not torch.equal(value, uninterrupted[0][name]) for name, value in state(run).items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_stops(tmp_path, uninterrupted, number):
    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match=r"--resume, or in Python with train\(resume_from_checkpoint=True\)"
    ) as stopped:
        trainer(tmp_path, [Send(number, 2)]).train()
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert last_complete(tmp_path).name == "checkpoint-3"
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, uninterrupted[0][name]) for name, value in state(run).items())


def test_an_incomplete_checkpoint_is_never_resumed_from(tmp_path):
    trainer(tmp_path).train()
    assert last_complete(tmp_path).name == "checkpoint-6"
    (tmp_path / "checkpoint-6" / COMPLETE_FILE).unlink()
    assert last_complete(tmp_path).name == "checkpoint-4"
    with pytest.raises(CheckpointError, match="not written to its end"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / COMPLETE_FILE).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("io error"), RuntimeError("x")]
)
def test_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, error):
    run = trainer(tmp_path)
    original = run._save_rng_state

    def fail(folder):
        if folder.endswith("-4"):
            raise error
        original(folder)

    monkeypatch.setattr(run, "_save_rng_state", fail)
    with pytest.raises(CheckpointError, match="could not be written") as raised:
        run.train()
    assert "checkpoint-2" in str(raised.value)
    assert last_complete(tmp_path).name == "checkpoint-2"


def test_rotation_keeps_the_newest_whole_one(tmp_path):
    trainer(tmp_path, save_total_limit=1).train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        run.mixture.expert_tensors("a")[0].tensor.fill_(float("nan"))
    router = run.mixture.router.up.detach().clone()
    with pytest.raises(FloatingPointError, match=r"at step 1\. .*another --output.*`start`.*bad weights"):
        run.train()
    assert torch.equal(run.mixture.router.up, router)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", b""),
        ("trainer_state.json", b"{"),
        *(
            pytest.param(name, content, marks=pytest.mark.slow)
            for name in ("trainer_state.json", "trainer_averages.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
            for content in (b"", b"{")
        ),
    ],
)
def test_a_damaged_checkpoint_says_what_to_do(tmp_path, name, content):
    trainer(tmp_path).train()
    (tmp_path / "checkpoint-6" / COMPLETE_FILE).unlink()
    (tmp_path / "checkpoint-4" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint-4\b.* Delete this folder; --resume"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_speed_after_a_resume_counts_no_tokens_of_before(tmp_path):
    run = trainer(tmp_path)
    run.train()
    before = run._total_train_tokens
    run = trainer(tmp_path)
    run._tr_loss = torch.zeros(())
    RestoreAverages(run, run.starved, run.speed, tmp_path / "checkpoint-6").on_train_begin(
        run.args, run.state, run.control
    )
    assert run.speed.tokens == before > 0


def test_restore_leaves_the_mixture_alone_on_error(tmp_path):
    run = trainer(tmp_path)
    run.train()
    before = state(run)
    folder = tmp_path / "checkpoint-2"
    (folder / "b" / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated"):
        run.mixture.restore(folder)
    assert all(torch.equal(value, before[name]) for name, value in state(run).items())
