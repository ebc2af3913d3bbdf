"""`"routing": true` in a request to vLLM's OpenAI server: `--middleware dylora_moe_vllm.middleware.Routing`.

The request goes on with a name in its `vllm_xargs`, by which the worker records it, and asks for its token ids; the
answer that comes back gets the choice's field `routing`, with an entry per token: streamed, in the chunk that has the
finish reason. Requests without the field pass untouched.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .engine import RECORDER, recording
from .records import KEY, entry

PATHS = ("/v1/chat/completions", "/v1/completions")
MOST = 1 << 24
"""Bytes of a body that are looked into, which vLLM's key is asked for only after: a larger request passes untouched."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Routing:
    """ASGI middleware.

    Args:
        app: vLLM's.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATHS):
            return await self._app(scope, receive, send)
        messages = [await receive()]
        size = len(messages[0].get("body", b""))
        while messages[-1].get("more_body") and size <= MOST:
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
        asked = _asked(b"".join(message.get("body", b"") for message in messages))
        if asked is None:
            return await self._app(scope, _replayed(messages, receive), send)
        engine = scope["app"].state.engine_client
        if (reason := _refused(asked, engine.vllm_config)) is not None:
            return await _send_error(send, reason)
        key, keep_ids = str(uuid.uuid4()), bool(asked.get("return_token_ids"))
        del asked["routing"]
        asked |= {"return_token_ids": True, "vllm_xargs": {**(asked.get("vllm_xargs") or {}), KEY: key}}
        body = json.dumps(asked).encode()
        scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        answer = _Answer(send, engine, key, keep_ids)
        request: Message = {"type": "http.request", "body": body, "more_body": False}
        return await self._app(scope, _replayed([request], receive), answer.send)


def _asked(body: bytes) -> dict[str, Any] | None:
    """The request, if it asks for our field."""
    if b'"routing"' not in body:
        return None
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None  # vLLM says so
    return asked if isinstance(asked, dict) and asked.get("routing") not in (None, False) else None


def _refused(asked: dict[str, Any], config: Any) -> str | None:
    """Why a request cannot have the field."""
    prompt = asked.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not all(isinstance(each, int) for each in prompt)
    if asked["routing"] is not True:
        return f"routing={json.dumps(asked['routing'])[:80]}: expected true or false."
    if not recording(config):
        return f"routing: this server records no routing; start it with --worker-cls {RECORDER}."
    if several:
        return "routing: several prompts in one request; send one request per prompt."
    for field, allowed in (("n", 1), ("use_beam_search", False), ("echo", False), ("include_reasoning", True)):
        if asked.get(field) not in (None, allowed):
            given = json.dumps(asked[field])[:80]
            return f"routing with {field}={given}: expected {json.dumps(allowed)}, or leave it out."
    if not isinstance(asked.get("vllm_xargs"), dict | None):
        return "vllm_xargs: expected an object."
    return None


class _Answer:
    """Puts the field into what vLLM answers.

    Args:
        send: to the client.
        engine: of vLLM.
        key: of the record.
        keep_ids: whether the client asked for token ids as well.
    """

    def __init__(self, send: Send, engine: Any, key: str, keep_ids: bool):
        self._send, self._engine, self._key, self._keep_ids = send, engine, key, keep_ids
        self._start: Message | None = None  # of an answer that is not streamed, until its length is known
        self._streamed = self._as_it_is = False
        self._rest = b""
        self._ids: list[int] = []

    async def send(self, message: Message) -> None:
        """In the place of ASGI's own."""
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message["headers"]}
            self._streamed = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            self._as_it_is = message["status"] != 200
            if not self._streamed and not self._as_it_is:
                self._start = message
                return
        elif message["type"] == "http.response.body" and not self._as_it_is:
            self._rest += message.get("body", b"")
            more = message.get("more_body", False)
            if self._streamed:
                message = {**message, "body": await self._events(more)}
            elif more:
                return
            else:
                body = json.dumps(await self._with_routing(json.loads(self._rest))).encode()
                assert self._start is not None
                await self._send({**self._start, "headers": _with_length(self._start["headers"], len(body))})
                message = {**message, "body": body}
        await self._send(message)

    async def _events(self, more: bool) -> bytes:
        """The events that are there in full; all that is left, where no more will come."""
        *events, self._rest = self._rest.split(b"\n\n")
        sent = b""
        for event in events:
            data = event.removeprefix(b"data: ")
            if data != event and data.startswith(b"{"):
                event = b"data: " + json.dumps(await self._with_routing(json.loads(data))).encode()
            sent += event + b"\n\n"
        return sent if more else sent + self._rest

    async def _with_routing(self, body: dict[str, Any]) -> dict[str, Any]:
        for choice in body.get("choices") or []:
            self._ids += choice.get("token_ids") or []
            if choice.get("finish_reason") is not None:
                choice["routing"] = await self._routing()
        if not self._keep_ids:
            for part in (body, *(body.get("choices") or [])):
                part.pop("token_ids", None)
                part.pop("prompt_token_ids", None)
        return body

    async def _routing(self) -> list[dict[str, Any]]:
        taken = await self._engine.collective_rpc("take_routing", args=(self._key,))
        record = next((one for one in taken if one is not None), None)
        weights = record["weights"][: len(self._ids)] if record is not None else []
        if record is None or len(weights) < len(self._ids) or None in weights:
            raise RuntimeError(f"{len(self._ids)} tokens were written, and {len(weights)} are on record.")
        texts = _texts(self._engine.get_tokenizer(), self._ids)
        return [entry(*each, record["experts"]) for each in zip(self._ids, texts, weights, strict=True)]


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each token by itself, as vLLM's own `logprobs` show it."""
    from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens  # pyright: ignore[reportMissingImports]

    return convert_ids_list_to_tokens(tokenizer, ids)


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*others, (b"content-length", str(length).encode())]


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """`receive`, after these messages."""
    left = iter(messages)

    async def replay() -> Message:
        for message in left:
            return message
        return await receive()

    return replay


async def _send_error(send: Send, reason: str) -> None:
    error = {"message": reason, "type": "BadRequestError", "param": "routing", "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = _with_length([(b"content-type", b"application/json")], len(body))
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
