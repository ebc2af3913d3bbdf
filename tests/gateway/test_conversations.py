"""What makes a request part of a conversation, and how much of it is remembered."""

from __future__ import annotations

from dylora_moe.gateway.conversations import Conversations, marks_of
from dylora_moe.gateway.schemas import Message


def said(*texts: str) -> list[Message]:
    """Messages of alternating roles; one that begins with a star is the system's."""
    roles = ["system" if text.startswith("*") else "user" for text in texts]
    for index in range(1, len(roles)):
        if roles[index - 1] == "user":
            roles[index] = "assistant"
    return [Message(role=role, content=text) for role, text in zip(roles, texts, strict=True)]


def test_the_longest_beginning_counts():
    kept = Conversations()
    assert kept.find(marks_of(said("a"))) is None
    kept.keep(marks_of(said("a")), "red")
    kept.keep(marks_of(said("a", "b", "c")), "blue")
    assert kept.find(marks_of(said("a"))) == "red"
    assert kept.find(marks_of(said("a", "x", "c"))) == "red"
    assert kept.find(marks_of(said("a", "b", "c", "d", "e"))) == "blue"
    assert kept.find(marks_of(said("ab"))) is None
    assert kept.find(marks_of(said("b", "c"))) is None


def test_messages_do_not_run_into_each_other():
    kept = Conversations()
    kept.keep(marks_of([Message(role="user", content="a"), Message(role="user", content="b")]), "red")
    assert kept.find(marks_of([Message(role="user", content="ab")])) is None
    assert kept.find(marks_of([Message(role="user", content='a"]["user", "b')])) is None


def test_what_all_conversations_begin_with_ties_none_together():
    kept = Conversations()
    kept.keep(marks_of(said("*you are")), "red")
    assert len(kept) == 0
    kept.keep(marks_of(said("*you are", "a")), "red")
    assert kept.find(marks_of(said("*you are", "b"))) is None
    assert kept.find(marks_of(said("a"))) is None
    assert kept.find(marks_of(said("*you are", "a", "b", "c"))) == "red"


def test_the_one_of_least_use_is_forgotten():
    kept = Conversations(most=2)
    kept.keep(marks_of(said("a")), "red")
    kept.keep(marks_of(said("b")), "green")
    assert kept.find(marks_of(said("a", "x", "y"))) == "red"  # of use
    kept.keep(marks_of(said("c")), "blue")
    assert len(kept) == 2
    assert kept.find(marks_of(said("b"))) is None
    assert kept.find(marks_of(said("a"))) == "red"
