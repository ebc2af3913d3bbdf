"""What may be asked over HTTP: the fields that are understood, with their ranges.

A field that is not known is ignored, as OpenAI's clients expect; a known one that would change the answer and is not
supported is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .request import MOST_ALTERNATIVES

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
}
"""Fields that other servers know and that would change the answer → the values that do not, beside null."""
TOKENS = 2**31 - 1
SEED = 2**63 - 1


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"letter {error.start} is half of a surrogate pair, which is no text.") from error
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
SEVERAL = Field(min_length=1, fail_fast=True)
"""Of a list: one wrong item is enough, for a list of errors may need a thousand times the memory of the body."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of completions have in common."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: Text
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-SEED, le=SEED)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    routing: bool | None = False
    """Whether every token comes with its routing weights: an extension."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_ignored(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key, neutral in NEUTRAL.items():
                value = values.get(key)
                if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
                    if isinstance(value, float) and value in [one for one in neutral if not isinstance(one, bool)]:
                        continue  # 0.0 for 0
                    raise ValueError(f"{key} is not supported with such a value; leave it out.")
        return values

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        """All of its parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsked(Asked):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], SEVERAL]
    max_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatAsked:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true.")
        return self


class Prompted(BaseModel):
    """What says what a completion goes on from."""

    prompt: (
        Text
        | Annotated[list[Text], SEVERAL]
        | Annotated[list[int], SEVERAL]
        | Annotated[list[Annotated[list[int], SEVERAL]], SEVERAL]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]


class CompletionAsked(Prompted, Asked):
    """The body of `/v1/completions`."""

    max_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None


class NoveltyAsked(BaseModel):
    """The body of `/v1/novelty`: texts, or one conversation."""

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=16, fail_fast=True)] | None = None
    messages: Annotated[list[Message], SEVERAL] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> NoveltyAsked:
        if (self.input is None) == (self.messages is None):
            raise ValueError("either input or messages is needed.")
        return self


class RowAsked(BaseModel):
    """A text that a skill is known by or trained on."""

    prompt: Text
    completion: Text = ""


class ExpertAsked(BaseModel):
    """The body of `POST /v1/experts`: an adapter, and texts it is for."""

    name: Text
    adapter: Text
    rows: Annotated[list[RowAsked], Field(fail_fast=True)] | None = None


class RenameAsked(BaseModel):
    """The body of `POST /v1/experts/{name}/rename`."""

    to: Text


class LearnAsked(BaseModel):
    """The body of `POST /v1/learn`."""

    name: Text
    rows: Annotated[list[RowAsked], SEVERAL]
    everything: bool = False
    steps: Annotated[int, Field(ge=1, le=100_000)] | None = None
