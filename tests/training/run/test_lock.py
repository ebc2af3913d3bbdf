"""One process at a time trains in a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from dylora_moe.training.run.lock import FolderLock

HOLD = """
import sys, time
from pathlib import Path
from dylora_moe.training.run.lock import FolderLock
with FolderLock(Path(sys.argv[1])).hold():
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_named_and_a_killed_one_gives_it_back(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    for shared in (False, True):
        with (
            pytest.raises(ValueError, match=rf"being trained by another process \(pid {child.pid}\)"),
            FolderLock(tmp_path).hold(shared),
        ):
            raise AssertionError
    child.kill()
    child.wait()
    with FolderLock(tmp_path).hold():
        assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()}"


def test_sharing_keeps_out_those_who_do_not(tmp_path):
    both = FolderLock(tmp_path).hold(shared=True), FolderLock(tmp_path).hold(shared=True)
    with both[0], both[1], pytest.raises(ValueError, match="another process"), FolderLock(tmp_path).hold():
        raise AssertionError


def test_nothing_is_left_behind_and_holding_twice_is_holding(tmp_path):
    lock = FolderLock(tmp_path / "run")
    with lock.hold():
        with lock.hold():
            pass
        with pytest.raises(ValueError, match="another process"), FolderLock(tmp_path / "run").hold():
            raise AssertionError
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal for a dead parent is Linux's")
def test_a_process_stops_with_the_one_that_started_it():
    code = (
        "import subprocess, sys, time; from dylora_moe.training.run.launch import _APART; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], **_APART); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 10
    while _alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
