"""Threads that share a model take turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CallLock:
    """A re-entrant lock that may be copied and pickled with its model: a copy gets a lock of its own.

    What is in force is per model, so two threads must not be inside one model at the same time.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other thread is inside; a compiled graph takes no lock."""
        if torch.compiler.is_compiling():
            yield
            return
        with self._lock:
            yield

    def __deepcopy__(self, memo: dict) -> CallLock:
        return CallLock()

    def __reduce__(self) -> tuple:
        return CallLock, ()
