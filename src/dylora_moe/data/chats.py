"""Chat messages in OpenAI's and ShareGPT's form: what of them is asked and what is learnt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dylora_moe.schema import nearest

from .examples import DataError, Message

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
}
"""ShareGPT's `from` → role."""
REFUSED = {
    **dict.fromkeys(
        ("loss", "loss_mask", "mask", "masked", "train", "training", "trainable", "learn"),
        "what is learnt is said by `weight`: 0 leaves a turn of the assistant out",
    ),
    "function_call": "give it as `tool_calls`",
    "audio": "only text can be learnt",
    "images": "only text can be learnt",
    "refusal": "give the refusal as `content`",
    "prefix": "a reply is learnt from its beginning",
}
"""Keys of a message that would change what is learnt and are not supported, and what to do instead."""


def turns(before: Any, messages: Any, place: str) -> Iterator[tuple[list[Message], str | Message]]:
    """For each of the assistant's turns in `messages` what stands before it and what is said.

    A turn with `weight: 0` is not learnt, but stands before the later ones. What a message has beside role and content
    stays in it, for the chat template; a reply without such keys is its text.

    Args:
        before: messages of which none is learnt.
        messages: those whose turns are.
        place: where they stand.

    Raises:
        DataError: a message that cannot be used, by its number in the list, or nothing to learn.
    """
    if not isinstance(messages, list):
        raise DataError(f"{place}: expected a list of messages, each with role and content, got {shown(messages)}.")
    context = [_message(message, f"{place}, before it message {n}")[0] for n, message in enumerate(before, start=1)]
    learnt, replies = False, False
    found = []
    for number, given in enumerate(messages, start=1):
        where = f"{place}, message {number}"
        message, learnt = _message(given, where)
        if message["role"] == "assistant":
            if not context:
                raise DataError(f"{where}: the assistant speaks first, so there is nothing to answer.")
            replies = True
            if learnt:
                found.append((list(context), message if message.keys() - {"role", "content"} else message["content"]))
        context.append(message)
    if not found:
        reason = "all of the assistant's messages have weight 0" if replies else "no message of the assistant"
        raise DataError(f"{place}: {reason}, so there is nothing to learn.")
    yield from found


def without_nulls(value: Any) -> Any:
    """`value` without the nulls in its mappings, with which tables fill the keys that other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _message(given: Any, where: str) -> tuple[Message, bool]:
    """A message with role and content under these names, and whether it is to be learnt."""
    if not isinstance(given, dict):
        raise DataError(f"{where}: expected role and content, got {shown(given)}.")
    message = without_nulls(given)
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if speaker not in SHAREGPT:
            raise DataError(f"{where}: unknown speaker {speaker!r}; expected {', '.join(SHAREGPT)}.")
        message = {"role": SHAREGPT[speaker], **message}
        if "content" not in message and "value" in message:
            message["content"] = message.pop("value")
            given = {**given, "content": given["value"]}
    if "role" not in message:
        names = ", ".join(map(str, given))
        raise DataError(f"{where}: no 'role'.{nearest('role', map(str, given))} Its columns: {names or 'none'}.")
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; expected {', '.join(ROLES)}.")
    for key, remedy in REFUSED.items():
        if message.get(key) not in (None, "", [], {}):
            raise DataError(f"{where}: the key {key!r} is not supported; {remedy}.")
    learnt = _is_learnt(message.pop("weight", None), role, where)
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = _calls(calls, role, where)
    message["content"] = _content(message, given, where)
    return {key: value for key, value in message.items() if key == "content" or value not in ("", [], {})}, learnt


def _is_learnt(weight: Any, role: str, where: str) -> bool:
    if weight is None:
        return role == "assistant"
    if weight not in (0, 1):
        raise DataError(f"{where}: weight={weight!r}: a turn is learnt (1) or not (0).")
    if weight and role != "assistant":
        raise DataError(f"{where}: weight=1 for the role {role!r}; only turns of the assistant are learnt.")
    return bool(weight)


def _content(message: Message, given: dict[str, Any], where: str) -> str:
    content = message.get("content")
    calls = "tool_calls" in message
    if content is None and (calls or (message["role"] == "tool" and "content" in given)):
        return ""
    if "content" not in given:
        names = [str(name) for name in given if name != "role"]
        raise DataError(f"{where}: no 'content'.{nearest('content', names)} Its columns: {', '.join(map(str, given))}.")
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: 'content' must be text, got {shown(content)}.")
    if not content.strip() and not calls and message["role"] != "tool":
        raise DataError(f"{where}: empty 'content'; there is nothing to say.")
    return content


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    """Tool calls whose arguments are mappings, as chat templates want them; OpenAI's are JSON in text."""
    if role != "assistant":
        raise DataError(f"{where}: 'tool_calls' of the role {role!r}; only the assistant calls tools.")
    if not isinstance(calls, list):
        raise DataError(f"{where}: 'tool_calls' must be a list, got {shown(calls)}.")
    read = []
    for number, call in enumerate(calls, start=1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tool call {number} has no function with a name: {shown(call)}.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: the arguments of tool call {number} are not valid JSON: {error}.") from error
        if not isinstance(arguments, dict):
            raise DataError(f"{where}: the arguments of tool call {number} are no mapping: {shown(arguments)}.")
        function = {**function, "arguments": arguments}
        read.append(
            {**call, "function": function} if "function" in call else {"type": "function", "function": function}
        )
    return read


def shown(value: Any) -> str:
    """A value in a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
