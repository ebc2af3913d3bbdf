"""The server process, and how it ends."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from .changes import Changes
from .service import Service


class Server(uvicorn.Server):
    """Uvicorn's, which tells those who still wait when it stops that nothing more comes, before it closes on them.

    Args:
        config: whose `timeout_graceful_shutdown` is longer than `drain`.
        service: what is served.
        changes: how it is changed; None where it is not.
        drain: seconds that running answers have to end.
    """

    def __init__(self, config: uvicorn.Config, service: Service, changes: Changes | None, drain: int):
        super().__init__(config)
        self._service, self._changes, self._drain = service, changes, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; a second signal does so at once, without the app's own end."""
        waiting = asyncio.get_running_loop().call_later(self._drain, self._service.worker.give_up)
        try:
            await super().shutdown(sockets)
        finally:
            waiting.cancel()
            if self._changes is not None:
                self._changes.kill()
