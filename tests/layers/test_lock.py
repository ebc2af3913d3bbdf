"""Threads that share a model take turns; a copy has a turn of its own."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest

from dylora_moe.layers.lock import CallLock


def entered(lock: CallLock) -> bool:
    """Whether another thread gets in now."""
    inside = threading.Event()

    def enter() -> None:
        with lock.turn():
            inside.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    thread.join(0.2)
    return inside.is_set()


def test_one_thread_at_a_time_and_again_from_within():
    lock = CallLock()
    with lock.turn(), lock.turn():
        assert not entered(lock)
    assert entered(lock)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda lock: pickle.loads(pickle.dumps(lock))])
def test_a_copy_is_free(duplicate):
    lock = CallLock()
    with lock.turn():
        assert entered(duplicate(lock))
