"""An engine that writes what it is told."""

from __future__ import annotations

from typing import Any

from dylora_moe.arguments import BASE
from dylora_moe.serving.request import Event, Handle, Request, Token
from dylora_moe.serving.text import TextStream

EXPERTS = ("sql", "law")


def token(text: str | bytes, *weights: float) -> Token:
    """A token of the experts `EXPERTS` with their `weights`, or of the first alone."""
    weights = weights or (1.0, 0.0)
    best = max(weights)
    expert = BASE if 1 - sum(weights) > best else EXPERTS[weights.index(best)]
    return Token(1, text.encode() if isinstance(text, str) else text, weights, EXPERTS, expert)


class Scripted:
    """In place of `Engine`: a token at a step, until the tokens of an answer are out.

    Args:
        answers: the tokens of each; the last one comes again and again.
    """

    slot_length = 40

    def __init__(self, *answers: list[Token], **settings: Any):
        self.answers, self.requests = list(answers), []
        self.running: Handle | None = None
        for name, value in settings.items():
            setattr(self, name, value)

    def admit(self, request: Request) -> Handle:
        assert self.running is None, "the slot is taken"
        self.requests.append(request)
        self.left = list(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
        self.text, self.running = TextStream(()), Handle(request)
        return self.running

    def cancel(self, handle: Handle) -> None:
        handle.cancelled = True

    def step(self) -> list[Event]:
        handle = self.running
        if handle is None:
            return []
        if handle.cancelled or not self.left:
            self.running = None
            ending = ("", (), "cancelled") if handle.cancelled else (*self.text.rest(), "stop")
            return [Event(handle, *ending)]
        text, tokens, _ = self.text.add(self.left.pop(0))
        return [Event(handle, text, tokens)]
