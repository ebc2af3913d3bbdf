"""Starting further processes: the ranks of one job, or stages as jobs of their own. Signals are passed on to them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console

from .folder import is_finished
from .job import PARENT_VARIABLE

if TYPE_CHECKING:
    from .job import Job

LOG_FILE = "log.txt"


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _stop_with_parent() -> None:
    """Let the kernel send this process SIGTERM when the one that started it is gone, however it ended (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_APART: dict[str, Any] = {"start_new_session": True, "preexec_fn": _stop_with_parent}
"""How processes are started: away from the terminal's signals, which are passed on to them, and never left alone."""


class LaunchError(ValueError):
    """A process that was started failed."""


def arguments(
    recipe: Path, overrides: Iterable[str], resume: bool = False, report: bool = True, stage: str | None = None
) -> list[str]:
    """The command line's arguments for a process that runs the same recipe."""
    options = [part for override in overrides for part in ("--set", override)]
    options += ["--resume"] if resume else []
    options += [] if report else ["--no-report"]
    options += ["--stage", stage] if stage else []
    return ["train", str(recipe), *options]


def processes(command: list[str], count: int) -> None:
    """Run `dylora-moe` with the arguments `command` as `count` ranks of one job on this machine, by torchrun.

    SIGTERM and SIGINT go to the ranks, which finish their step, save and stop; torchrun itself would kill them.

    Raises:
        LaunchError: a rank failed.
        SystemExit: with 128 + the signal's number, once the ranks have stopped after a signal.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP would wonder in every process about unused parameters
        **os.environ,
    }
    child = subprocess.Popen([*torchrun, "-m", "dylora_moe", *command], env=environment, **_APART)
    with _passing_signals(lambda: psutil.Process(child.pid).children()) as received:
        code = child.wait()
    if received:
        sys.exit(128 + received[0])
    if code:
        raise LaunchError(f"a rank of the {count} processes failed (its message is above).")


def stages(job: Job, command: list[str], count: int, console: Console) -> None:
    """Train the experts' stages of a job that has begun, each as a job of its own, `count` at a time.

    Their output goes to `stages/NAME/log.txt`. Each sees one of the accelerators, in turn, if there are any.

    Raises:
        LaunchError: a stage failed; the others were let finish.
        SystemExit: with 128 + the signal's number, once the jobs have stopped after a signal.
    """
    waiting = [stage for stage in job.stages if not stage.router and not is_finished(job.folder.stage(stage))]
    if not waiting:
        return
    slots: dict[int, tuple[str, subprocess.Popen[Any]]] = {}
    failed: list[str] = []
    every = ",".join(map(str, range(torch.cuda.device_count())))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", every)
    devices = visible.split(",") if visible else []
    with _passing_signals(lambda: [psutil.Process(child.pid) for _, child in slots.values()]) as received:
        while slots or (waiting and not received):
            for slot in set(range(count)) - set(slots):
                if not waiting or received:
                    break
                stage = waiting.pop(0)
                folder = job.folder.stage(stage)
                folder.mkdir(parents=True, exist_ok=True)
                threads = str(max(1, (os.cpu_count() or 1) // count))
                environment = {"OMP_NUM_THREADS": threads, **os.environ, PARENT_VARIABLE: str(os.getpid())}
                if devices:
                    environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
                with (folder / LOG_FILE).open("ab") as log:
                    own = [sys.executable, "-m", "dylora_moe", *command, "--stage", stage.name]
                    child = subprocess.Popen(own, env=environment, stdout=log, stderr=subprocess.STDOUT, **_APART)
                slots[slot] = (stage.name, child)
                console.print(f"{stage.name}: started (output in {folder / LOG_FILE})", highlight=False)
            for slot, (name, child) in list(slots.items()):
                if child.poll() is not None:
                    del slots[slot]
                    console.print(f"{name}: {'finished' if not child.returncode else 'stopped'}", highlight=False)
                    if child.returncode:
                        failed.append(name)
            time.sleep(0.1)
    if received:
        sys.exit(128 + received[0])
    if failed:
        logs = ", ".join(str(job.folder.path / "stages" / name / LOG_FILE) for name in failed)
        raise LaunchError(f"{', '.join(failed)} failed; see {logs}. Then go on with --resume.")


@contextmanager
def _passing_signals(children: Callable[[], list[psutil.Process]]) -> Iterator[list[int]]:
    """Pass SIGTERM and SIGINT on to the children; yields the list of signals received."""
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for child in children():
            if child.is_running():
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
