"""The gateway before an engine that is made up, and beside the whole mixture."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import openai
import pytest

from dylora_moe.gateway.app import Gateway, create_app
from dylora_moe.gateway.choice import Chooser
from dylora_moe.gateway.conversations import Conversations
from dylora_moe.gateway.engine import Engine
from dylora_moe.passes.prompt_router import PromptRouter
from dylora_moe.serving.guard import Limits
from dylora_moe.serving.service import Service
from gateway.fake import BASE, Fake, chunks, fake_app
from serving.live import NAME, listening, live_server, tiny_checkpoint
from tinybase import tiny_tokenizer
from topics import NAMES, texts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


CLIENT = httpx.Client(timeout=20)
"""One for all: making one takes longer than an answer."""


class Before(NamedTuple):
    """A gateway that runs: its `url`, what it serves, and the engine behind it."""

    url: str
    gateway: Gateway
    fake: Fake

    def post(self, path: str = "/v1/chat/completions", model: str = NAME, **body: Any) -> httpx.Response:
        if path == "/v1/chat/completions":
            body.setdefault("messages", [{"role": "user", "content": "aabaaab"}])
        return CLIENT.post(f"{self.url}{path}", json={"model": model, **body})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose router knows its topics, for chats."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("mixture"), taught=True, granularity="sequence")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = folder / "moe_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat": True}))
    return folder


@pytest.fixture(scope="module")
def router(folder: Path) -> PromptRouter:
    return PromptRouter.from_pretrained(folder)


@contextmanager
def before(
    router: PromptRouter, fake: Fake, limits: Limits | None = None, sticky: bool = True, **engine: Any
) -> Iterator[Before]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chooser = Chooser(router, tokenizer, True, Conversations() if sticky else None)
    with listening(fake_app(fake)) as url:
        made = Engine(url, router.expert_names, "runs/mine", **engine)
        made.read_names()
        made.check_complete()
        gateway = Gateway(NAME, chooser, made)
        with listening(create_app(gateway, limits)) as own:
            yield Before(own, gateway, fake)


@pytest.fixture(scope="module")
def shared(router: PromptRouter) -> Iterator[Before]:
    with before(router, Fake(NAMES)) as made:
        yield made


@pytest.fixture
def live(shared: Before) -> Before:
    """One gateway for all tests, before an engine that is as it was."""
    fresh = Fake(NAMES)
    fresh.goes_on.set()
    for name, value in vars(fresh).items():
        setattr(shared.fake, name, value)
    return shared


@pytest.fixture
def client(live: Before) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Of one to five messages, each of its own topic."""
    drawn, found = random.Random(0), []
    for number in range(count):
        rows = texts(number % len(NAMES), 3, seed=number)[:2]
        said = [row[key] for row in rows for key in ("prompt", "completion")]
        length = drawn.choice((1, 3))
        roles = ("user", "assistant") * 2
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)][:length]
        found.append([{"role": "system", "content": f"{number}"}, *messages] if drawn.random() < 0.5 else messages)
    return found


def test_the_expert_is_the_one_that_the_mixture_chooses(folder: Path, live: Before, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Service, "start_novelty", lambda self: None)
    common = {"model": NAME, "max_tokens": 1, "routing": True}
    asked: list[tuple[str, dict[str, Any]]]
    asked = [("/v1/chat/completions", {"messages": messages}) for messages in conversations(16)]
    asked += [("/v1/completions", {"prompt": row["prompt"]}) for topic in range(5) for row in texts(topic, 1)]
    asked += [("/v1/completions", {"prompt": [1, 5 + n, 9, 3 * n]}) for n in range(4)]
    found = []
    with live_server(folder) as whole:
        for path, body in asked:
            (token,) = CLIENT.post(f"{whole.url}{path}", json={**common, **body}).json()["choices"][0]["routing"]
            answer = live.post(path, **body)
            assert answer.headers["x-dylora-expert"] == live.fake.last["model"] == token["expert"]
            assert answer.headers["x-dylora-choice"] == "routed"
            found.append(token["expert"])
    assert len(found) == 25
    assert len(set(found)) >= 4


def test_the_body_is_passed_on_but_for_the_model(live: Before):
    rest = {"messages": [{"role": "user", "content": "aé\u2028"}], "n": 2, "big": 2**70, "deep": {"x": [None, 1.5]}}
    headers = {"authorization": "Bearer of-the-client", "x-request-id": "my-id", "x-own": "1", "connection": "x-hop"}
    asked = {**rest, "model": f"{NAME}:sql"}
    answer = CLIENT.post(f"{live.url}/v1/chat/completions", json=asked, headers={**headers, "x-hop": "1"})
    path, _, received = live.fake.asked[-1]
    assert path == "/v1/chat/completions"
    assert live.fake.last == {**rest, "model": "sql"}
    assert received["authorization"] == "Bearer of-the-client"
    assert (received["x-request-id"], received["x-own"]) == ("my-id", "1")
    assert "x-hop" not in received
    assert answer.headers["x-request-id"] == "my-id"
    assert answer.headers["x-dylora-choice"] == "forced"
    assert answer.headers.get_list("date") == [answer.headers["date"]]
    assert answer.json()["choices"][0]["message"]["content"] == "by sql"


def test_headers_are_passed_on_byte_for_byte_but_for_those_of_the_connection(live: Before):
    latin, hops = "Jürgen".encode("latin-1"), [(b"connection", b"keep-alive"), (b"connection", b"X-Hop")]
    asked = {"model": f"{NAME}:sql", "messages": []}
    headers = [*hops, (b"x-hop", b"1"), (b"x-name", latin)]
    assert CLIENT.post(f"{live.url}/v1/chat/completions", json=asked, headers=headers).status_code == 200
    received = live.fake.asked[-1][2]
    assert received["x-name"] == "Jürgen"
    assert "x-hop" not in received


def test_a_cookie_is_not_the_next_clients(live: Before):
    live.fake.refusal = (429, b"")
    assert live.post().headers["set-cookie"] == "whose=first"
    CLIENT.cookies.clear()  # another client
    live.post()
    CLIENT.cookies.clear()
    assert "cookie" not in live.fake.asked[-1][2]


def test_names(live: Before):
    listed = [model["id"] for model in CLIENT.get(f"{live.url}/v1/models").json()["data"]]
    assert listed == [NAME, f"{NAME}:base", *(f"{NAME}:{name}" for name in NAMES)]
    assert CLIENT.get(f"{live.url}/v1/models/{NAME}:law").json()["id"] == f"{NAME}:law"
    for name in NAMES:
        live.post(model=f"{NAME}:{name}", messages="is not looked at")
        assert live.fake.last["model"] == name
    live.post("/v1/completions", f"{NAME}:base", prompt="x")
    assert live.fake.last["model"] == BASE
    before = len(live.fake.asked)
    for unknown in ("sql", f"{NAME}:cooking", BASE, ""):
        answer = live.post(model=unknown)
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert f"there are {NAME}, {NAME}:base, {NAME}:sql" in error["message"]
    assert CLIENT.get(f"{live.url}/v1/models/sql").status_code == 404
    assert CLIENT.post(f"{live.url}/v1/embeddings", json={}).status_code == 404
    assert CLIENT.get(f"{live.url}/v1/chat/completions").status_code == 405
    assert len(live.fake.asked) == before


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ("/v1/chat/completions", {"model": 3}, "model"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "empty"),
        ("/v1/completions", {"prompt": "a" * 300}, "300 tokens; the base has 256 positions"),
        ("/v1/completions", {"prompt": "a" * 5000}, "5000 letters"),
        ("/v1/completions", {"prompt": [4, 999]}, "token id 999"),
        ("/v1/completions", {"prompt": ["a"] * 257}, "257 prompts"),
    ],
)
def test_what_cannot_be_read(live: Before, path: str, body: dict[str, Any], message: str):
    content = json.dumps({"model": NAME, **body})
    answer = CLIENT.post(f"{live.url}{path}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert not live.fake.asked


def test_several_prompts_have_one_expert(live: Before):
    alike = [row["prompt"] for row in texts(0, 2)]
    assert live.post("/v1/completions", prompt=alike).headers["x-dylora-expert"] == "sql"
    assert live.fake.last["prompt"] == alike
    answer = live.post("/v1/completions", prompt=[*alike, "jjiijjiij"])
    assert answer.status_code == 400
    assert "different experts (sql, code)" in answer.json()["error"]["message"]


def test_tools_and_pictures_are_passed_on_and_text_is_scored(live: Before):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": "aabaaab"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "aaabaa", "tool_call_id": "1"},
    ]
    assert live.post(messages=messages).headers["x-dylora-expert"] == "sql"
    assert live.fake.last["messages"] == messages


# ---------------------------------------------------------------------- the answer


def test_a_stream_comes_byte_for_byte_as_the_engine_sends_it(live: Before):
    live.fake.goes_on.clear()
    live.fake.parts = [b'data: {"odd" :1}\r\n\r\n: a comment\n\n', b"\xff half", b" an event\n\ndata: [DONE]\n\n"]
    body = {"model": NAME, "messages": [{"role": "user", "content": "ccd"}], "stream": True}
    with CLIENT.stream("POST", f"{live.url}/v1/chat/completions", json=body) as answer:
        parts = answer.iter_raw()
        assert next(parts) == live.fake.parts[0]  # while the engine waits for what follows
        live.fake.goes_on.set()
        assert b"".join(parts) == b"".join(live.fake.parts[1:])
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-dylora-expert"] == "law"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_takes_its_request_along(live: Before, stream: bool):
    live.fake.goes_on.clear()
    body = {"model": NAME, "messages": [{"role": "user", "content": "aab"}], "stream": stream}
    if stream:
        with CLIENT.stream("POST", f"{live.url}/v1/chat/completions", json=body) as answer:
            next(answer.iter_raw())
    else:
        with pytest.raises(httpx.ReadTimeout):
            CLIENT.post(f"{live.url}/v1/chat/completions", json=body, timeout=0.3)
    assert live.fake.left.wait(10)


def test_a_client_that_goes_away_is_not_scored(live: Before, monkeypatch: pytest.MonkeyPatch):
    begun, go_on, scored = threading.Event(), threading.Event(), []

    def slow(self: PromptRouter, ids: Any) -> str:
        scored.append(ids)
        begun.set()
        assert go_on.wait(20)
        return "sql"

    def noticed() -> bool:
        threading.Event().wait(0.02)
        return 'requests_total{path="/v1/completions",status="499"} 1.0' in CLIENT.get(f"{live.url}/metrics").text

    monkeypatch.setattr(PromptRouter, "choose", slow)
    first = threading.Thread(target=lambda: live.post("/v1/completions", prompt="aab"))
    first.start()
    assert begun.wait(20)
    with pytest.raises(httpx.ReadTimeout):
        CLIENT.post(f"{live.url}/v1/completions", json={"model": NAME, "prompt": ["ab", "ba"]}, timeout=0.3)
    assert any(noticed() for _ in range(200))
    go_on.set()
    first.join(20)
    assert live.post("/v1/completions", prompt="ccd").status_code == 200
    assert len(scored) == 2


def test_errors_of_the_engine_are_passed_on(live: Before):
    live.fake.refusal = (429, b'{"detail" : "busy"}')
    answer = live.post()
    assert (answer.status_code, answer.content) == live.fake.refusal
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-dylora-expert"] == "sql"


def test_a_stream_that_breaks_off_says_so(live: Before, client: openai.OpenAI):
    live.fake.breaks_after = 2
    stream = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "aab"}], stream=True, timeout=20
    )
    seen = []
    with pytest.raises(openai.APIError, match=rf"engine at {live.gateway.engine.url} broke off"):
        seen.extend(chunk.choices[0].delta.content for chunk in stream)
    assert "".join(seen) == "ab"[: len(seen)]


# ---------------------------------------------------------------------- the engine's state


def test_an_engine_that_is_down_and_back(router: PromptRouter):
    fake, port = Fake(NAMES), 0
    fake.goes_on.set()
    chooser = Chooser(router, tiny_tokenizer(), False, None)
    with listening(fake_app(fake)) as url:
        engine = Engine(f"{url}/v1/", router.expert_names, "runs/mine")
        engine.read_names()
        port = int(url.rpartition(":")[2])
    with listening(create_app(Gateway(NAME, chooser, engine))) as own:
        for answer in (Before(own, Gateway(NAME, chooser, engine), fake).post(), CLIENT.get(f"{own}/health")):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (503, "engine_unavailable")
            assert f"the engine at {url} does not answer (ConnectError" in error["message"]
            assert "start it, or say with --engine" in error["message"]
        with listening(fake_app(fake), port):
            assert CLIENT.get(f"{own}/health").json() == {"status": "ok", "engine": url}
            assert Before(own, Gateway(NAME, chooser, engine), fake).post().status_code == 200


def test_adapters_that_come_and_go(live: Before):
    asked = {"model": f"{NAME}:law"}
    live.fake.adapters = [name for name in NAMES if name != "law"]
    assert live.post(**asked).json()["error"]["message"] == "no law"  # the engine's own words
    answer = live.post(**asked)
    assert answer.status_code == 503
    message = answer.json()["error"]["message"]
    assert "has no adapter for law; it has owner/base, sql, math, chat, code." in message
    assert "`dylora-moe export runs/mine OUT --to vllm-lora`" in message
    assert live.post(model=f"{NAME}:sql").status_code == 200
    live.fake.adapters = NAMES
    assert live.post(**asked).status_code == 200


def test_keys(router: PromptRouter):
    fake = Fake(NAMES, key="engine's")
    fake.goes_on.set()
    limits = Limits(api_key="own")
    with before(router, fake, limits, key="engine's", replaces=True) as live:
        assert live.post().status_code == 401
        asked = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
        given = {"authorization": "Bearer own"}
        assert CLIENT.post(f"{live.url}/v1/chat/completions", json=asked, headers=given).status_code == 200
        assert fake.asked[-1][2]["authorization"] == "Bearer engine's"
        assert CLIENT.get(f"{live.url}/health").status_code == 200


# ---------------------------------------------------------------------- conversations


def test_a_conversation_stays_with_its_adapter(router: PromptRouter):
    fake = Fake(NAMES)
    fake.goes_on.set()
    said = [{"role": "user", "content": "aaabaab"}]
    turn = [{"role": "assistant", "content": "?"}, {"role": "user", "content": "jjiijjjiijjjijiijij" * 4}]

    def seen(live: Before, messages: list[dict[str, str]]) -> tuple[str, str]:
        headers = live.post(messages=messages).headers
        return headers["x-dylora-expert"], headers["x-dylora-choice"]

    with before(router, fake) as live:
        assert seen(live, said) == ("sql", "routed")
        assert seen(live, said + turn) == ("sql", "kept")
        assert seen(live, said + turn + turn) == ("sql", "kept")
        parts = [{"role": "user", "content": [{"type": "text", "text": "aaabaab"}]}]
        assert seen(live, parts + turn) == ("sql", "kept")
        assert seen(live, [{"role": "system", "content": "x"}, *said, *turn]) == ("code", "routed")
        assert live.post(model=f"{NAME}:law", messages=said + turn).headers["x-dylora-choice"] == "forced"
        assert seen(live, said + turn) == ("sql", "kept")
        counts = CLIENT.get(f"{live.url}/metrics").text
        assert 'dylora_moe_chosen_total{expert="sql",how="kept"} 4.0' in counts
    with before(router, fake, sticky=False) as live:
        assert seen(live, said) == ("sql", "routed")
        assert seen(live, said + turn) == ("code", "routed")


def test_scoring_holds_nobody_up(live: Before, monkeypatch: pytest.MonkeyPatch):
    begun, go_on, choose = threading.Event(), threading.Event(), PromptRouter.choose

    def slow(self: PromptRouter, ids: Any) -> str:
        begun.set()
        assert go_on.wait(20)
        return choose(self, ids)

    monkeypatch.setattr(PromptRouter, "choose", slow)
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda text=text: answers.append(live.post("/v1/completions", prompt=text)))
        for text in ("aab", "hij", "def")
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    assert live.post(model=f"{NAME}:law").status_code == 200
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert {answer.headers["x-dylora-expert"] for answer in answers} == {"sql", "math", "code"}


def test_openais_client(live: Before, client: openai.OpenAI):
    assert next(iter(client.models.list())).id == NAME
    said: Any = [{"role": "user", "content": "bbccd"}]
    raw = client.chat.completions.with_raw_response.create(model=NAME, messages=said)
    assert raw.headers["x-dylora-expert"] == "law"
    assert raw.parse().choices[0].message.content == "by law"
    stream = client.chat.completions.create(model=NAME, messages=said, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "abc"
    assert client.completions.create(model=NAME, prompt="bbccd").choices[0].text == "so"
    with pytest.raises(openai.NotFoundError, match=f"there are {NAME}"):
        client.chat.completions.create(model="gpt", messages=said)
    assert len(chunks()) == 4
