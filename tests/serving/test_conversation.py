"""A conversation: the engine's tokens become text, what was said is read again, and anything can be stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dylora_moe.serving.conversation import Answer, Conversation, trimmed
from dylora_moe.serving.request import Event
from dylora_moe.session import Session
from dylora_moe.skills.background import background_texts
from serving.live import tiny_checkpoint
from serving.scripted import Scripted, token
from topics import NAMES, mixture, texts

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    return Session(tiny_checkpoint(tmp_path_factory.mktemp("chat"), taught=True))


@pytest.fixture
def talk(session, monkeypatch):
    """A conversation; given answers, one whose engine writes them."""

    def make(*answers, chat: bool = False, **engine: Any) -> Conversation:
        monkeypatch.setattr(session, "chat", chat)
        monkeypatch.setattr(session.tokenizer, "chat_template", TEMPLATE if chat else None)
        made = Conversation(session, slot_length=100)
        if answers:
            made.engine = Scripted(*answers, **engine)  # pyright: ignore[reportAttributeAccessIssue]
        return made

    return make


def said(pieces) -> str:
    return "".join(text for text, _ in pieces)


@pytest.mark.parametrize("expert", [None, "law", "base"])
def test_it_writes_what_the_mixture_alone_does(talk, session, expert):
    conversation = talk()
    conversation.force(expert)
    conversation.max_new_tokens = 12
    list(conversation.ask("Käse?"))
    ids = torch.tensor([session.tokenizer("Käse?").input_ids])
    with torch.no_grad(), session.model.trace() as trace:
        alone = session.model.generate(ids, experts=expert, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    answer = conversation.answer
    assert [each.id for each in answer.tokens] == [id for id in alone.tolist() if id]
    names, weights = answer.weights()
    assert names == [*session.model.expert_names, "base"]
    read = trace.weights[0][ids.shape[1] - 1 :][: len(weights)]
    torch.testing.assert_close(weights[:, :-1], read, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    assert answer.finish_reason in ("length", "stop")
    assert sum(answer.load().values()) == pytest.approx(1, abs=1e-4)
    assert list(answer.load().values()) == sorted(answer.load().values(), reverse=True)
    if expert == "base":
        assert answer.load() == {"base": 1.0}


def test_a_character_of_several_tokens_is_the_last_ones(talk):
    written = [token(part) for part in (b"x\xc3", b"\xa4\xe2", b"\x82", b"\xacy", b"\xff", b"z\xe2")]
    conversation = talk(written)
    assert list(conversation.ask("?")) == list(zip(["x", "ä", "", "€y", "", "z"], written, strict=True))
    assert conversation.answer.text == "xä€yz"


def test_white_space_around_an_answer_is_left_out():
    parts = [token(text) for text in ("\n ", " a", " ", "\n", "b \n", "", " ")]
    pieces = [(part.bytes.decode(), part) for part in parts]
    assert [text for text, _ in trimmed(pieces)] == ["a", " ", "\n", "b"]
    assert [part for _, part in trimmed(pieces)] == parts[1:5]
    assert list(trimmed([(" ", parts[0])])) == []


def test_a_chat_reads_what_was_said(talk, session):
    conversation = talk([token(" 1 ")], [token("2")], chat=True)
    for prompt in ("one", "two"):
        list(conversation.ask(prompt))
    read = [session.tokenizer.decode(request.prompt) for request in conversation.engine.requests]
    assert read == ["[user]one[a]", "[user]one[assistant]1[user]two[a]"]
    assert [message["content"] for message in conversation.messages] == ["one", "1", "two", "2"]
    with pytest.raises(ValueError, match=r"has 7\d tokens with what was said before.*have 40: shorten it, or .*/new"):
        conversation.ask("a long one " * 2)
    assert len(conversation.messages) == 4
    conversation.messages = []
    list(conversation.ask("three"))
    assert session.tokenizer.decode(conversation.engine.requests[-1].prompt) == "[user]three[a]"


def test_a_mixture_of_plain_prompts_reads_each_by_itself(talk, session):
    conversation = talk([token("1")])
    for prompt in ("one", "two"):
        list(conversation.ask(prompt))
    assert [session.tokenizer.decode(request.prompt) for request in conversation.engine.requests] == ["one", "two"]
    assert not conversation.messages
    with pytest.raises(ValueError, match="has 40 tokens, and prompt and answer together may have 40: shorten it"):
        conversation.ask("x" * 40)


def test_settings_reach_the_request_and_an_answer_takes_the_room_there_is(talk):
    conversation = talk([token("1")])
    conversation.max_new_tokens, conversation.temperature, conversation.seed = 30, 0.5, 3
    conversation.force("law")
    list(conversation.ask("x" * 5))
    list(conversation.ask("x" * 15))
    request = conversation.engine.requests[0]
    assert (request.max_tokens, request.expert, request.temperature, request.seed) == (30, "law", 0.5, 3)
    assert conversation.engine.requests[1].max_tokens == 25
    with pytest.raises(ValueError, match="unknown expert 'none'; the experts are sql, law"):
        conversation.force("none")
    assert conversation.expert == "law"


def test_a_stopped_answer_is_kept_as_far_as_it_came(talk):
    conversation = talk([token(str(n)) for n in range(9)], chat=True)
    pieces = conversation.ask("?")
    first = [next(pieces)[0], next(pieces)[0]]
    conversation.stop()
    assert first + [text for text, _ in pieces] == ["0", "1"]
    assert (conversation.answer.finish_reason, conversation.answer.why) == ("cancelled", None)
    assert conversation.messages[-1] == {"role": "assistant", "content": "01"}
    assert said(conversation.ask("again?")) == "012345678"


def test_one_that_nobody_reads_to_its_end_gives_its_slot_back(session):
    conversation = Conversation(session, slot_length=100)
    pieces = conversation.ask("x")
    next(pieces)
    pieces.close()
    conversation.max_new_tokens = 5
    list(conversation.ask("Käse?"))
    assert conversation.answer.finish_reason in ("length", "stop")
    assert conversation.engine.live == 0


def test_an_answer_that_fails_is_not_kept(talk, monkeypatch):
    conversation = talk([token("1")], chat=True)
    step = conversation.engine.step
    monkeypatch.setattr(
        conversation.engine,
        "step",
        lambda: [Event(event.handle, finish_reason="cancelled", why="no memory") for event in step()],
    )
    list(conversation.ask("?"))
    assert conversation.answer.why == "no memory"
    assert not conversation.messages


def test_a_look_at_the_last_prompt_and_at_a_stop(talk, session, monkeypatch, tmp_path):
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr("dylora_moe.model.background_texts", lambda: background_texts()[:20])
    conversation = talk([token("1")])
    with pytest.raises(ValueError, match="nothing was asked yet"):
        conversation.look(lambda done, count: None)
    list(conversation.ask("aabaabaab abab"))
    seen = []

    def stop(done: int, count: int) -> None:
        seen.append((done, count))
        if done == 3:
            conversation.stop()

    with pytest.raises(InterruptedError):
        conversation.look(stop)
    assert seen == [(1, 20), (2, 20), (3, 20)]
    found, near = conversation.look(lambda done, count: None)
    rows = [{"prompt": "aabaabaab abab"}]
    assert found == session.model.novelty(rows, tokenizer=session.tokenizer)[0]
    assert near[0] == (found.skill, found.score) == ("sql", found.score)
    assert sorted(name for name, _ in near) == sorted(session.model.skills)


def test_a_look_at_a_conversation(session, monkeypatch, tmp_path):
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr("dylora_moe.model.background_texts", lambda: background_texts()[:20])
    monkeypatch.setattr(session, "chat", True)
    monkeypatch.setattr(session.tokenizer, "chat_template", TEMPLATE)
    model = mixture(NAMES[:2])
    model.chat = True
    for number, name in enumerate(NAMES[:2]):
        model.teach(name, texts(number, 8), session.tokenizer)
    monkeypatch.setattr(session, "model", model)
    conversation = Conversation(session, slot_length=200)
    conversation.messages = [{"role": "user", "content": "aabaab"}, {"role": "assistant", "content": "ab"}]
    list(conversation.ask("aaabaaba"))
    _, near = conversation.look(lambda done, count: None)
    asked = conversation.answer.prompt
    assert [message["content"] for message in asked] == ["aabaab", "ab", "aaabaaba"]
    assert near == model.nearest_skills([{"prompt": asked}], tokenizer=session.tokenizer)[0]
    assert near != model.nearest_skills([{"prompt": asked[-1:]}], tokenizer=session.tokenizer)[0]


def test_without_a_library_there_is_nothing_to_compare_with(tmp_path):
    conversation = Conversation(Session(tiny_checkpoint(tmp_path, router_type="mlp")), slot_length=50)
    conversation.answer = Answer("?")
    with pytest.raises(ValueError, match=r"no skill library.*dylora-moe teach"):
        conversation.look(lambda done, count: None)
