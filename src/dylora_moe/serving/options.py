"""What the commands that serve have in common: options, an address, a key, a place to compute."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import uvicorn
    from torch import nn

Directory = Annotated[str, typer.Argument(help="A checkpoint folder, or a hub id.")]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
ModelName = Annotated[str | None, typer.Option(help="What the routed mixture is called; default the folder's name.")]
ApiKey = Annotated[str | None, typer.Option(envvar="DYLORA_MOE_API_KEY", help="What /v1/* needs as its bearer token.")]
Connections = Annotated[int, typer.Option(min=1, help="Requests open at a time; further ones get 503.")]
Body = Annotated[int, typer.Option(min=1024, help="Bytes of a request; larger ones get 413.")]
Drain = Annotated[int, typer.Option(min=0, help="Seconds that running answers have to end when it is stopped.")]
Dtype = Annotated[str | None, typer.Option(help="Of the base: auto, float32, bfloat16, …")]
Base = Annotated[str | None, typer.Option(help="Another base than the checkpoint names.")]

console = Console(emoji=False)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: an address that is not this machine's, or a port that is taken.
    """
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error}; choose another --port, or 0.") from error


def address(host: str, listening: socket.socket) -> str:
    """The URL of a server on this machine; says so if others reach it, too."""
    if host not in LOOPBACK:
        say(f"Listening on {host}: whoever reaches this machine can use it.")
    shown = f"[{host}]" if ":" in host else "127.0.0.1" if host == "0.0.0.0" else host
    return f"http://{shown}:{listening.getsockname()[1]}"


def server_config(app: Any, seconds: int) -> uvicorn.Config:
    """How uvicorn runs `app`, whose running answers have `seconds` to end."""
    import uvicorn

    return uvicorn.Config(
        app,
        log_level="info" if logging.getLogger("dylora_moe").isEnabledFor(logging.DEBUG) else "warning",
        timeout_graceful_shutdown=seconds,
        ws="none",
        server_header=False,
    )


def say(line: str) -> None:
    """Print a line as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def check_key(option: str, key: str | None) -> None:
    """Raise `ValueError` for a key that no header can carry."""
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        raise ValueError(f"{option}: printable ASCII letters are needed, at least one.")


def loading_options(dtype: str | None) -> dict[str, Any]:
    """What a base is loaded with.

    Raises:
        ValueError: an unknown dtype.
    """
    import torch

    if dtype not in (None, "auto") and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"--dtype {dtype}: auto, float32, bfloat16 or float16 is needed.")
    return {} if dtype is None else {"dtype": dtype}


def put_on(model: nn.Module, device: str | None) -> None:
    """Move a model to a device; None takes an accelerator, else the CPU.

    Raises:
        ValueError: a device that there is not.
    """
    import torch

    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else str(found)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
