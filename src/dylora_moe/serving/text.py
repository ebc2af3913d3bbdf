"""From tokens to text: the bytes of a token, whole characters, and where a text ends."""

from __future__ import annotations

import codecs
import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from .request import Token

SPACE = "▁"
"""What SentencePiece writes for a space."""


class TokenBytes:
    """The bytes that a token stands for, by itself; none for a special token.

    Args:
        tokenizer: of transformers, on a `tokenizers` backend.

    Raises:
        ValueError: a tokenizer without one, whose pieces nothing tells how to read.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{type(tokenizer).__name__} has no fast form; save it with AutoTokenizer(use_fast=True).")
        self._tokenizer = tokenizer
        self._kinds = _kinds(json.loads(backend.to_str()).get("decoder"))
        self._special = set(tokenizer.all_special_ids)
        self._added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        self._letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self._known: dict[int, bytes] = {}

    def __call__(self, id: int) -> bytes:
        """The bytes of the token `id`; none for an id that the tokenizer does not know (a padded vocabulary)."""
        if id not in self._known:
            self._known[id] = self._read(id)
        return self._known[id]

    def _read(self, id: int) -> bytes:
        if id in self._special:
            return b""
        if id in self._added:
            return self._added[id].encode()
        piece = self._tokenizer.convert_ids_to_tokens(id)
        if piece is None:
            return b""
        if "ByteLevel" in self._kinds:
            return bytes(self._letters[letter] for letter in piece)
        if "ByteFallback" in self._kinds and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        if self._kinds & {"Metaspace", "Replace"}:
            return piece.replace(SPACE, " ").encode()
        return self._tokenizer.decode([id]).encode()


def _kinds(decoder: Any) -> set[str]:
    """The kinds of decoders in a tokenizer's description of them."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_kinds, decoder.get("decoders", ())))


class TextStream:
    """The text of one answer as it grows: whole characters, and nothing that may turn out to be a stop string.

    Bytes that belong to no character are left out of the text; the tokens keep them.

    Args:
        stops: strings before which the text ends.
        past_blanks: look for them from the first letter on that is no white space.
    """

    def __init__(self, stops: Sequence[str], past_blanks: bool = False):
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._held = ""
        self._begun = not past_blanks
        self._released = 0  # letters
        self._waiting: deque[tuple[Token, int, int]] = deque()  # with the letters at which they begin and end

    def add(self, token: Token) -> tuple[str, tuple[Token, ...], bool]:
        """What can be let out now that `token` has come: text, tokens, and whether a stop string did."""
        start = self._released + len(self._held)
        self._held += self._decoder.decode(token.bytes)
        split = bool(self._decoder.getstate()[0])
        self._waiting.append((token, start, self._released + len(self._held) + split))
        first = 0 if self._begun else len(self._held) - len(self._held.lstrip())
        self._begun = self._begun or first < len(self._held)
        ends = [at for stop in self._stops if (at := self._held.find(stop, first)) >= 0]
        if ends:
            text = self._held[: min(ends)]
            end = self._released + len(text)
            return text, tuple(each for each, begins, _ in self._waiting if begins < end), True
        kept = max((_overlap(self._held[first:], stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self._released += len(text)
        tokens = []
        while self._waiting and self._waiting[0][2] <= self._released:
            tokens.append(self._waiting.popleft()[0])
        return text, tuple(tokens), False

    def rest(self) -> tuple[str, tuple[Token, ...]]:
        """What was held back, when nothing more comes."""
        return self._held, tuple(token for token, _, _ in self._waiting)


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
