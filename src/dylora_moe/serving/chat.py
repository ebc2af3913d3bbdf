"""`dylora-moe chat`."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from dylora_moe.failures import Verbose


def chat(
    directory: Annotated[str, typer.Argument(help="A checkpoint folder, or a hub id.")],
    expert: Annotated[str | None, typer.Option(help='Force one expert by name, or "base".')] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop an answer after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="For sampling; default another for every answer.")
    ] = None,
    slot_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer together; default 2048 or the base's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where it runs; default an accelerator, else cpu.")] = None,
    base: Annotated[str | None, typer.Option(help="Another base than the checkpoint names.")] = None,
    verbose: Verbose = False,
) -> None:
    """Talk to a mixture in the terminal, every token in the colour of the expert that wrote it.

    A mixture of chat prompts remembers the conversation, another one answers every prompt by itself. Lines that begin
    with a slash are commands: [bold]/expert sql[/] and [bold]/base[/] force who answers, [bold]/route[/] lets the
    router decide again, [bold]/trace[/] shows who wrote each token, [bold]/why[/] whether the prompt is like what was
    taught, [bold]/help[/] the rest. Ctrl-C stops an answer, Ctrl-D ends the chat.

    In a pipe every line is a prompt or a command: [bold]cat prompts.txt | dylora-moe chat runs/skills > answers.txt[/]

    Example: [bold]dylora-moe chat runs/skills[/]
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    console = Console(emoji=False) if interactive else Console(emoji=False, color_system=None)
    with console.status(f"Loading {directory}"):
        import torch

        from dylora_moe.session import Session

        from .conversation import Conversation
        from .terminal import Terminal

        session = Session(directory, base)
        if device is None:
            found = torch.accelerator.current_accelerator(check_available=True)
            device = "cpu" if found is None else str(found)
        session.model.to(device)
        conversation = Conversation(session, slot_length)
    conversation.force(expert)
    conversation.max_new_tokens, conversation.temperature, conversation.seed = max_new_tokens, temperature, seed
    cast(io.TextIOWrapper, sys.stdin).reconfigure(errors="replace")  # bytes that are no text end no chat
    name, errors = Path(directory).resolve().name, Console(stderr=True, emoji=False)
    terminal = Terminal(conversation, console, errors, name, interactive)
    if interactive:
        terminal.talk()
        return
    terminal.read(sys.stdin)
    if terminal.failed:
        raise typer.Exit(1)
