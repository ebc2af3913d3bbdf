"""Chat messages: which turns are learnt, what goes with them, and which keys are refused with their place."""

from __future__ import annotations

import pytest

from dylora_moe.data.chats import turns
from dylora_moe.data.examples import DataError

USER = {"role": "user", "content": "one?"}
REPLY = {"role": "assistant", "content": "1"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}}
READ = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}


def learnt(*messages, before=()):
    return list(turns(list(before), list(messages), "d.jsonl, line 3, 'messages'"))


def test_a_turn_of_weight_0_is_context_and_not_learnt():
    bad, good = {**REPLY, "content": "BAD", "weight": 0}, {**REPLY, "content": "GOOD", "weight": 1}
    bare = {**REPLY, "content": "BAD"}
    assert learnt(USER, bad, USER, good) == [([USER, bare, USER], "GOOD")]
    assert learnt(USER, {**REPLY, "weight": None}) == [([USER], "1")]
    assert learnt({**USER, "weight": 0}, REPLY) == [([USER], "1")]
    with pytest.raises(DataError, match=r"line 3, 'messages': all of the assistant's messages have weight 0, so there"):
        learnt(USER, bad)


def test_calls_of_tools_are_learnt_with_their_message_and_stand_before_the_answer():
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    read = {"role": "assistant", "content": "", "tool_calls": [READ]}
    tool = {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"}
    assert learnt(USER, call, tool, REPLY) == [([USER], read), ([USER, read, tool], "1")]


def test_other_keys_stay_with_their_message_for_the_template_and_nulls_go():
    named = {**USER, "name": "anna"}
    thought = {**REPLY, "reasoning_content": "easy", "refusal": None, "annotations": [], "tool_calls": None}
    assert learnt({**named, "weight": None}, thought) == [([named], {**REPLY, "reasoning_content": "easy"})]


def test_share_gpt_names_and_parts_of_text():
    first, second = {"from": "human", "value": "one?"}, {"from": "gpt", "value": "1"}
    assert learnt({"from": "system", "value": "s"}, first, second) == [
        ([{"role": "system", "content": "s"}, USER], "1")
    ]
    parts = [{"type": "text", "text": "on"}, {"type": "text", "text": "e?"}]
    assert learnt({"role": "user", "content": parts}, REPLY) == [([USER], "1")]


def test_only_what_follows_is_learnt():
    assert learnt(REPLY, before=[USER, {**REPLY, "content": "0"}, USER]) == [
        ([USER, {**REPLY, "content": "0"}, USER], "1")
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, {**REPLY, "weight": 0.5}], r"message 2: weight=0\.5: a turn is learnt \(1\) or not \(0\)"),
        ([{**USER, "weight": 1}, REPLY], r"message 1: weight=1 for the role 'user'; only turns of the assistant"),
        (
            [USER, {**REPLY, "train": False}],
            r"message 2: the key 'train' is not supported; what is learnt is said by `w",
        ),
        (
            [USER, {**REPLY, "function_call": {"name": "f"}}],
            r"message 2: .*'function_call' .*; give it as `tool_calls`",
        ),
        ([USER, {**REPLY, "content": None, "refusal": "no"}], r"message 2: the key 'refusal' .* as `content`"),
        (
            [{**USER, "tool_calls": [CALL]}, REPLY],
            r"message 1: 'tool_calls' of the role 'user'; only the assistant calls",
        ),
        ([USER, {**REPLY, "tool_calls": "f()"}], r"message 2: 'tool_calls' must be a list, got 'f\(\)'"),
        ([USER, {**REPLY, "tool_calls": [{"id": "1"}]}], r"message 2: tool call 1 has no function with a name"),
        (
            [USER, {**REPLY, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            r"message 2: the arguments of tool call 1 are not valid JSON",
        ),
        (
            [USER, {**REPLY, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            r"message 2: the arguments of tool call 1 are no mapping: \[1\]",
        ),
        ([USER, {"role": "assistant", "content": None}], r"message 2: 'content' must be text, got None"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, REPLY],
            r"message 1: 'content' must be text, got \[\{'type",
        ),
        ([{"from": "narrator", "value": "x"}], r"message 1: unknown speaker 'narrator'; expected system, human, "),
    ],
)
def test_what_cannot_be_learnt_as_it_stands_is_named(messages, message):
    with pytest.raises(DataError, match=r"^d\.jsonl, line 3, 'messages', " + message):
        learnt(*messages)
