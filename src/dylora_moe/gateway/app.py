"""The routes of the gateway."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import httpx2
from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from prometheus_client import Counter
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from dylora_moe.serving.errors import ApiError
from dylora_moe.serving.guard import GONE, Limits, gone_away
from dylora_moe.serving.metrics import NAMESPACE, RequestMetrics
from dylora_moe.serving.names import expert_named, model_names
from dylora_moe.serving.schemas import Prompted
from dylora_moe.serving.skeleton import skeleton

from .choice import Choice, Chooser
from .engine import Engine, EngineError, answered
from .schemas import Chat, Named

logger = logging.getLogger(__name__)
Read = TypeVar("Read", bound=BaseModel)
Asked = Annotated[dict[str, Any], Body()]


@dataclass(frozen=True)
class Gateway:
    """What stands before an engine.

    Attributes:
        name: what the routed mixture is called as a model; its experts are `name:expert`, the bare base `name:base`.
        chooser: chooses among the experts.
        engine: answers.
    """

    name: str
    chooser: Chooser
    engine: Engine

    @property
    def models(self) -> dict[str, str | None]:
        """Model name → expert to force, None for the routed mixture."""
        return model_names(self.name, self.chooser.router.expert_names)


def create_app(gateway: Gateway, limits: Limits | None = None) -> FastAPI:
    """The server of a gateway.

    Args:
        gateway: what is served.
        limits: what is taken.
    """

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            gateway.chooser.close()
            await gateway.engine.close()

    metrics = RequestMetrics()
    chosen = Counter("chosen", "Requests by expert.", ["expert", "how"], registry=metrics.registry, namespace=NAMESPACE)
    app = skeleton("DyLoRA-MoE gateway", running, limits or Limits(), metrics, lambda: gateway.models)

    @app.exception_handler(EngineError)
    async def without_engine(request: Request, error: EngineError) -> Response:
        return _failed(error).response()

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the engine answers."""
        await asyncio.to_thread(gateway.engine.read_names)
        return {"status": "ok", "engine": gateway.engine.url}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: Asked, http: Request) -> Response:
        """Answer a conversation."""
        chosen_for = gateway.chooser.for_chat
        return await passed_on("/v1/chat/completions", body, lambda: chosen_for(_read(Chat, body).messages), http)

    @app.post("/v1/completions", response_model=None)
    async def complete(body: Asked, http: Request) -> Response:
        """Go on from a text, or from each of several."""
        chosen_for = gateway.chooser.for_prompts
        return await passed_on("/v1/completions", body, lambda: chosen_for(_read(Prompted, body).prompts), http)

    async def passed_on(
        path: str, body: Mapping[str, Any], routed: Callable[[], Awaitable[Choice]], http: Request
    ) -> Response:
        """The engine's answer, from the adapter that the request names or is `routed` to."""
        forced = expert_named(_read(Named, body).model, gateway.models)

        async def ask() -> tuple[Choice, httpx2.Response]:
            choice = await routed() if forced is None else Choice(forced, "forced")
            content = json.dumps({**body, "model": await gateway.engine.model_for(choice.expert)}).encode()
            return choice, await gateway.engine.ask(path, content, http.headers, http.state.request_id)

        asking = asyncio.create_task(ask())
        gone = asyncio.create_task(gone_away(http))
        try:
            await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return Response(status_code=GONE)  # nobody reads it
            choice, answer = await asking
        finally:
            for each in (asking, gone):
                each.cancel()
        chosen.labels(*choice).inc()
        return _Passed(answer, choice, gateway.engine)

    return app


class _Passed(StreamingResponse):
    """An answer of the engine, byte for byte as it comes; the engine is let go however the response ends."""

    def __init__(self, answer: httpx2.Response, choice: Choice, engine: Engine):
        super().__init__(_bytes_of(answer, engine), answer.status_code)
        own = {"x-dylora-expert": choice.expert, "x-dylora-choice": choice.how}
        self.raw_headers = [*answered(answer), *((name.encode(), value.encode()) for name, value in own.items())]
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


async def _bytes_of(answer: httpx2.Response, engine: Engine) -> AsyncIterator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    except httpx2.TransportError as error:
        broken = engine.broke_off(error)
        logger.warning("%s", broken)
        events = answer.headers.get("content-type", "").startswith("text/event-stream")
        if not events or "content-encoding" in answer.headers:
            raise  # the client sees that the body is not whole
        yield f"\n\ndata: {json.dumps(_failed(broken).body)}\n\n".encode()


def _failed(error: EngineError) -> ApiError:
    return ApiError(error.status, str(error), code="engine_unavailable", headers={"Retry-After": "5"})


def _read(kind: type[Read], body: Mapping[str, Any]) -> Read:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
