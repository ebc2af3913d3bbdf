"""The server by OpenAI's own client and by plain HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from pydantic import BaseModel, ValidationError

from dylora_moe.serving.app import _event, create_app
from dylora_moe.serving.engine import Engine
from dylora_moe.serving.guard import Limits
from dylora_moe.serving.request import Request
from dylora_moe.serving.schemas import ChatAsked, CompletionAsked, ExpertAsked, LearnAsked, NoveltyAsked
from dylora_moe.serving.service import Service
from dylora_moe.session import Session
from serving.live import NAME, Live, live_server, tiny_checkpoint
from topics import NAMES, texts

ASKED = {"model": NAME, "messages": [{"role": "user", "content": "abcdef"}], "max_tokens": 8, "temperature": 0}

JSON = {"content-type": "application/json"}


def wait_until(true: Callable[[], Any]) -> None:
    """Wait until something is so, a minute at most."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it does not become so"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("served"), taught=True)
    with live_server(folder) as served:
        yield served


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def alone(live: Live, expert: str | None = None, text: str = "abcdef", tokens: int = 8) -> str:
    """What the mixture itself goes on with, whole characters."""
    session = live.service.session
    inputs = session.tokenizer(text, return_tensors="pt")
    ids = session.model.generate(
        **inputs, experts=expert, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=0
    )
    written = (live.service.engine.token_bytes(id) for id in ids[0, inputs["input_ids"].shape[1] :].tolist())
    return b"".join(written).decode("utf-8", "ignore")


def test_answers_are_those_of_the_mixture(live: Live, client: openai.OpenAI):
    for model, expert in ((NAME, None), (f"{NAME}:sql", "sql"), (f"{NAME}:base", "base")):
        found = client.completions.create(model=model, prompt="abcdef", max_tokens=8, temperature=0)
        assert found.choices[0].text == alone(live, expert)
        assert found.usage.prompt_tokens == 6
        assert found.usage.completion_tokens == 8
        assert found.choices[0].finish_reason == "length"
        assert found.model == model


def test_chat(live: Live, client: openai.OpenAI):
    found = client.chat.completions.create(**ASKED)
    assert found.choices[0].message.content == alone(live).lstrip()
    assert found.choices[0].message.role == "assistant"
    assert found.object == "chat.completion"
    both = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": [{"type": "text", "text": "def"}]}]
    joined = client.chat.completions.create(**{**ASKED, "messages": both})
    assert joined.usage.prompt_tokens == 7  # with the separator between them
    assert joined.choices[0].message.content == alone(live, text="abc\ndef").lstrip()


def test_streamed_is_the_same(client: openai.OpenAI):
    whole = client.chat.completions.create(**ASKED, extra_body={"routing": True})
    chunks = list(
        client.chat.completions.create(
            **ASKED, stream=True, stream_options={"include_usage": True}, extra_body={"routing": True}
        )
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [one for choice in choices for one in getattr(choice, "routing", [])] == whole.choices[0].routing
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices
    assert choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    text = list(client.completions.create(model=NAME, prompt="abcdef", max_tokens=8, temperature=0, stream=True))
    plain = client.completions.create(model=NAME, prompt="abcdef", max_tokens=8, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in text) == plain.choices[0].text


def test_streams_end_with_done(live: Live):
    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json={**ASKED, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk" for line in lines[:-1])


def test_routing_is_of_the_pass_that_predicted(live: Live, client: openai.OpenAI):
    session = live.service.session
    with session.model.trace() as trace:
        text = alone(live)
    read = trace.weights[0]
    found = client.chat.completions.create(**ASKED, extra_body={"routing": True}).choices[0].routing
    assert b"".join(bytes(one["bytes"]) for one in found).decode("utf-8", "ignore") == text
    for step, one in enumerate(found):
        expected = read[5 + step].tolist()
        weights = [one["weights"].get(name, 0.0) for name in NAMES]
        assert weights == pytest.approx(expected, abs=1e-4)
        assert one["expert"] == NAMES[expected.index(max(expected))]
    forced = client.chat.completions.create(**{**ASKED, "model": f"{NAME}:law"}, extra_body={"routing": True})
    assert {one["expert"] for one in forced.choices[0].routing} == {"law"}
    assert forced.choices[0].routing[-1]["weights"] == {"law": 1.0}
    bare = client.chat.completions.create(**{**ASKED, "model": f"{NAME}:base"}, extra_body={"routing": True})
    assert bare.choices[0].routing[0]["weights"] == {"base": 1.0}


def test_logprobs(client: openai.OpenAI):
    found = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(found) == 8
    for one in found:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob
        assert bytes(one.bytes).decode("utf-8", "backslashreplace") == one.token
        assert "\ufffd" not in "".join(each.token for each in one.top_logprobs)
        assert sum(math.exp(each.logprob) for each in one.top_logprobs) <= 1 + 1e-6
    text = client.completions.create(model=NAME, prompt="abcdef", max_tokens=8, temperature=0, logprobs=2).choices[0]
    assert text.logprobs.token_logprobs == pytest.approx([one.logprob for one in found], abs=1e-5)
    sampled = client.completions.create(model=NAME, prompt="abc", max_tokens=60, temperature=3, seed=7, logprobs=0)
    given = sampled.choices[0]
    for token, offset in zip(given.logprobs.tokens, given.logprobs.text_offset, strict=True):
        assert len(token) > 1 or given.text[offset] == token  # a part of a character has its own form
    assert len(text.logprobs.top_logprobs) == 8


def test_seeds_and_stops(client: openai.OpenAI):
    def sampled(seed: int) -> str:
        found = client.completions.create(model=NAME, prompt="abc", max_tokens=20, temperature=1, seed=seed)
        return found.choices[0].text

    assert sampled(1) == sampled(1) != sampled(2)
    whole = client.completions.create(model=NAME, prompt="abcdef", max_tokens=20, temperature=0).choices[0].text
    stop = next(letter for letter in whole[3:] if letter.isascii() and letter not in whole[:3])
    cut = client.completions.create(model=NAME, prompt="abcdef", max_tokens=20, temperature=0, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_stops_of_a_chat_are_looked_for_in_what_is_shown(live: Live, client: openai.OpenAI, monkeypatch):
    admitted, admit = [], live.service.engine.admit
    monkeypatch.setattr(live.service.engine, "admit", lambda request: admitted.append(request) or admit(request))
    client.chat.completions.create(**ASKED, stop=["\n"])
    client.completions.create(model=NAME, prompt="abc", max_tokens=1, stop=["\n"])
    assert [request.stop_past_blanks for request in admitted] == [True, False]


def test_several_prompts(live: Live, client: openai.OpenAI):
    prompts = ["abc", "defg", "hij"]
    found = client.completions.create(model=NAME, prompt=prompts, max_tokens=5, temperature=0)
    assert [choice.text for choice in found.choices] == [alone(live, None, text, 5) for text in prompts]
    ids = client.completions.create(model=NAME, prompt=[70, 71, 72], max_tokens=5, temperature=0)
    assert ids.usage.prompt_tokens == 3


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == [NAME, f"{NAME}:base", *(f"{NAME}:{e}" for e in NAMES)]
    assert client.models.retrieve(f"{NAME}:sql").id == f"{NAME}:sql"
    with pytest.raises(openai.NotFoundError, match=f"{NAME}:sql"):
        client.models.retrieve(f"{NAME}:nothing")
    with pytest.raises(openai.NotFoundError, match="there are"):
        client.chat.completions.create(**{**ASKED, "model": "gpt-4"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 2}, "n is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3}, "logprobs=true"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "200 tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 201}]}, "200 tokens"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ],
)
def test_values_that_cannot_be(live: Live, change: dict[str, Any], message: str):
    answer = httpx.post(f"{live.url}/v1/chat/completions", content=json.dumps({**ASKED, **change}), headers=JSON)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_values_that_change_nothing(client: openai.OpenAI):
    neutral = {"n": 1, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "user": "me", "unheard_of": 1}
    plain = client.chat.completions.create(**ASKED)
    same = client.chat.completions.create(**ASKED, extra_body={**neutral, "stop": None, "stream": None})
    assert same.choices[0].message == plain.choices[0].message


def test_bodies_that_are_none(live: Live):
    for content in (b"", b"{", b"[]", b"null", b'{"model": NaN}', b"\xff", b"[" * 10_000):
        answer = httpx.post(f"{live.url}/v1/chat/completions", content=content, headers=JSON)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]
    assert httpx.get(f"{live.url}/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{live.url}/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        (ChatAsked, {"messages": [0] * 1000}),
        (ChatAsked, {"messages": [{"role": "user", "content": [0] * 1000}]}),
        (CompletionAsked, {"prompt": [[]] * 1000}),
        (CompletionAsked, {"prompt": [{}] * 1000}),
        (CompletionAsked, {"prompt": [[{}] * 1000] * 1000}),
        (ChatAsked, {"stop": [0] * 1000}),
        (NoveltyAsked, {"input": [0] * 1000}),
        (LearnAsked, {"name": "a", "rows": [0] * 1000}),
        (ExpertAsked, {"name": "a", "adapter": "a", "rows": [{}] * 1000}),
    ],
)
def test_what_is_wrong_many_times_over_is_said_once(form: type[BaseModel], wrong: dict[str, Any]):
    with pytest.raises(ValidationError) as error:
        form.model_validate({**ASKED, **wrong})
    assert error.value.error_count() < 10


def test_prompts_that_cannot_fit_are_refused_before_they_are_read(live: Live, monkeypatch: pytest.MonkeyPatch):
    def read(*_: Any) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr("dylora_moe.serving.prompts.encode_prompt", read)
    for prompt, message in ((["a"] * 300, "300 prompts"), ("a" * 2000, "2000 letters"), ([["a"], "b"], "prompt")):
        answer = httpx.post(f"{live.url}/v1/completions", json={"model": NAME, "prompt": prompt})
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    long = {**ASKED, "messages": [{"role": "user", "content": "a" * 700}] * 3}
    assert "2100 letters" in httpx.post(f"{live.url}/v1/chat/completions", json=long).json()["error"]["message"]


def test_a_body_that_ends_too_early_is_not_taken(live: Live):
    def prompt_tokens() -> str:
        lines = httpx.get(f"{live.url}/metrics").text.splitlines()
        return next(line for line in lines if line.startswith("dylora_moe_prompt_tokens_total"))

    def gone() -> bool:
        return 'path="other",status="499"' in httpx.get(f"{live.url}/metrics").text

    before, body = prompt_tokens(), json.dumps(ASKED).encode()
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + f"Content-Length: {len(body) + 1}\r\n\r\n".encode() + body)
        time.sleep(0.1)
    wait_until(gone)
    assert prompt_tokens() == before


def test_files_of_the_machine_are_not_served(live: Live):
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd", "/..%2f"):
        assert httpx.get(live.url + path).status_code == 404
    page = httpx.get(live.url)
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_experts_and_what_they_have_written(live: Live, client: openai.OpenAI):
    before = httpx.get(f"{live.url}/v1/experts").json()
    assert [each["id"] for each in before["data"]] == [*NAMES, "base"]
    assert before["router_type"] == "closed_form"
    assert before["routed"]
    assert not before["changes"]
    client.chat.completions.create(**{**ASKED, "model": f"{NAME}:sql"})
    after = httpx.get(f"{live.url}/v1/experts").json()
    assert after["data"][0]["tokens"] == pytest.approx(before["data"][0]["tokens"] + 8)
    assert after["data"][0]["rows"] > 0
    counts = httpx.get(f"{live.url}/metrics").text
    assert 'dylora_moe_expert_tokens_total{expert="sql"}' in counts
    assert "dylora_moe_live 0.0" in counts
    assert 'dylora_moe_requests_total{path="/v1/chat/completions",status="200"}' in counts


def test_novelty(live: Live):
    wait_until(lambda: httpx.get(f"{live.url}/v1/experts").json()["novelty"] == "ready")
    rows = [row for row in texts(1, 3, seed=5) if not isinstance(row, str)]
    asked = {"input": [row["prompt"] for row in rows]}
    answer = httpx.post(f"{live.url}/v1/novelty", json=asked)
    assert answer.status_code == 200, answer.text
    found = answer.json()["data"]
    for one in found:
        assert one["answer"] in ("known", "related", "new", "too short to say")
        assert 0 <= one["p"] <= 1
        assert one["nearest"][0] == {"skill": one["skill"], "score": one["score"]}
        assert len(one["nearest"]) == 5
    assert httpx.post(f"{live.url}/v1/novelty", json={}).status_code == 400


def test_state(live: Live):
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{live.url}/ready").status_code == 200
    assert httpx.get(f"{live.url}/version").json()["version"]
    given = httpx.get(f"{live.url}/health", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = httpx.get(f"{live.url}/health", headers={"x-request-id": "a b\\n"})
    assert made.headers["x-request-id"].startswith("req-")


def test_what_fails_is_said_as_every_other_error_is(live: Live, monkeypatch, caplog):
    def broken() -> None:
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(live.service, "_description", broken)
    answer = httpx.get(f"{live.url}/v1/experts", headers={"x-request-id": "mine-2"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "mine-2"
    assert "content-security-policy" in answer.headers
    assert "mine-2" in caplog.text
    assert "a secret of ours" in caplog.text


def test_a_slash_too_many_is_not_found_rather_than_sent_elsewhere(live: Live):
    assert httpx.post(f"{live.url}/v1/completions/", json={}, headers=JSON).status_code == 404


def test_requests_that_were_refused_are_not_counted_as_cancelled(live: Live):
    before = live.service.worker.cancelled
    body = {"model": f"{NAME}:base", "prompt": [[1, 2], [1] * 500], "max_tokens": 4}
    assert httpx.post(f"{live.url}/v1/completions", json=body).status_code == 400
    wait_until(lambda: not (live.service.engine.live or live.service.engine.waiting))
    assert live.service.worker.cancelled == before
    assert live.service.worker.open_answers == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(live: Live, stream: bool):
    engine, worker = live.service.engine, live.service.worker
    ends, engine.eos, before = engine.eos, frozenset(), worker.cancelled
    try:
        body = json.dumps({**ASKED, "max_tokens": 190, "stream": stream}).encode()
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: engine.live)
        wait_until(lambda: not (engine.live or engine.waiting or worker.open_answers))
        assert worker.cancelled == before + 1
    finally:
        engine.eos = ends


def test_a_client_that_is_gone_before_the_first_byte(tmp_path):
    session = Session(tiny_checkpoint(tmp_path, taught=True))
    service = Service(session, NAME, Engine(session.model, session.tokenizer, slots=2, slot_length=100))
    served = create_app(service)
    body = [json.dumps({**ASKED, "stream": True}).encode()]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body.pop()} if body else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise OSError("the connection is closed")

    async def ask() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
        scope |= {"headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0"}}
        async with served.router.lifespan_context(served):
            with contextlib.suppress(OSError):
                await served(scope, receive, send)
            assert service.worker.open_answers == 0
            assert service.worker.cancelled == 1

    asyncio.run(ask())


def test_the_key(tmp_path):
    with live_server(tiny_checkpoint(tmp_path, taught=True), Limits(api_key="secret", body=2000, queue=0)) as served:
        url = f"{served.url}/v1"
        for key in ("wrong", "secret x", "Secret", "secrets", "sécret"):
            headers = {"authorization": f"Bearer {key}".encode()}
            for path in ("/models", "/nothing", "/chat/completions", "/metrics/../models"):
                answer = httpx.get(url + path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{served.url}/health").status_code == 200
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
        assert client.chat.completions.create(**ASKED).choices
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="other", max_retries=0).models.list()
        answer = httpx.post(
            f"{url}/completions", content=b" " * 2001, headers={"authorization": "Bearer secret", **JSON}
        )
        assert answer.status_code == 413

        def dripping() -> Iterator[bytes]:
            yield from [b" " * 500] * 5

        answer = httpx.post(
            f"{url}/completions", content=dripping(), headers={"authorization": "Bearer secret", **JSON}
        )
        assert answer.status_code == 413
        with pytest.raises(openai.BadRequestError, match="at most 4 are taken"):  # four slots and no queue
            client.completions.create(model=NAME, prompt=["abc"] * 5, max_tokens=4)
        served.service.engine.eos = frozenset()
        with client.completions.create(model=NAME, prompt=["abc"] * 4, max_tokens=190, stream=True) as busy:
            next(iter(busy))
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model=NAME, prompt="abc", max_tokens=4)
        wait_until(lambda: not served.service.worker.open_answers)
        assert client.completions.create(model=NAME, prompt="abc", max_tokens=4).choices


def test_the_engine_fails(tmp_path):
    with live_server(tiny_checkpoint(tmp_path, taught=True)) as served:
        engine = served.service.engine

        def broken() -> list:
            raise KeyError("a bug")

        engine.step = broken
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=ASKED)
        assert answer.status_code == 503
        assert "engine has stopped" in answer.json()["error"]["message"]
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert httpx.post(f"{served.url}/v1/chat/completions", json=ASKED).status_code == 503


def test_requests_in_one_batch_are_answered_as_alone(live: Live, client: openai.OpenAI):
    from concurrent.futures import ThreadPoolExecutor

    jobs = [(None, "abcdef"), ("sql", "hhh"), ("base", "abcdef"), ("law", "ccdd"), (None, "fgh"), ("sql", "abcdef")]

    def ask(job: tuple[str | None, str]) -> str:
        model = NAME if job[0] is None else f"{NAME}:{job[0]}"
        return client.completions.create(model=model, prompt=job[1], max_tokens=12, temperature=0).choices[0].text

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, jobs))
    assert found == [alone(live, expert, text, 12) for expert, text in jobs]


def test_a_request_says_what_the_engine_would(live: Live):
    """The limits of the body are not looser than the engine's own, which raise before anything is queued."""
    with pytest.raises(ValueError, match="do not fit"):
        live.service.engine.admit(Request((1,) * 150, 100))
    assert live.service.engine.waiting == 0


def test_ends_of_lines_within_an_event_are_escaped():
    event = _event('{"text":"a\x85b\u2028c\u2029"}').encode().decode()
    assert len(event.splitlines()) == 2
    assert json.loads(event.removeprefix("data: ")) == {"text": "a\x85b\u2028c\u2029"}
