"""What is asked, as the tokens that the mixture was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from dylora_moe.data.examples import DataError, Example, encode_prompt

from .errors import ApiError


class Said(Protocol):
    """One message of a conversation."""

    @property
    def role(self) -> str:
        """Who said it."""
        ...

    @property
    def text(self) -> str:
        """What was said."""
        ...


class Prompts:
    """Makes tokens of texts, as they are, and of conversations, as the mixture was trained on such.

    Without a chat template the messages are put one after the other, with the separator between them.

    Args:
        tokenizer: of the mixture; one thread at a time may use it.
        chat: whether conversations go through the chat template.
        most: how many tokens are taken at most; None for any number.
    """

    def __init__(self, tokenizer: Any, chat: bool, most: int | None):
        self._tokenizer, self._chat, self._most = tokenizer, chat, most
        # no token stands for more letters than its piece has
        self._most_letters = None if most is None else most * max(map(len, tokenizer.get_vocab()))

    def example(self, prompt: str | Sequence[Said], separator: str) -> Example:
        """What `ids` takes; quickly told.

        Raises:
            ApiError: 400, an empty prompt, or one that is surely too long: to read it would keep the others' waiting.
        """
        text = isinstance(prompt, str)
        param = "prompt" if text else "messages"
        letters = len(prompt) if text else sum(len(message.text) for message in prompt)
        if self._most_letters is not None and letters > self._most_letters:
            raise ApiError(
                400,
                f"a prompt of {letters} letters does not fit into the {self._most} tokens that are served; shorten it.",
                param,
            )
        if text:
            example = Example(prompt, "")
        elif self._chat:
            example = Example([{"role": message.role, "content": message.text} for message in prompt], "")
        else:
            example = Example(separator.join(message.text for message in prompt), "")
        if not example.prompt:
            raise ApiError(400, "the prompt is empty; there is nothing to go on from.", param)
        return example

    def ids(self, example: Example) -> tuple[int, ...]:
        """The token ids.

        Raises:
            ApiError: 400, a prompt that cannot be encoded.
        """
        chat = isinstance(example.prompt, list)
        try:
            return tuple(encode_prompt(example, self._tokenizer, chat))
        except DataError as error:
            raise ApiError(400, str(error), "messages" if chat else "prompt") from error
