"""Errors as OpenAI's interface has them: a status, and a body that says what was wrong with which parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Status → type, where it is not `invalid_request_error` or, from 500 on, `server_error`."""
SHOWN = 200
"""How many letters of a value an error repeats."""


class ApiError(Exception):
    """What a request is answered with if it cannot be done.

    Args:
        status: of HTTP.
        message: for people.
        param: the field that is wrong.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def add_handlers(app: FastAPI) -> None:
    """Make every error of `app` one of these."""

    @app.exception_handler(ApiError)
    async def as_it_is(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def of_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        return _of_fields(error).response()

    @app.exception_handler(HTTPException)
    async def of_routes(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:SHOWN]!a}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()


def _of_fields(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['msg']} ({first.get('ctx', {}).get('error', '')}).")
    message = str(first["msg"]).removeprefix("Value error, ")
    place = ".".join(path)
    return ApiError(400, f"{place[:SHOWN]!a}: {message}" if place else message, param=path[0] if path else None)
