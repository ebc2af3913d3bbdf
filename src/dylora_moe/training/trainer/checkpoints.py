"""Checkpoints of a run in progress: whole ones only, with all that a resumed run needs to continue to the bit.

output/checkpoint-120/           the mixture, as `save_pretrained` writes it
output/checkpoint-120/*.pt|pth   optimizer, scheduler, RNG (torch files, read by the trainer that wrote them)
output/checkpoint-120/trainer_averages.json
output/checkpoint-120/complete   written last; without it a checkpoint is never resumed from
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, cast

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from dylora_moe.checkpoint.files import CheckpointError, read_json

from .callbacks import Speed, StarvedExperts
from .distributed import greatest

COMPLETE_FILE = "complete"
AVERAGES_FILE = "trainer_averages.json"
EXEMPT_FROM_RESUME = (
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "total_flos",
    "tokens_per_second",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
)
"""Log fields about one session of a run; everything else is the same in a resumed run as in an uninterrupted one."""

_NUMBERED = re.compile(r"checkpoint-(\d+)")


def mark_complete(folder: Path) -> None:
    """Say that everything in `folder` has been written."""
    (folder / COMPLETE_FILE).touch()


def mark_incomplete(folder: Path) -> None:
    """Say that `folder` is being written."""
    (folder / COMPLETE_FILE).unlink(missing_ok=True)


def last_complete(output: str | Path) -> Path | None:
    """The whole checkpoint with the highest step in `output`; None if there is none."""
    folders = {}
    for folder in Path(output).glob("checkpoint-*"):
        match = _NUMBERED.fullmatch(folder.name)
        if match and (folder / COMPLETE_FILE).is_file():
            folders[int(match[1])] = folder
    return folders[max(folders)] if folders else None


def checkpoint_to_resume(asked: str | bool | None, output: str) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: with True the last whole one in `output`; None for none.

    Raises:
        CheckpointError: there is none, or it was not written to its end.
    """
    if not asked:
        return None
    folder = last_complete(output) if asked is True else Path(asked)
    if folder is None:
        raise CheckpointError(f"{output} holds no whole checkpoint to resume from.")
    if not (folder / COMPLETE_FILE).is_file():
        raise CheckpointError(
            f"{folder} was not written to its end ({COMPLETE_FILE!r} is missing); resume an older one."
        )
    return folder


def ended(folder: Path) -> bool:
    """Whether the training was over when the checkpoint in `folder` was written.

    Raises:
        CheckpointError: its file is damaged.
    """
    with naming_damage(folder, "trainer"):
        state = read_json(folder / TRAINER_STATE_NAME)
    stopped = any(
        callback["attributes"]["early_stopping_patience_counter"] >= callback["args"]["early_stopping_patience"]
        for entry in [state["stateful_callbacks"].get("EarlyStoppingCallback", [])]
        for callback in (entry if isinstance(entry, list) else [entry])
    )
    return stopped or state["global_step"] >= state["max_steps"]


@contextmanager
def naming_damage(folder: str | Path | None, part: str) -> Iterator[None]:
    """Within the block a file of a checkpoint that cannot be read is a `CheckpointError` that says what to do.

    Args:
        folder: the checkpoint.
        part: what is read of it, for the message.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (CheckpointError, EOFError, OSError, RuntimeError, UnpicklingError, ValueError) as error:
        reason = str(error) if isinstance(error, CheckpointError) else type(error).__name__  # torch's is advice
        raise CheckpointError(
            f"{folder} is damaged ({part} state: {reason}). Delete this folder; --resume then "
            "goes on from the checkpoint before it."
        ) from error


def save_averages(trainer: SFTTrainer, starved: StarvedExperts, folder: Path) -> None:
    """Keep the averages that a trainer is in the middle of; every process takes part, the first one writes."""
    losses = cast(torch.Tensor, trainer.accelerator.gather(trainer._tr_loss.double().reshape(1))).tolist()
    if not trainer.args.should_save:
        return
    averages = {
        "metrics": {mode: dict(values) for mode, values in trainer._metrics.items()},
        "total_train_tokens": trainer._total_train_tokens,
        "loss_since_log": losses,  # of each process
        "last_logged": trainer._globalstep_last_logged,
        "starved": starved.steps,
        "patience_used": [callback.early_stopping_patience_counter for callback in _early_stopping(trainer)],
    }
    (folder / AVERAGES_FILE).write_text(json.dumps(averages), encoding="utf-8")


class RestoreAverages(TrainerCallback):
    """Puts the averages of a checkpoint back once a resumed trainer has cleared its own."""

    def __init__(self, trainer: SFTTrainer, starved: StarvedExperts, speed: Speed, folder: Path):
        self.trainer, self.starved, self.speed, self.file = trainer, starved, speed, folder / AVERAGES_FILE

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        with naming_damage(self.file.parent, "averages"):
            averages = read_json(self.file)
        trainer = self.trainer
        for mode, values in averages["metrics"].items():
            trainer._metrics[mode].update(values)
        trainer._total_train_tokens = averages["total_train_tokens"]
        self.speed.restart(trainer._total_train_tokens)
        losses = averages["loss_since_log"]
        own = losses[args.process_index] if len(losses) == args.world_size else sum(losses) / len(losses)
        trainer._tr_loss = torch.tensor(own, device=trainer._tr_loss.device).to(trainer._tr_loss.dtype)
        trainer._globalstep_last_logged = averages["last_logged"]
        self.starved.steps = averages["starved"]
        for callback, used in zip(_early_stopping(trainer), averages["patience_used"], strict=False):
            callback.early_stopping_patience_counter = used


def _early_stopping(trainer: SFTTrainer) -> list[EarlyStoppingCallback]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT finish the optimizer step, save and stop; another one a second later acts at once.

    Sooner it is the same one: torchrun forwards what its processes have received themselves.
    Trainer's own just-in-time checkpoint saves in the middle of a step, from which no exact resume is possible.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.received = greatest(self.received or 0, args.device) or None  # it may have reached one process only
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > 1.0:
            self.restore_handlers()
            signal.raise_signal(number)
