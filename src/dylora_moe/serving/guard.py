"""What stands before the routes: limits, the key, ids of requests, and what is counted of each."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import RequestMetrics

logger = logging.getLogger(__name__)
GONE = 499
"""The status of what nobody waits for any more, which is counted only."""
ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
CONTENT_POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"


async def gone_away(http: Request) -> None:
    """Wait until the client, whose body was read, has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        api_key: what `/v1/*` needs; None for nothing.
        body: bytes of a request at most.
        connections: requests to `/v1/*` at a time at most; the others are told to come back.
        queue: requests that wait for a slot at most.
    """

    api_key: str | None = None
    body: int = 1 << 20
    connections: int = 512
    queue: int = 256


class Guard:
    """Middleware, of ASGI itself so that streams pass through it as they are.

    Args:
        app: what it stands before.
        limits: what is taken.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: RequestMetrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = id
        status, begun = 500, False

        async def sending(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                own = MutableHeaders(scope=message)
                own["X-Request-ID"] = id
                own["X-Content-Type-Options"] = "nosniff"
                own["Content-Security-Policy"] = CONTENT_POLICY
                own["Referrer-Policy"] = "no-referrer"
            await send(message)

        guarded = scope["path"].startswith("/v1")
        try:
            if guarded:
                self._check(headers)
                self._open += 1
            try:
                body = await self._read(receive)
                if body is None:
                    status = GONE
                else:
                    await self.app(scope, body, sending)
            finally:
                self._open -= guarded
        except ApiError as error:
            await error.response()(scope, receive, sending)
        except Exception:  # ours, which whoever asked can only report
            if begun:
                raise
            logger.exception("request %s failed", id)
            failed = ApiError(500, "the server failed at this; its log has the reason.")
            await failed.response()(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.latency.labels(route).observe(time.perf_counter() - started)

    def _check(self, headers: Headers) -> None:
        key = self.limits.api_key
        if key is not None:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                wanted = {"WWW-Authenticate": "Bearer"}
                raise ApiError(401, "the API key is missing or wrong.", code="invalid_api_key", headers=wanted)
        if self._open >= self.limits.connections:
            busy = f"{self._open} requests are open already; come back later."
            raise ApiError(503, busy, code="busy", headers={"Retry-After": "1"})
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.limits.body:
            raise self._too_large()

    async def _read(self, receive: Receive) -> Receive | None:
        """Read the body, and give it to whoever receives next; None where it ends too early."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limits.body:
                raise self._too_large()
            more = message.get("more_body", False)
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def receiving() -> Message:
            return whole.pop() if whole else await receive()

        return receiving

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.limits.body} bytes, which is all that is taken.")
