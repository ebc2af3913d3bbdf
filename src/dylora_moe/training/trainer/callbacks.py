"""Watching a run: a progress bar with the live loss, its speed, and a warning when an expert starves."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

DEAD_LOAD = 0.01
SHOWN = {"loss": "loss", "lm_loss": "lm", "aux_loss": "aux", "router/entropy": "entropy"}


class ProgressBar(TrainerCallback):
    """A rich progress bar with loss, language-model loss, auxiliary loss, tokens/s and the time left.

    Args:
        console: where to draw; a line per log is printed instead where it is no terminal.
        title: what is being trained.
    """

    def __init__(self, console: Console, title: str = "training"):
        self.console, self.title = console, title
        self.progress: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
        )
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=state.max_steps, numbers="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ):
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        numbers = [f"{label} {float(logs[key]):.3f}" for key, label in SHOWN.items() if key in logs]
        if "tokens_per_second" in logs:
            numbers.append(f"{float(logs['tokens_per_second']):,.0f} tok/s")
        text = "  ".join(numbers)
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step, numbers=text)
        else:
            self.console.print(f"{self.title} {state.global_step}/{state.max_steps}  {text}", highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class Speed:
    """Tokens per second from one reading to the next."""

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, tokens: int) -> None:
        """Count from here; `tokens` were seen so far."""
        self.since, self.tokens = time.perf_counter(), tokens

    def read(self, tokens: int) -> float:
        """The speed since the last reading, now that `tokens` were seen in all; the next one counts from here."""
        since, before = self.since, self.tokens
        self.restart(tokens)
        return round((tokens - before) / max(self.since - since, 1e-9), 1)


class StarvedExperts:
    """Counts for how many optimizer steps in a row each expert has had a load under 1 %, and warns.

    Args:
        patience: warn after so many steps, once per famine.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.steps: dict[str, int] = {}

    def update(self, load: Mapping[str, float]) -> int:
        """Note one step's load per expert; returns how many experts are under 1 %."""
        for name, share in load.items():
            self.steps[name] = self.steps.get(name, 0) + 1 if share < DEAD_LOAD else 0
            if self.steps[name] == self.patience:
                logger.warning(
                    "Expert %r has received under 1 %% of the tokens for %d steps: the router is collapsing. Raise "
                    "mixture.balance_coefficient or mixture.temperature, or set train.domain_coefficient if the "
                    "examples' domains should decide.",
                    name,
                    self.patience,
                )
        return sum(share < DEAD_LOAD for share in load.values())
