"""A server that says what a test wants it to, with the page of the real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

from dylora_moe.serving.app import STATIC
from dylora_moe.serving.guard import CONTENT_POLICY


@dataclass
class Canned:
    """What the server says; a test may change it at any time.

    Attributes:
        experts: their names.
        answer: `(bytes, weights)` of each token.
        pause: seconds between tokens.
        breaks_after: tokens after which the connection is closed; None for never.
        chat, novelty, key: as a server tells or asks for them.
        new: what the prompts' novelty is, None while it is being prepared.
        refusal: the message of a 400 for whoever asks.
        asked: the bodies that came, the newest last.
    """

    experts: Sequence[str] = ("sql", "json")
    answer: Sequence[tuple[bytes, dict[str, float]]] = ()
    pause: float = 0
    breaks_after: int | None = None
    chat: bool = True
    novelty: str = "none"
    new: dict[str, Any] | None = None
    key: str | None = None
    refusal: str | None = None
    written: dict[str, float] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)


def canned_app(canned: Canned) -> FastAPI:
    """The app that says it."""
    app = FastAPI()
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        wrong = request.headers.get("authorization") != f"Bearer {canned.key}"
        if canned.key is not None and wrong and request.url.path.startswith("/v1"):
            return refused(401, "the API key is missing or wrong.", "invalid_api_key")
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CONTENT_POLICY
        return response

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/v1/experts")
    async def experts() -> dict[str, Any]:
        data = [
            {"id": name, "model": f"demo:{name}", "state": "routed", "tokens": canned.written.get(name, 0.0)}
            for name in (*canned.experts, "base")
        ]
        told = {"granularity": "token", "top_k": 2, "chat": canned.chat, "slot_length": 2048, "routed": True}
        return {"object": "list", "model": "demo", "novelty": canned.novelty, "learning": None, **told, "data": data}

    @app.post("/v1/novelty", response_model=None)
    async def novelty() -> Response | dict[str, Any]:
        if canned.new is None:
            return refused(503, "novelty is getting ready.", "preparing", {"Retry-After": "0.1"})
        return {"object": "list", "data": [canned.new]}

    @app.post("/v1/chat/completions", response_model=None)
    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request) -> Response:
        canned.asked.append(await request.json())
        if canned.refusal is not None:
            return refused(400, canned.refusal)
        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def chunks() -> AsyncIterator[str]:
        for index, (letters, weights) in enumerate(canned.answer):
            if index == canned.breaks_after:
                return
            expert = max(weights, key=lambda name: weights[name])
            token = {"token": "?", "bytes": list(letters), "expert": expert, "weights": weights}
            yield chunk({"delta": {}, "finish_reason": None, "routing": [token]})
            await asyncio.sleep(canned.pause)
        yield chunk({"delta": {}, "finish_reason": "stop"})
        yield "data: [DONE]\n\n"

    return app


def chunk(choice: dict[str, Any]) -> str:
    """An event."""
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def refused(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    """An error as OpenAI's servers tell it."""
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return JSONResponse(body, status, headers)
