"""A server before it answers anything: its guard, its errors, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse

from dylora_moe.version import __version__

from .errors import add_handlers
from .guard import Guard, Limits
from .metrics import RequestMetrics
from .names import described, expert_named

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what}
    for status, what in {
        400: "A value that cannot be used; the error names it.",
        401: "The API key is missing or wrong.",
        404: "No such model, expert or job.",
        413: "A body that is too large.",
        429: "The queue is full.",
        503: "Busy, getting ready or shutting down.",
    }.items()
}


def skeleton(
    title: str,
    running: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    limits: Limits,
    metrics: RequestMetrics,
    names: Callable[[], Mapping[str, str | None]],
) -> FastAPI:
    """A server with `/version`, `/metrics` and `/v1/models`.

    Args:
        title: of its interface.
        running: what it is within while it runs.
        limits: what is taken.
        metrics: what is counted.
        names: → its models at the moment, see `model_names`.
    """
    app = FastAPI(
        title=title, version=__version__, lifespan=running, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.add_middleware(Guard, limits=limits, metrics=metrics)
    add_handlers(app)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of the package."""
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def counts() -> Response:
        """For Prometheus."""
        return metrics.response()

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        """The mixture, its base and its experts, each a model."""
        return {"object": "list", "data": [described(name) for name in names()]}

    @app.get("/v1/models/{model:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model(model: str) -> dict[str, Any]:
        """One of them."""
        expert_named(model, names())
        return described(model)

    return app
