"""The thread that steps an engine, and what its requests become in an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from .engine import Engine
from .request import Event, Handle, Request

logger = logging.getLogger(__name__)
PAUSE = 0.5
"""Seconds after which an idle thread looks whether it is to stop."""


class Failed(Exception):
    """An answer that does not come to its end, through no fault of who asked."""


class Piece(NamedTuple):
    """A part of one of several answers.

    Attributes:
        index: which answer.
        event: the part.
    """

    index: int
    event: Event


class Worker:
    """Runs an engine in a thread of its own and hands its events to an event loop.

    `open` and what it returns belong to the loop that `start` was called in.

    Args:
        engine: which nobody else steps.

    Attributes:
        failure: why the thread has stopped, if it did by itself.
        cancelled: how many requests were cancelled by those who had asked.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.failure: BaseException | None = None
        self.cancelled = 0
        self._answers: dict[Handle, tuple[Answers, int]] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to answer."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its step; whoever still waits gets `Failed`."""
        self._stopping = True
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._fail("the server is shutting down")

    def give_up(self) -> None:
        """Begin to stop: whoever waits gets `Failed` now."""
        self._stopping = True
        self._fail("the server is shutting down")

    @property
    def open_answers(self) -> int:
        """How many requests somebody waits for."""
        return len(self._answers)

    def open(self, requests: Sequence[Request]) -> Answers:
        """Queue some requests, all or none.

        Raises:
            ValueError: see `Engine.admit`.
            Failed: the thread has stopped.
        """
        if self.failure is not None or self._stopping:
            raise Failed("the server is shutting down" if self._stopping else "the engine has stopped")
        answers = Answers(self)
        try:
            for index, request in enumerate(requests):
                handle = self.engine.admit(request)
                self._answers[handle] = (answers, index)
                answers.pending.add(handle)
        except ValueError:
            for handle in answers.pending:
                self.drop(handle)
            raise
        return answers

    def drop(self, handle: Handle) -> bool:
        """Cancel a request nobody waits for any more; whether it had not ended."""
        if self._answers.pop(handle, None) is None:
            return False
        self.engine.cancel(handle)
        return True

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while not self._stopping:
                if self.engine.wait(PAUSE) and (events := self.engine.step()):
                    self._loop.call_soon_threadsafe(self._deliver, events)
        except BaseException as error:  # the loop answers those who wait, and says that it is not well
            logger.exception("the engine has stopped")
            self.failure = error
            self._loop.call_soon_threadsafe(self._fail, "the engine has stopped")

    # ------------------------------------------------------------------ the loop

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.handle not in self._answers:
                continue  # dropped
            answers, index = self._answers[event.handle]
            if event.finish_reason is not None:
                del self._answers[event.handle]
                answers.pending.discard(event.handle)
            answers.put(Piece(index, event))

    def _fail(self, why: str) -> None:
        for answers, _ in list(self._answers.values()):
            answers.put(Failed(why))
        self._answers.clear()


class Answers:
    """The answers to some requests as they come; closing it cancels what has not come yet.

    Attributes:
        pending: the requests that have not ended.
    """

    def __init__(self, worker: Worker):
        self.pending: set[Handle] = set()
        self._worker = worker
        self._pieces: asyncio.Queue[Piece | Failed] = asyncio.Queue()

    def put(self, piece: Piece | Failed) -> None:
        """Hand over what has come."""
        self._pieces.put_nowait(piece)

    def close(self) -> None:
        """Cancel what has not come yet."""
        self._worker.cancelled += sum(self._worker.drop(handle) for handle in self.pending)
        self.pending.clear()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The parts in the order in which they come, until all answers have ended.

        Raises:
            Failed: one of them does not come to its end.
        """
        while self.pending or not self._pieces.empty():
            piece = await self._pieces.get()
            if isinstance(piece, Failed):
                raise piece
            if piece.event.finish_reason == "cancelled":
                raise Failed(piece.event.why or "the request was cancelled")
            yield piece
