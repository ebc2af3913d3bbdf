"""One person's talk with a mixture, in this process: an engine with one slot, and what has been said.

Shapes: S tokens of an answer, E experts.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dylora_moe.arguments import BASE, check_experts
from dylora_moe.data.examples import Example, Message, encode_prompt
from dylora_moe.session import Session
from dylora_moe.skills.novelty import Novelty

from .engine import Engine
from .request import Handle, Request, Token


@dataclass
class Answer:
    """One answer as it grows.

    Attributes:
        prompt: what was asked: text, or the conversation up to it.
        tokens: what was written.
        pieces: what each token adds to the text; a character of several tokens is the last one's.
        finish_reason: as of an `Event`; None before the end.
        why: what ended it, if it was neither the mixture nor `Conversation.stop`.
    """

    prompt: str | list[Message]
    tokens: list[Token] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    why: str | None = None

    @property
    def text(self) -> str:
        """The answer, without the white space around it."""
        return "".join(self.pieces).strip()

    def weights(self) -> tuple[list[str], Tensor]:
        """Names and their weights `[S, E + 1]`: the experts, in their order, and `"base"` with what they leave.

        There must be a token.
        """
        weights = torch.tensor([token.weights for token in self.tokens])
        rest = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
        return [*self.tokens[0].experts, BASE], torch.cat([weights, rest], dim=-1)

    def load(self) -> dict[str, float]:
        """Mean weight of the experts and of the base over the tokens, the largest first; without those of nothing."""
        if not self.tokens:
            return {}
        names, weights = self.weights()
        shares = zip(names, weights.mean(0).tolist(), strict=True)
        return {name: share for name, share in sorted(shares, key=lambda one: -one[1]) if share > 1e-6}


class Conversation:
    """A talk with a mixture.

    A mixture whose prompts are chats reads all that was said before; another one answers each prompt by itself. Prompts
    are encoded as `Session` does.

    Args:
        session: the mixture, with its tokenizer and prompt format.
        slot_length: how many tokens, prompt and answer together, there may be; default that of `Engine`.

    Attributes:
        expert: what answers are forced to; None lets the router decide.
        max_new_tokens, temperature, seed: of the answers, see `Request`.
        messages: what was said so far; always empty where each prompt is answered by itself.
        answer: the last one.

    Raises:
        ValueError: see `Engine`.
    """

    def __init__(self, session: Session, slot_length: int | None = None):
        self.session = session
        session.model.chat = session.chat  # older checkpoints say it in a recipe
        self.engine = Engine(session.model, session.tokenizer, slots=1, slot_length=slot_length)
        self.expert: str | None = None
        self.max_new_tokens, self.temperature = 256, 0.0
        self.seed: int | None = None
        self.messages: list[Message] = []
        self.answer: Answer | None = None
        self._stopping = False

    def force(self, expert: str | None) -> None:
        """Let an expert, or `"base"`, write everything from now on; None lets the router decide.

        Raises:
            ValueError: an unknown name.
        """
        check_experts(expert, self.session.model.expert_names, None)
        self.expert = expert

    def stop(self) -> None:
        """Let `ask` end after its step, or `look` before its next text. A signal's handler may call it."""
        self._stopping = True

    def ask(self, prompt: str) -> Iterator[tuple[str, Token]]:
        """The answer as it comes: what each token adds to its text.

        In a conversation prompt and answer are kept, stopped ones too; not if nothing was said or it failed.

        Raises:
            ValueError: a prompt that cannot be encoded or leaves no room for an answer, or a request that the engine
                refuses. Nothing is kept.
        """
        self._stopping = False
        asked = [*self.messages, {"role": "user", "content": prompt}] if self.session.chat else prompt
        ids = encode_prompt(Example(asked, ""), self.session.tokenizer, self.session.chat)
        room = self.engine.slot_length - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens{' with what was said before' if self.messages else ''}, and prompt "
                f"and answer together may have {self.engine.slot_length}: shorten it"
                f"{', or begin anew with /new' if self.messages else ''}."
            )
        most = min(self.max_new_tokens, room)
        handle = self.engine.admit(Request(tuple(ids), most, self.expert, self.temperature, seed=self.seed))
        self.answer = Answer(asked)
        return self._follow(handle, self.answer)

    def _follow(self, handle: Handle, answer: Answer) -> Iterator[tuple[str, Token]]:
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        try:
            while answer.finish_reason is None:
                if self._stopping:
                    self.engine.cancel(handle)
                for event in self.engine.step():
                    if event.handle is not handle:
                        continue  # an earlier one, which its reader has left
                    for token in event.tokens:
                        answer.tokens.append(token)
                        answer.pieces.append(decoder.decode(token.bytes))
                        yield answer.pieces[-1], token
                    answer.finish_reason, answer.why = event.finish_reason, event.why
        finally:
            self.engine.cancel(handle)
        if isinstance(answer.prompt, list) and answer.why is None and answer.text:
            self.messages = [*answer.prompt, {"role": "assistant", "content": answer.text}]

    def look(self, progress: Callable[[int, int], None]) -> tuple[Novelty, list[tuple[str, float]]]:
        """What the last prompt is to the skills of the mixture, and all of them with their scores, nearest first.

        Args:
            progress: called with how many of how many texts were read, which happens once for a base.

        Raises:
            ValueError: nothing was asked yet, nothing was taught, or the prompt is too short.
            InterruptedError: it was stopped.
        """
        self._stopping = False
        model, tokenizer = self.session.model, self.session.tokenizer
        if self.answer is None:
            raise ValueError("nothing was asked yet.")
        if not model.skills:
            raise ValueError(
                "this mixture has no skill library, so it cannot say what is new; `dylora-moe teach` tells it what its "
                "experts are for."
            )

        def told(done: int, count: int) -> None:
            if self._stopping:
                raise InterruptedError("stopped")
            progress(done, count)

        model.prepare_novelty(tokenizer, progress=told)
        rows = [{"prompt": self.answer.prompt}]
        return model.novelty(rows, tokenizer=tokenizer)[0], model.nearest_skills(rows, tokenizer=tokenizer)[0]


def trimmed(pieces: Iterable[tuple[str, Token]]) -> Iterator[tuple[str, Token]]:
    """The pieces of a text without the white space around it."""
    held: list[tuple[str, Token]] | None = None  # white space that may be the last; None before the first letter
    for text, token in pieces:
        if held is None:
            text = text.lstrip()
            if not text:
                continue
            held = []
        kept = text.rstrip()
        if kept:
            yield from held
            held = []
            yield kept, token
        if text != kept:
            held.append((text[len(kept) :], token))
