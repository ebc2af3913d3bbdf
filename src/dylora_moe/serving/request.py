"""What is asked of the engine, and what it answers.

Shapes: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

MOST_ALTERNATIVES = 20
"""The most that `Request.logprobs` may ask for, as in OpenAI's interface."""


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it.

    Attributes:
        prompt: its token ids.
        max_tokens: how many tokens are written at most.
        expert: the one to force, `"base"` for none of them; None lets the router decide.
        temperature: of the sampling; 0 takes the best token.
        top_p: sample among the fewest best tokens whose probabilities sum to this.
        seed: of the request's own generator; None draws one.
        stop: strings before which the text ends.
        logprobs: report each token's logarithmic probability and that of so many alternatives; None reports none.
        stop_past_blanks: look for stop strings from the first letter on that is no white space.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    expert: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    stop_past_blanks: bool = False

    def check(self, vocabulary: int, length: int) -> None:
        """Raise `ValueError` for values out of range.

        Args:
            vocabulary: the number of token ids that the base knows.
            length: the number of tokens that a slot holds.
        """
        if not self.prompt:
            raise ValueError("the prompt has no token; there is nothing to go on from.")
        unknown = next((id for id in self.prompt if not 0 <= id < vocabulary), None)
        if unknown is not None:
            raise ValueError(f"token id {unknown} of the prompt is none of the base's: 0 to {vocabulary - 1}.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: at least one token is written.")
        if len(self.prompt) + self.max_tokens > length:
            raise ValueError(
                f"a prompt of {len(self.prompt)} tokens and max_tokens={self.max_tokens} do not fit into the "
                f"{length} tokens that are served; shorten the prompt or ask for fewer."
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: 0 takes the best token, a larger number samples.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: a share of the probability, above 0 and at most 1.")
        if not all(self.stop):
            raise ValueError("an empty stop string would stop before the first token; leave it out.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_ALTERNATIVES:
            raise ValueError(f"logprobs={self.logprobs}: at most {MOST_ALTERNATIVES} alternatives are reported.")


class Handle:
    """One admitted request; compared by identity.

    Attributes:
        request: what was asked.
        cancelled: that nobody waits for the rest; set by `Engine.cancel`.
    """

    def __init__(self, request: Request):
        self.request = request
        self.cancelled = False


class Alternative(NamedTuple):
    """A token that might have come.

    Attributes:
        id: of the token.
        bytes: its own, by itself.
        logprob: its logarithmic probability, of the plain softmax over the vocabulary.
    """

    id: int
    bytes: bytes
    logprob: float


class Token(NamedTuple):
    """A token that was written.

    Attributes:
        id: of the token.
        bytes: its own, which may be part of a character; none for a special token.
        weights: `E` routing weights of the pass that predicted it, in the order of `experts`.
        experts: the names of the experts at that pass.
        expert: the one with the largest weight, `"base"` where the base alone has more.
        logprob: as in `Alternative`; None if it was not asked for.
        alternatives: the likeliest tokens, as many as were asked for.
    """

    id: int
    bytes: bytes
    weights: tuple[float, ...]
    experts: tuple[str, ...]
    expert: str
    logprob: float | None = None
    alternatives: tuple[Alternative, ...] = ()


class Event(NamedTuple):
    """What a step did for one request.

    Attributes:
        handle: the request.
        text: what comes next of the text, whole characters only; joined they are the text.
        tokens: those whose last character is now out.
        finish_reason: `"stop"`, `"length"` or `"cancelled"` if this is the last event.
        why: what cancelled the request, if it was not its caller.
    """

    handle: Handle
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    why: str | None = None
