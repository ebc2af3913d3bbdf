"""Threads that share a model take turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CallLock:
    """A re-entrant lock that may be copied and pickled with its model: a copy gets a lock of its own.

    What is in force is per model, so two threads must not be inside one model at the same time. It is fair: who leaves
    and comes back at once finds the one who waits before him.
    """

    def __init__(self) -> None:
        self._lock, self._door = threading.Lock(), threading.Lock()
        self._inside: int | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other thread is inside; a compiled graph takes no lock."""
        if torch.compiler.is_compiling():
            yield
            return
        own = threading.get_ident()
        if self._inside == own:
            yield
            return
        with self._door:  # held by the one who is next
            self._lock.acquire()
        try:
            self._inside = own
            yield
        finally:
            self._inside = None
            self._lock.release()

    def __deepcopy__(self, memo: dict) -> CallLock:
        return CallLock()

    def __reduce__(self) -> tuple:
        return CallLock, ()
