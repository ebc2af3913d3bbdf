"""The routes of the server: OpenAI's interface to a mixture, and a page."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from . import request as engine
from .answers import Answer, ChatForm, Form, TextForm
from .changes import Changes, add_routes
from .errors import ApiError
from .guard import GONE, Limits, gone_away
from .metrics import Metrics
from .schemas import Asked, ChatAsked, CompletionAsked, NoveltyAsked
from .service import Service
from .skeleton import ERRORS, skeleton
from .worker import Answers, Failed

STATIC = Path(__file__).parent / "static"
SEPARATOR = "\n"  # of server-sent events
LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
"""What JSON leaves as it is and many a client takes for the end of a line → its escape."""


def create_app(service: Service, limits: Limits | None = None, changes: Changes | None = None) -> FastAPI:
    """The server of a mixture.

    Args:
        service: what is served.
        limits: what is taken.
        changes: how the running mixture is changed; None where it is not.

    Raises:
        ValueError: changes without a key that they need.
    """
    limits = limits or Limits()
    if changes is not None and limits.api_key is None:
        raise ValueError("whoever reaches the server could change the mixture: give an API key that they need for it.")

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            if changes is not None:
                await changes.stop()
            await service.stop()

    metrics = Metrics(service)
    app = skeleton("DyLoRA-MoE", running, limits, metrics, service.models)
    _add_state(app, service, changes)
    _add_completions(app, service, limits, metrics)
    if changes is not None:
        add_routes(app, changes, metrics, ERRORS)
    app.mount("/static", _Static(directory=STATIC), name="static")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    return app


class _Static(StaticFiles):
    """The page's files, which a browser asks for again after an upgrade."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _add_state(app: FastAPI, service: Service, changes: Changes | None) -> None:
    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        """Whether the process is well."""
        if service.worker.failure is not None:
            raise ApiError(
                503, f"the engine has stopped ({type(service.worker.failure).__name__}); restart the server."
            )
        return {"status": "ok"}

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> dict[str, str]:
        """Whether requests are answered."""
        if not service.ready or service.worker.failure is not None:
            raise ApiError(503, "not ready.", headers={"Retry-After": "1"})
        return {"status": "ready"}

    @app.get("/v1/experts", responses={401: ERRORS[401]})
    async def experts() -> dict[str, Any]:
        """What the mixture is, and what each expert has written."""
        state = {"changes": False, "learning": None} if changes is None else changes.state()
        return await service.description() | state

    @app.post("/v1/novelty", responses={status: ERRORS[status] for status in (400, 401, 413, 503)})
    async def novelty(asked: NoveltyAsked) -> dict[str, Any]:
        """Whether texts are of a kind that the mixture was taught, and the nearest skills."""
        if asked.messages is not None:
            texts = [asked.messages[-1].text]
        else:
            texts = [asked.input] if isinstance(asked.input, str) else list(asked.input or ())
        for text in texts:
            count = len(await service.encode(text))
            if count > service.engine.slot_length:
                most = service.engine.slot_length
                raise ApiError(400, f"a text of {count} tokens; at most {most} are looked at.", "input")
        found = await service.novelty(texts)
        data = [
            {**one._asdict(), "nearest": [{"skill": skill, "score": score} for skill, score in near]}
            for one, near in found
        ]
        return {"object": "list", "data": data}


def _add_completions(app: FastAPI, service: Service, limits: Limits, metrics: Metrics) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS, response_model=None)
    async def chat(asked: ChatAsked, http: Request) -> Response:
        """Answer a conversation."""
        expert = service.expert_of(asked.model)
        prompt = await service.encode(asked.messages)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        limit = asked.max_completion_tokens or asked.max_tokens or max(service.engine.slot_length - len(prompt), 1)
        trimmed = not service.session.chat
        requests = [_request(service, asked, prompt, expert, limit, logprobs, trimmed)]
        form = ChatForm(*_head("chatcmpl", asked, requests, logprobs), trimmed=trimmed)
        return await respond(asked, requests, form, http)

    @app.post("/v1/completions", responses=ERRORS, response_model=None)
    async def complete(asked: CompletionAsked, http: Request) -> Response:
        """Go on from a text, or from each of several."""
        expert = service.expert_of(asked.model)
        most = service.engine.slots + limits.queue
        if len(asked.prompts) > most:
            raise ApiError(400, f"{len(asked.prompts)} prompts; at most {most} are taken at a time.", "prompt")
        requests = []
        for prompt in asked.prompts:
            ids = await service.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
            requests.append(_request(service, asked, ids, expert, asked.max_tokens or 16, asked.logprobs))
        return await respond(asked, requests, TextForm(*_head("cmpl", asked, requests, asked.logprobs)), http)

    async def respond(asked: Asked, requests: Sequence[engine.Request], form: Form, http: Request) -> Response:
        started = time.perf_counter()
        answers = _admitted(service, limits, requests)
        metrics.prompt_tokens.inc(form.prompt_tokens)
        grown = [Answer(index) for index in range(len(requests))]
        written = 0

        async def events() -> AsyncGenerator[tuple[int, engine.Event]]:
            nonlocal written
            try:
                async for index, event in answers:
                    if not written and event.tokens:
                        metrics.first.observe(time.perf_counter() - started)
                    service.count(event.tokens)
                    metrics.tokens.inc(len(event.tokens))
                    written += len(event.tokens)
                    yield index, event
            finally:
                answers.close()

        if asked.stream:
            return _Stream(_chunks(events(), form, len(requests), lambda: written), answers)

        async def collect() -> None:
            async for index, event in events():
                grown[index].add(event)

        task = asyncio.create_task(collect())
        gone = asyncio.create_task(gone_away(http))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                return Response(status_code=GONE)  # nobody reads it
            await task
        except Failed as error:
            raise _failed(error) from error
        finally:
            for each in (task, gone):
                each.cancel()
            answers.close()
        return Response(form.whole(grown, written), media_type="application/json")


class _Stream(EventSourceResponse):
    """Server-sent events whose answers are given up however the response ends, even before its first byte."""

    def __init__(self, chunks: AsyncIterator[ServerSentEvent], answers: Answers):
        super().__init__(chunks, sep=SEPARATOR)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def _chunks(
    events: AsyncGenerator[tuple[int, engine.Event]], form: Form, count: int, written: Callable[[], int]
) -> AsyncIterator[ServerSentEvent]:
    try:
        for index in range(count):
            if (first := form.first(index)) is not None:
                yield _event(first)
        async for index, event in events:
            yield _event(form.chunk(index, event))
        if (last := form.last(written())) is not None:
            yield _event(last)
    except Failed as error:
        yield _event(json.dumps(_failed(error).body))
    finally:
        await events.aclose()
    yield _event("[DONE]")


def _event(data: str) -> ServerSentEvent:
    return ServerSentEvent(data.translate(LINE_ENDS), sep=SEPARATOR)


def _request(
    service: Service,
    asked: Asked,
    prompt: tuple[int, ...],
    expert: str | None,
    limit: int,
    logprobs: int | None,
    trimmed: bool = False,
) -> engine.Request:
    temperature = service.temperature if asked.temperature is None else asked.temperature
    top_p = service.top_p if asked.top_p is None else asked.top_p
    return engine.Request(prompt, limit, expert, temperature, top_p, asked.seed, asked.stops, logprobs, trimmed)


def _head(
    kind: str, asked: Asked, requests: Sequence[engine.Request], logprobs: int | None
) -> tuple[str, int, str, bool, bool, int, bool]:
    usage = bool(asked.stream_options and asked.stream_options.include_usage)
    tokens = sum(len(request.prompt) for request in requests)
    id = f"{kind}-{secrets.token_hex(12)}"
    return id, int(time.time()), asked.model, logprobs is not None, bool(asked.routing), tokens, usage


def _admitted(service: Service, limits: Limits, requests: Sequence[engine.Request]) -> Answers:
    free = limits.queue + service.engine.slots - service.worker.open_answers
    if len(requests) > free:
        wait = {"Retry-After": "1"}
        raise ApiError(429, f"{service.engine.waiting} requests wait already; come back later.", None, "busy", wait)
    try:
        return service.worker.open(requests)
    except Failed as error:
        raise _failed(error) from error
    except ValueError as error:
        raise ApiError(400, str(error)) from error


def _failed(error: Failed) -> ApiError:
    return ApiError(503, f"{error}; nothing more comes.", code="cancelled", headers={"Retry-After": "1"})
