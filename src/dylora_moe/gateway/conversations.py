"""Which expert a conversation began with, so that it stays with it."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence

from dylora_moe.serving.prompts import Said

MOST = 1 << 16
"""Requests that are remembered: some ten megabytes."""


class Conversations:
    """Remembers what recent requests were given, by hashes of their messages.

    A request goes on with a conversation if its first messages are all of an earlier request's: the longest such one
    counts. Roles and texts are compared, and one message at least must be the user's.

    Args:
        most: how many requests are remembered; the one that was of no use for the longest time is forgotten first.
    """

    def __init__(self, most: int = MOST):
        self._most = most
        self._experts: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._experts)

    def find(self, marks: Sequence[bytes]) -> str | None:
        """The expert of the conversation that a request goes on with, None for a new one.

        Args:
            marks: of the request; see `marks_of`.
        """
        for mark in reversed(marks):
            if mark in self._experts:
                self._experts.move_to_end(mark)
                return self._experts[mark]
        return None

    def keep(self, marks: Sequence[bytes], expert: str) -> None:
        """Remember what a request was given."""
        if marks:
            self._experts[marks[-1]] = expert
            self._experts.move_to_end(marks[-1])
            if len(self._experts) > self._most:
                self._experts.popitem(last=False)


def marks_of(messages: Sequence[Said]) -> list[bytes]:
    """A hash of the messages up to each, from the user's first on."""
    found, asked, digest = [], False, hashlib.blake2b(digest_size=16)
    for message in messages:
        digest.update(json.dumps([message.role, message.text]).encode())
        asked = asked or message.role == "user"
        if asked:
            found.append(digest.digest())
    return found
