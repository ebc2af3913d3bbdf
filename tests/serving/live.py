"""A server of a tiny mixture, listening on this machine."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI

from dylora_moe.serving.app import create_app
from dylora_moe.serving.changes import Changes
from dylora_moe.serving.engine import Engine
from dylora_moe.serving.guard import Limits
from dylora_moe.serving.service import Service
from dylora_moe.session import Session
from tinybase import save_tiny_base, tiny_tokenizer
from topics import mixture, teach

NAME, KEY = "tiny", "the-key"


class Live(NamedTuple):
    """A server that runs: `url`, and what it serves."""

    url: str
    service: Service
    folder: Path


def tiny_checkpoint(folder: Path, taught: bool = False, **settings: Any) -> Path:
    """A tiny mixture whose experts do something, its base beside it; `taught` gives it a skill library."""
    base, own = save_tiny_base(folder / "base"), mixture(**settings)
    if taught:
        teach(own)
    own.base_name, own.chat = base, False
    own.save_pretrained(folder / NAME)
    tiny_tokenizer().save_pretrained(folder / NAME)
    return folder / NAME


@contextmanager
def live_server(
    folder: Path, limits: Limits | None = None, changes: bool = False, adapters: Path | None = None, **engine: Any
) -> Iterator[Live]:
    """The checkpoint in `folder`, served in a thread of this process."""
    session = Session(folder)
    settings = {"slots": 4, "slot_length": 200, "chunk": 32, **engine}
    service = Service(session, NAME, Engine(session.model, session.tokenizer, **settings))
    limits = Limits(api_key=KEY) if limits is None and changes else limits
    app = create_app(service, limits, Changes(service, folder, adapters) if changes else None)
    with listening(app) as url:
        yield Live(url, service, folder)


@contextmanager
def listening(app: FastAPI, at: int = 0) -> Iterator[str]:
    """An app that is served in a thread of this process, at a port or a free one, by its URL."""
    port = socket.create_server(("127.0.0.1", at))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[port])))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            threading.Event().wait(0.01)
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"
