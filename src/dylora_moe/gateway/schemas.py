"""What the gateway reads of a body; whether the rest can be answered is the engine's to say."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from dylora_moe.serving.schemas import SEVERAL, Text


class Named(BaseModel):
    """What every request has."""

    model: Text


class Part(BaseModel):
    """A part of a message; one that is no text has none."""

    text: Text = ""


class Message(BaseModel):
    """One message of a conversation, a tool's included."""

    role: Text
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None

    @property
    def text(self) -> str:
        """What of it is text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class Chat(BaseModel):
    """A conversation."""

    messages: Annotated[list[Message], SEVERAL]
