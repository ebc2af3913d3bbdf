"""Which expert answers a request."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dylora_moe.data.examples import Example
from dylora_moe.passes.prompt_router import PromptRouter
from dylora_moe.serving.errors import ApiError
from dylora_moe.serving.prompts import Prompts, Said
from dylora_moe.serving.request import Request

from .conversations import Conversations, marks_of

MOST_PROMPTS = 256
"""Prompts of one request."""


class Choice(NamedTuple):
    """Who answers.

    Attributes:
        expert: its name, or `"base"`.
        how: `"routed"`, `"kept"` (as the conversation began) or `"forced"` (the request names it).
    """

    expert: str
    how: str


class Chooser:
    """Chooses by the prompt, in one thread beside the event loop.

    Args:
        router: of the mixture.
        tokenizer: of the mixture.
        chat: whether conversations go through the chat template.
        conversations: those that stay with their expert; None chooses anew for every request.
    """

    def __init__(self, router: PromptRouter, tokenizer: Any, chat: bool, conversations: Conversations | None):
        self.router = router
        self._prompts = Prompts(tokenizer, chat, router.positions)
        self._conversations = conversations
        self._thread = ThreadPoolExecutor(1, "router")  # neither the router nor a tokenizer is for two at once

    def close(self) -> None:
        """Stop."""
        self._thread.shutdown(cancel_futures=True)

    async def for_chat(self, messages: Sequence[Said]) -> Choice:
        """Who answers a conversation.

        Raises:
            ApiError: 400, a prompt that cannot be read.
        """
        if self._conversations is None:
            return Choice(await self._chosen(messages), "routed")
        marks = marks_of(messages)
        kept = self._conversations.find(marks)
        expert = await self._chosen(messages) if kept is None else kept
        self._conversations.keep(marks, expert)
        return Choice(expert, "routed" if kept is None else "kept")

    async def for_prompts(self, prompts: Sequence[str | list[int]]) -> Choice:
        """Who goes on from some texts, or their tokens.

        Raises:
            ApiError: 400, a prompt that cannot be read, or several for different experts.
        """
        if len(prompts) > MOST_PROMPTS:
            raise ApiError(400, f"{len(prompts)} prompts; at most {MOST_PROMPTS} are taken at a time.", "prompt")
        chosen = list(dict.fromkeys([await self._chosen(prompt) for prompt in prompts]))
        if len(chosen) > 1:
            raise ApiError(
                400,
                f"these prompts are for different experts ({', '.join(chosen)}), and an engine takes one per request: "
                "send them one by one, or name an expert.",
                "prompt",
            )
        return Choice(chosen[0], "routed")

    async def _chosen(self, prompt: str | list[int] | Sequence[Said]) -> str:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            asked: Example | list[int] = prompt  # pyright: ignore[reportAssignmentType]
        else:
            asked = self._prompts.example(prompt, self.router.separator)  # pyright: ignore[reportArgumentType]
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._choose, asked)

    def _choose(self, asked: Example | list[int]) -> str:
        ids = self._prompts.ids(asked) if isinstance(asked, Example) else tuple(asked)
        most = self.router.positions
        if most is not None and len(ids) > most:
            raise ApiError(400, f"a prompt of {len(ids)} tokens; the base has {most} positions. Shorten it.")
        try:
            Request(ids, max_tokens=1).check(self.router.vocabulary, sys.maxsize)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from error
        return self.router.choose(ids)
