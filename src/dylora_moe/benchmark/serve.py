"""The work `serve`: requests that are answered together, by an engine or through a server.

Prompts are read before the clock starts; what is timed are the steps in which every request gets its next tokens.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from dylora_moe.arguments import BASE
from dylora_moe.base.embedded import resolve_base

from .kinds import Kind
from .models import Models, mixing_form
from .settings import SMOLLM2, Settings
from .work import Runner, inputs, model_of, set_policy, title_of

CHUNK = 256
NAME = "mixture"


def serve_runner(settings: Settings, models: Models, key: str, kind: Kind, experts: int | None) -> Runner:
    """One variant: requests to a mixture's experts, or for comparison the bare base over a batch that stays."""
    model = model_of(settings, models, kind, experts)
    ids = inputs(settings, models)
    if kind.family == "base":
        step, in_force = _static(settings, model, ids)
    else:
        step, in_force = (_http if kind.http else _engine)(settings, model, kind, ids)

    @contextmanager
    def with_policy() -> Iterator[None]:
        if kind.family == "base":
            with in_force():
                yield
            return
        set_policy(settings, model, kind, experts)
        with mixing_form(model, kind.form), in_force():
            yield

    return Runner(key, title_of(settings, kind, experts), experts, model, forward=step, step=step, in_force=with_policy)


def _static(settings: Settings, base: Any, ids: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Greedy decoding of one batch in which nobody comes or goes, the least that can be done."""
    state: dict[str, Any] = {}

    @contextmanager
    def read() -> Iterator[None]:
        state["cache"] = DynamicCache(config=base.config)
        with torch.no_grad():
            state["next"] = _best(base(ids, past_key_values=state["cache"], use_cache=True, logits_to_keep=1))
        yield
        state.clear()

    def step() -> None:
        with torch.no_grad():
            for _ in range(settings.new_tokens):
                state["next"] = _best(base(state["next"], past_key_values=state["cache"], use_cache=True))

    return step, read


def _best(output: Any) -> torch.Tensor:
    return output.logits[:, -1:].argmax(-1)


def _engine_of(settings: Settings, model: Any) -> Any:
    from dylora_moe.serving.engine import Engine

    length = settings.length + _most(settings)
    engine = Engine(model, _tokenizer(settings), settings.batch, length, CHUNK)
    engine.eos = frozenset()  # answers have the length that is asked for
    return engine


def _most(settings: Settings) -> int:
    """Tokens of an answer: those that are timed, and those written while others' prompts are read."""
    return settings.new_tokens + -(-settings.batch * settings.length // CHUNK) + settings.batch + 8


def _experts(settings: Settings, model: Any, kind: Kind) -> list[str | None]:
    """Of each request."""
    names = model.expert_names
    if kind.by_row:
        return [names[row % len(names)] for row in range(settings.batch)]
    return [BASE if kind.bare else names[0] if kind.forced else None] * settings.batch


def _engine(
    settings: Settings, model: Any, kind: Kind, ids: torch.Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from dylora_moe.serving.request import Request

    engine = _engine_of(settings, model)

    @contextmanager
    def read() -> Iterator[None]:
        prompts, most = ids.tolist(), _most(settings)
        asked = zip(prompts, _experts(settings, model, kind), strict=True)
        handles = [engine.admit(Request(tuple(prompt), most, expert, temperature=0.0)) for prompt, expert in asked]
        while engine.unread:
            engine.step()
        yield
        for handle in handles:
            engine.cancel(handle)
        engine.step()
        assert not engine.live

    def step() -> None:
        for _ in range(settings.new_tokens):
            engine.step()

    return step, read


def _http(settings: Settings, model: Any, kind: Kind, ids: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Streams through the server, whose clients are a process of their own."""
    from dylora_moe.serving.service import Service

    session: Any = SimpleNamespace(model=model, tokenizer=_tokenizer(settings), chat=False)
    service = Service(session, NAME, _engine_of(settings, model))
    written = lambda: sum(service.written.values())  # noqa: E731

    @contextmanager
    def read() -> Iterator[None]:
        with _server(service) as port:
            models = [NAME if expert is None else f"{NAME}:{expert}" for expert in _experts(settings, model, kind)]
            with _clients(port, models, ids.tolist(), _most(settings)):
                yield
            while service.engine.live or service.engine.waiting:
                time.sleep(0.001)

    def step() -> None:
        until = written() + settings.batch * settings.new_tokens
        while written() < until - 0.5:
            time.sleep(0.005)  # a shorter one would keep taking the interpreter from the engine

    return step, read


@contextmanager
def _server(service: Any) -> Iterator[int]:
    """Serve within the block; the port."""
    import uvicorn

    from dylora_moe.serving.app import create_app
    from dylora_moe.serving.worker import Worker

    service.worker = Worker(service.engine)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(create_app(service), log_level="error", timeout_graceful_shutdown=2, ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def _clients(port: int, models: list[str], prompts: list[list[int]], most: int) -> Iterator[None]:
    """Clients that ask at once and read their streams: all have a token when the block begins, and go when it ends."""
    shared = {"max_tokens": most, "temperature": 0, "stream": True}
    bodies = [{"model": model, "prompt": prompt, **shared} for model, prompt in zip(models, prompts, strict=True)]
    command = [sys.executable, Path(__file__).with_name("clients.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"port": port, "bodies": bodies}) + "\n")
        process.stdin.flush()
        said = process.stdout.readline().strip()
        if said != "reading":
            raise RuntimeError(said or "the clients ended before they had an answer")
        yield


def _tokenizer(settings: Settings) -> Any:
    """Of the base; for random weights one of numbers."""
    if settings.shape == SMOLLM2:
        return AutoTokenizer.from_pretrained(resolve_base("embedded"))
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, "a")), eos_token="a")
