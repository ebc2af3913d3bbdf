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


def test_who_waits_is_next():
    lock, order = CallLock(), []
    started, ended = threading.Event(), threading.Event()

    def other() -> None:
        started.set()
        while not ended.is_set():
            with lock.turn():
                order.append("other")

    thread = threading.Thread(target=other, daemon=True)
    with lock.turn():
        thread.start()
        started.wait()
        threading.Event().wait(0.05)  # it stands at the door
    for _ in range(20):
        with lock.turn():
            order.append("own")
            threading.Event().wait(0.01)  # again
    ended.set()
    thread.join()
    assert order.count("other") >= 20
    assert all(order[at : at + 2] != ["own", "own"] for at in range(len(order)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda lock: pickle.loads(pickle.dumps(lock))])
def test_a_copy_is_free(duplicate):
    lock = CallLock()
    with lock.turn():
        assert entered(duplicate(lock))
