"""The engine behind the gateway: what it calls the experts, and how a request is passed on to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import httpx2
from starlette.datastructures import Headers

from dylora_moe.arguments import BASE

CONNECT = 5
"""Seconds in which the engine must take a connection, and say which models it has."""
OF_A_CONNECTION = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
"""Headers that are between two neighbours only (RFC 9110, section 7.6.1)."""
NOT_ASKED = OF_A_CONNECTION | {b"host", b"content-length", b"content-type", b"expect", b"x-request-id"}
NOT_ANSWERED = OF_A_CONNECTION | {b"date", b"server"}


class EngineError(ValueError):
    """The engine does not answer, or not as it should.

    Args:
        message: what is wrong, with the remedy.
        status: of HTTP, for those whose request meets it.
    """

    def __init__(self, message: str, status: int = 503):
        super().__init__(message)
        self.status = status


class Engine:
    """An OpenAI-compatible engine that has every expert of a mixture as an adapter of the expert's name.

    Args:
        url: where it is, with or without `/v1`.
        experts: of the mixture.
        directory: of the mixture, for messages.
        base: what the engine calls the base; None finds out.
        key: what it needs as its bearer token where the gateway itself asks; None for nothing.
        replaces: whether `key` takes the place of what clients send.

    Attributes:
        url: without `/v1`.
        names: expert, or `"base"` → what the engine calls it, of those that it has.

    Raises:
        ValueError: a `url` that is none.
    """

    def __init__(
        self,
        url: str,
        experts: Sequence[str],
        directory: str,
        base: str | None = None,
        key: str | None = None,
        replaces: bool = False,
    ):
        self.url = _checked(url)
        self.names: dict[str, str] = {}
        self._experts, self._directory, self._base = list(experts), directory, base
        self._own = {} if key is None else {"authorization": f"Bearer {key}"}
        self._replaces = replaces
        self._client = httpx2.AsyncClient(
            headers={"accept-encoding": "identity"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # one client's are not the next one's
            timeout=httpx2.Timeout(None, connect=CONNECT),
            # uvicorn, which vLLM answers with, closes an idle connection after 5 seconds
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=2),
        )

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.aclose()

    # ------------------------------------------------------------------ what it has

    def read_names(self) -> None:
        """Ask the engine which models it has; waits for it.

        Raises:
            EngineError: it does not answer, or does not tell which of them is the base.
        """
        try:
            answer = httpx2.get(f"{self.url}/v1/models", headers=self._own, timeout=CONNECT)
        except httpx2.RequestError as error:
            raise self._down(error) from error
        if answer.status_code != 200:
            key = " Give its key with --engine-api-key." if answer.status_code in (401, 403) else ""
            said = f"{answer.status_code}: {answer.text[:200]}"
            raise EngineError(f"the engine at {self.url} answered GET /v1/models with {said}.{key}", 502)
        try:
            models = {str(model["id"]): model.get("parent") for model in answer.json()["data"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(
                f"what is at {self.url} answers GET /v1/models as no OpenAI-compatible engine does: "
                f"{answer.text[:200]!r}; say with --engine where the engine is.",
                502,
            ) from error
        base = self._base_among(models)
        self.names = {BASE: base} | {name: name for name in self._experts if name in models}

    def check_complete(self) -> None:
        """Raise `EngineError` unless the engine has all experts."""
        if missing := [name for name in self._experts if name not in self.names]:
            raise self._lacks(missing)

    async def model_for(self, expert: str) -> str:
        """What the engine calls an expert, or `"base"`; it is asked again where that is not known.

        Raises:
            EngineError: it does not have it.
        """
        if expert not in self.names:
            await asyncio.to_thread(self.read_names)
        if expert not in self.names:
            raise self._lacks([expert])
        return self.names[expert]

    def _base_among(self, models: dict[str, Any]) -> str:
        has = f"it has {_listed(models)}"
        if self._base is not None:
            if self._base not in models:
                raise EngineError(f"the engine at {self.url} has no model {self._base!r} (--engine-base); {has}.")
            return self._base
        found = [name for name, parent in models.items() if not parent and name not in self._experts]
        if len(found) != 1:
            which = _listed(found) if found else "none of its models"
            raise EngineError(
                f"the engine at {self.url} does not tell which of its models is the base ({which} could be): name it "
                f"with --engine-base; {has}."
            )
        return found[0]

    def _lacks(self, missing: list[str]) -> EngineError:
        return EngineError(
            f"the engine at {self.url} has no adapter for {_listed(missing)}; it has {_listed(self.names.values())}. "
            f"`dylora-moe export {self._directory} OUT --to vllm-lora` writes an adapter for every expert and prints "
            "the command that starts vLLM with them; another engine must call each as the expert is called."
        )

    def _down(self, error: Exception) -> EngineError:
        why = f"{type(error).__name__}: {error}".rstrip(": ")
        return EngineError(
            f"the engine at {self.url} does not answer ({why}); start it, or say with --engine where it is."
        )

    # ------------------------------------------------------------------ passing on

    async def ask(self, path: str, body: bytes, headers: Headers, id: str) -> httpx2.Response:
        """Pass a request on; the answer's body has yet to be read, and the answer to be closed.

        Args:
            path: below the engine's URL.
            body: JSON.
            headers: those of the client, which are passed on but for what is about its own connection.
            id: of the request.

        Raises:
            EngineError: the engine does not answer.
        """
        own = {"content-type": "application/json", "x-request-id": id, **(self._own if self._replaces else {})}
        passed = _passed_on(headers.raw, NOT_ASKED | {b"authorization"} if self._replaces else NOT_ASKED)
        passed += [(name.encode(), value.encode()) for name, value in own.items()]
        request = self._client.build_request("POST", f"{self.url}{path}", content=body, headers=passed)
        try:
            answer = await self._client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise self._down(error) from error
        except httpx2.TransportError as error:
            raise self.broke_off(error) from error
        if answer.status_code == 404:  # perhaps it was started again with others
            self.names = {}
        return answer

    def broke_off(self, error: Exception) -> EngineError:
        """What to say where the engine ends in the middle of a request."""
        return EngineError(
            f"the engine at {self.url} broke off ({type(error).__name__}); look into its log, and ask again.", 502
        )


def answered(answer: httpx2.Response) -> list[tuple[bytes, bytes]]:
    """The headers of the engine's answer that are passed on."""
    return _passed_on(answer.headers.raw, NOT_ANSWERED)


def _passed_on(headers: Sequence[tuple[bytes, bytes]], without: set[bytes]) -> list[tuple[bytes, bytes]]:
    """Headers, byte for byte, but for some and for those that `Connection` says are between two neighbours only."""
    named = [value for name, value in headers if name.lower() == b"connection"]
    without = without | {name.strip().lower() for name in b",".join(named).split(b",")}
    return [(name.lower(), value) for name, value in headers if name.lower() not in without]


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        well = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        well, parts = False, urlsplit("")
    if not well or parts.query or parts.fragment or not url.isascii() or not url.isprintable():
        raise ValueError(f"--engine {url!r}: an address such as http://127.0.0.1:8000 is needed.")
    if parts.username or parts.password:
        raise ValueError("--engine: leave name and password out of the address; --engine-api-key takes a key.")
    return parts._replace(path=parts.path.rstrip("/").removesuffix("/v1").rstrip("/")).geturl()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
