"""`dylora-moe serve`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dylora_moe.failures import Verbose

from .options import (
    ApiKey,
    Base,
    Body,
    Connections,
    Directory,
    Drain,
    Dtype,
    Host,
    ModelName,
    Port,
    address,
    check_key,
    console,
    listen,
    loading_options,
    put_on,
    say,
    server_config,
)

if TYPE_CHECKING:
    from .guard import Limits

LAST_WORDS = 2
"""Seconds after `--drain` in which those who still wait are told that nothing more comes."""


def serve(
    directory: Directory,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: ModelName = None,
    api_key: ApiKey = None,
    slots: Annotated[int, typer.Option(min=1, help="Requests that are answered at a time; others wait.")] = 8,
    slot_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a request, with its answer; default 2048 or the base's.")
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of prompts that are read in a step.")] = 256,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that wait at most; further ones get 429.")] = 256,
    max_connections: Connections = 512,
    max_body: Body = 4 << 20,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Let those who have the key add, remove, rename and teach experts.")
    ] = False,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder whose subfolders, LoRA adapters, may be added as experts.")
    ] = None,
    drain: Drain = 30,
    device: Annotated[str | None, typer.Option(help="Where it runs; default an accelerator, else cpu.")] = None,
    dtype: Dtype = None,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """Serve a mixture as OpenAI does, with a page that shows which expert wrote which token.

    The model [bold]NAME[/] is routed, [bold]NAME:sql[/] forces an expert, [bold]NAME:base[/] none. The page is at
    http://127.0.0.1:8000, the interface below /v1. Ctrl-C lets running answers end.

    Example: [bold]dylora-moe serve runs/skills[/]
    """
    from sse_starlette.sse import AppStatus

    from .guard import Limits

    if adapters is not None and not allow_changes:
        raise ValueError(f"--adapters {adapters} is of use with --allow-changes only.")
    check_key("--api-key", api_key)
    listening = listen(host, port)
    try:
        limits = Limits(api_key, max_body, max_connections, max_queue)
        name = served_model_name or Path(directory).resolve().name
        with console.status(f"Loading {directory}"):
            app, service, changes = _app(
                directory, base, name, limits, slots, slot_length, chunk, device, dtype, allow_changes, adapters
            )
        AppStatus.disable_automatic_graceful_drain()  # streams end by themselves, within --drain
        _run(app, service, changes, listening, host, drain, name)
    finally:
        listening.close()


def _app(
    directory: str,
    base: str | None,
    name: str,
    limits: Limits,
    slots: int,
    slot_length: int | None,
    chunk: int,
    device: str | None,
    dtype: str | None,
    allow_changes: bool,
    adapters: Path | None,
) -> tuple[Any, Any, Any]:
    from dylora_moe.session import Session

    from .app import create_app
    from .changes import Changes
    from .engine import Engine
    from .service import Service

    session = Session(directory, base, **loading_options(dtype))
    session.model.chat = session.chat  # older checkpoints say it in a recipe
    put_on(session.model, device)
    service = Service(session, name, Engine(session.model, session.tokenizer, slots, slot_length, chunk))
    changes = Changes(service, Path(directory), adapters, base) if allow_changes else None
    return create_app(service, limits, changes), service, changes


def _run(app: Any, service: Any, changes: Any, listening: socket.socket, host: str, drain: int, name: str) -> None:
    from .server import Server

    url = address(host, listening)
    say(f"Serving {name} at {url} (a page), {url}/v1 (OpenAI's interface).")
    say("Ctrl-C stops it.")
    Server(server_config(app, drain + LAST_WORDS), service, changes, drain).run(sockets=[listening])
