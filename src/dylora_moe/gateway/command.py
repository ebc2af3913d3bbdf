"""`dylora-moe gateway`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dylora_moe.failures import Verbose
from dylora_moe.serving.options import (
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
    from .app import Gateway


def gateway(
    directory: Directory,
    engine: Annotated[str, typer.Option(help="Address of an OpenAI-compatible engine that has the adapters.")],
    engine_base: Annotated[
        str | None, typer.Option(help="What the engine calls the base; default its one model without a parent.")
    ] = None,
    engine_api_key: Annotated[
        str | None,
        typer.Option(
            envvar="DYLORA_MOE_ENGINE_API_KEY",
            help="What the engine needs as its bearer token; default what each client sends, and --api-key.",
        ),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    served_model_name: ModelName = None,
    api_key: ApiKey = None,
    sticky: Annotated[bool, typer.Option(help="Let a conversation stay with the adapter it began with.")] = True,
    max_connections: Connections = 512,
    max_body: Body = 4 << 20,
    drain: Drain = 30,
    device: Annotated[str | None, typer.Option(help="Where the router runs; default an accelerator, else cpu.")] = None,
    dtype: Dtype = None,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """Choose an adapter for every request, and let an engine such as vLLM answer with it.

    A request for the model [bold]NAME[/] is scored by the router, which reads it with the layers below its own only;
    the expert that fits best is what the engine is asked for. [bold]NAME:sql[/] and [bold]NAME:base[/] are passed on
    without. A conversation stays with its adapter, so that the engine's prefix cache stays of use.

    The engine must have every expert under its name: [bold]dylora-moe export runs/skills adapters --to vllm-lora[/]
    writes them and prints the command that starts vLLM.

    Example: [bold]dylora-moe gateway runs/skills --engine http://127.0.0.1:8000[/]
    """
    for option, key in (("--api-key", api_key), ("--engine-api-key", engine_api_key)):
        check_key(option, key)
    listening = listen(host, port)
    try:
        name = served_model_name or Path(directory).resolve().name
        with console.status(f"Loading the lower layers of {directory}"):
            key = engine_api_key or api_key
            made = _gateway(
                directory, engine, engine_base, key, engine_api_key is not None, name, sticky, device, dtype, base
            )
        _run(made, api_key, max_body, max_connections, listening, host, drain)
    finally:
        listening.close()


def _gateway(
    directory: str,
    url: str,
    engine_base: str | None,
    key: str | None,
    replaces: bool,
    name: str,
    sticky: bool,
    device: str | None,
    dtype: str | None,
    base: str | None,
) -> Gateway:
    from dylora_moe.base.loading import load_tokenizer
    from dylora_moe.checkpoint.mixture import read_description
    from dylora_moe.passes.prompt_router import PromptRouter
    from dylora_moe.session import prompts_are_chats

    from .app import Gateway
    from .choice import Chooser
    from .conversations import Conversations
    from .engine import Engine

    options = loading_options(dtype)
    folder, known = read_description(directory)
    engine = Engine(url, list(known.states), directory, engine_base, key, replaces)
    engine.read_names()
    engine.check_complete()
    router = PromptRouter.from_pretrained(directory, base, **options)
    put_on(router, device)
    tokenizer = load_tokenizer(folder, base or known.base_name)
    chat = prompts_are_chats(folder, known.chat)
    chooser = Chooser(router, tokenizer, chat, Conversations() if sticky else None)
    return Gateway(name, chooser, engine)


def _run(
    gateway: Gateway,
    api_key: str | None,
    max_body: int,
    max_connections: int,
    listening: socket.socket,
    host: str,
    drain: int,
) -> None:
    import uvicorn

    from dylora_moe.serving.guard import Limits

    from .app import create_app

    app: Any = create_app(gateway, Limits(api_key, max_body, max_connections))
    url = address(host, listening)
    say(f"Serving {gateway.name} at {url}/v1 (OpenAI's interface), answered by the engine at {gateway.engine.url}.")
    say("Ctrl-C stops it.")
    uvicorn.Server(server_config(app, drain)).run(sockets=[listening])
