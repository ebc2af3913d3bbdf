"""Answers in OpenAI's own types, whole or as chunks.

What they do not know is our `routing`: for every token the weights of the pass that predicted it.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs

from .request import Event, Token
from .service import shares


class Answer:
    """One answer as it grows.

    Args:
        index: which of several.
    """

    def __init__(self, index: int):
        self.index = index
        self.texts: list[str] = []
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None

    def add(self, event: Event) -> None:
        """Take in what came."""
        self.texts.append(event.text)
        self.tokens += event.tokens
        self.finish_reason = event.finish_reason

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


class Form(ABC):
    """How the answers to one request look.

    Args:
        id: of the whole.
        created: seconds since 1970.
        model: the name that was asked.
        logprobs: whether they were asked for.
        routing: whether it was asked for.
        prompt_tokens: of all prompts.
        with_usage: whether the chunks end with one of the usage.
    """

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        logprobs: bool,
        routing: bool,
        prompt_tokens: int,
        with_usage: bool,
    ):
        self.id, self.created, self.model = id, created, model
        self.logprobs, self.routing = logprobs, routing
        self.prompt_tokens, self.with_usage = prompt_tokens, with_usage

    def usage(self, written: int) -> CompletionUsage:
        """The counts, with `written` tokens of answers."""
        return CompletionUsage(
            prompt_tokens=self.prompt_tokens, completion_tokens=written, total_tokens=self.prompt_tokens + written
        )

    def extras(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Our fields of a choice."""
        return {"routing": [_routing(token) for token in tokens]} if self.routing else {}

    @abstractmethod
    def whole(self, answers: Sequence[Answer], written: int) -> str:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def first(self, index: int) -> str | None:
        """The chunk before an answer's first text, if there is one."""

    @abstractmethod
    def chunk(self, index: int, event: Event) -> str:
        """A chunk of text, or the last of an answer."""

    @abstractmethod
    def last(self, written: int) -> str | None:
        """The chunk of the usage, where it was asked for."""


class ChatForm(Form):
    """`/v1/chat/completions`.

    Args:
        trimmed: leave out white space before the first letter, with which a mixture without a chat template ends the
            prompt.
    """

    def __init__(self, *args: Any, trimmed: bool):
        super().__init__(*args)
        self.trimmed = trimmed
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Answer], written: int) -> str:
        choices = []
        for answer in answers:
            text = answer.text.lstrip() if self.trimmed else answer.text
            choices.append(
                {
                    "index": answer.index,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "finish_reason": answer.finish_reason,
                    "logprobs": self._logprobs(answer.tokens),
                    **self.extras(answer.tokens),
                }
            )
        whole = ChatCompletion(object="chat.completion", choices=choices, **self._head, usage=self.usage(written))
        return whole.model_dump_json(exclude_unset=True)

    def first(self, index: int) -> str | None:
        return self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def chunk(self, index: int, event: Event) -> str:
        text = event.text
        if self.trimmed and index not in self._begun:
            text = text.lstrip()
            if text:
                self._begun.add(index)
        choice = {
            "index": index,
            "delta": {"content": text} if text or event.finish_reason is None else {},
            "finish_reason": event.finish_reason,
            "logprobs": self._logprobs(event.tokens),
            **self.extras(event.tokens),
        }
        return self._chunk([choice])

    def last(self, written: int) -> str | None:
        return self._chunk([], usage=self.usage(written)) if self.with_usage else None

    @property
    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict], **further: Any) -> str:
        if self.with_usage:
            further.setdefault("usage", None)
        chunk = ChatCompletionChunk(object="chat.completion.chunk", choices=choices, **self._head, **further)  # pyright: ignore[reportArgumentType]
        return chunk.model_dump_json(exclude_unset=True)

    def _logprobs(self, tokens: Iterable[Token]) -> dict[str, Any] | None:
        return {"content": [_chat_logprob(token) for token in tokens], "refusal": None} if self.logprobs else None


class TextForm(Form):
    """`/v1/completions`."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._read: dict[int, tuple[codecs.IncrementalDecoder, int]] = {}  # so many letters of each answer

    def whole(self, answers: Sequence[Answer], written: int) -> str:
        choices = [self._choice(each.index, each.text, each.tokens, each.finish_reason) for each in answers]
        return self._completion(choices, usage=self.usage(written))

    def first(self, index: int) -> str | None:
        return None

    def chunk(self, index: int, event: Event) -> str:
        return self._completion([self._choice(index, event.text, event.tokens, event.finish_reason)])

    def last(self, written: int) -> str | None:
        return self._completion([], usage=self.usage(written)) if self.with_usage else None

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> CompletionChoice:
        values: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, tokens),
            "finish_reason": finish_reason,
            **self.extras(tokens),
        }
        return CompletionChoice.model_construct(**values)  # a chunk has no finish_reason yet, which the type denies

    def _completion(self, choices: list[CompletionChoice], **further: Any) -> str:
        values: dict[str, Any] = {"id": self.id, "created": self.created, "model": self.model, "choices": choices}
        completion = Completion.model_construct(object="text_completion", **values, **further)
        return completion.model_dump_json(exclude_unset=True, warnings=False)

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Logprobs | None:
        if not self.logprobs:
            return None
        decoder, letters = self._read.get(index) or (codecs.getincrementaldecoder("utf-8")("ignore"), 0)
        offsets = []
        for token in tokens:
            offsets.append(letters)
            letters += len(decoder.decode(token.bytes))
        self._read[index] = decoder, letters
        return Logprobs(
            tokens=[text_of(token.bytes) for token in tokens],
            token_logprobs=[_finite(token.logprob) for token in tokens],
            top_logprobs=[
                {text_of(each.bytes): _finite(each.logprob) for each in token.alternatives} for token in tokens
            ],
            text_offset=offsets,
        )


def text_of(of_token: bytes) -> str:
    r"""A token by itself; bytes that are part of a character are written `\xe2`."""
    return of_token.decode("utf-8", "backslashreplace")


def _finite(logprob: float | None) -> float:
    """What JSON can say: OpenAI's value for what is impossible."""
    return max(-9999.0, 0.0 if logprob is None else logprob)


def _chat_logprob(token: Token) -> ChatCompletionTokenLogprob:
    return ChatCompletionTokenLogprob(
        token=text_of(token.bytes),
        bytes=list(token.bytes),
        logprob=_finite(token.logprob),
        top_logprobs=[
            TopLogprob(token=text_of(each.bytes), bytes=list(each.bytes), logprob=_finite(each.logprob))
            for each in token.alternatives
        ],
    )


def _routing(token: Token) -> dict[str, Any]:
    weights = {name: round(share, 6) for name, share in shares(token).items()}
    return {"token": text_of(token.bytes), "bytes": list(token.bytes), "expert": token.expert, "weights": weights}
