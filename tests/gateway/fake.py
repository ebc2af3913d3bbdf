"""An engine that says what a test wants it to, as vLLM with `--lora-modules` does."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

BASE = "owner/base"


@dataclass
class Fake:
    """What the engine says; a test may change it at any time.

    Attributes:
        adapters: their names.
        models: what `/v1/models` tells, instead of base and adapters.
        parts: the bytes of a stream, one after the other; None for three chunks of OpenAI's.
        goes_on: what a stream waits for after its first part, and an answer before it, if it is not set.
        breaks_after: parts after which the connection is cut; None for never.
        refusal: status and body for whoever asks.
        key: what it needs as its bearer token.
        asked: path, body and headers of what came, the newest last.
        left: set when a client went away before the end.
    """

    adapters: Sequence[str] = ()
    models: list[dict[str, Any]] | None = None
    parts: list[bytes] | None = None
    goes_on: threading.Event = field(default_factory=threading.Event)
    breaks_after: int | None = None
    refusal: tuple[int, bytes] | None = None
    key: str | None = None
    asked: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    @property
    def last(self) -> dict[str, Any]:
        """The body that came last."""
        return json.loads(self.asked[-1][1])

    @property
    def listed(self) -> list[dict[str, Any]]:
        """What `/v1/models` tells."""
        if self.models is not None:
            return self.models
        adapters = [{"id": name, "object": "model", "parent": BASE} for name in self.adapters]
        return [{"id": BASE, "object": "model", "parent": None}, *adapters]


def fake_app(fake: Fake) -> FastAPI:
    """The app that says it."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if fake.key is not None and request.headers.get("authorization") != f"Bearer {fake.key}":
            return JSONResponse({"error": {"message": "who?"}}, 401)
        return JSONResponse({"object": "list", "data": fake.listed})

    @app.post("/v1/chat/completions", response_model=None)
    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request) -> Response:
        fake.asked.append((request.url.path, await request.body(), dict(request.headers)))
        if fake.refusal is not None:
            status, body = fake.refusal
            own = {"retry-after": "7", "content-type": "application/problem+json", "set-cookie": "whose=first"}
            return Response(body, status, own)
        if fake.last["model"] not in {model["id"] for model in fake.listed}:
            return JSONResponse({"error": {"message": f"no {fake.last['model']}", "code": 404}}, 404)
        if fake.last.get("stream"):
            return StreamingResponse(stream(), media_type="text/event-stream")
        if not await waited(request):
            return Response(status_code=499)
        return JSONResponse(answer(fake.last, request.url.path))

    async def waited(request: Request) -> bool:
        while not fake.goes_on.is_set():
            if await request.is_disconnected():
                fake.left.set()
                return False
            await asyncio.sleep(0.01)
        return True

    async def stream() -> AsyncIterator[bytes]:
        try:
            for index, part in enumerate(chunks() if fake.parts is None else fake.parts):
                if index == fake.breaks_after:
                    raise ConnectionError("cut by the test")
                yield part
                while not fake.goes_on.is_set():
                    await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            fake.left.set()
            raise

    return app


def answer(body: dict[str, Any], path: str) -> dict[str, Any]:
    """An answer that is not streamed."""
    head = {"id": "one", "created": 1, "model": body["model"]}
    if path == "/v1/completions":
        return {**head, "object": "text_completion", "choices": [{"index": 0, "text": "so", "finish_reason": "stop"}]}
    message = {"role": "assistant", "content": f"by {body['model']}"}
    return {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }


def chunks() -> list[bytes]:
    """The events of a streamed answer."""
    events = [
        {
            "id": "one",
            "created": 1,
            "model": "x",
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        }
        for text in ("a", "b", "c")
    ]
    return [f"data: {json.dumps(event)}\n\n".encode() for event in events] + [b"data: [DONE]\n\n"]
