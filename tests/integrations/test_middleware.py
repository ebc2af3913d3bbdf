"""What the middleware makes of requests and answers, with a server and an engine made up for it."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from dylora_moe_vllm import middleware
from dylora_moe_vllm.engine import RECORDER
from dylora_moe_vllm.middleware import Routing

WEIGHTS = [[0.25, 0.75], [1.0, 0.0], [0.0, 0.0], [0.5, 0.5]]


class Engine:
    """As vLLM's: the second of two ranks records, so that the order of replies does not matter."""

    def __init__(self, worker: str = RECORDER):
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker))
        self.taken: list[str] = []

    async def collective_rpc(self, method: str, args: tuple[str]) -> list[Any]:
        assert method == "take_routing"
        self.taken.append(args[0])
        return [None, {"experts": ["red", "green"], "prompt": 3, "weights": WEIGHTS}]

    def get_tokenizer(self) -> None:
        pass


class Server:
    """Keeps what reaches it and answers with these bodies."""

    def __init__(self, bodies: list[bytes], content_type: str = "application/json", status: int = 200):
        self.bodies, self.content_type, self.status = bodies, content_type, status
        self.asked: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message, body = await receive(), b""
        while True:
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
            message = await receive()
        self.asked = body
        lengths = [int(value) for name, value in scope["headers"] if name == b"content-length"]
        assert lengths == [len(body)]
        headers = [(b"Content-Type", self.content_type.encode())]
        if self.content_type == "application/json":
            headers.append((b"Content-Length", str(sum(map(len, self.bodies))).encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for number, part in enumerate(self.bodies):
            more = number < len(self.bodies) - 1
            await send({"type": "http.response.body", "body": part, "more_body": more})
        assert (await receive())["type"] == "http.disconnect"


@pytest.fixture(autouse=True)
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_texts", lambda _, ids: [f"<{id}>" for id in ids])


def ask(server: Server, engine: Engine, body: bytes, path: str = "/v1/completions") -> tuple[int, dict, list[bytes]]:
    """Status, headers and body parts of the answer."""
    incoming = [
        {"type": "http.request", "body": body[:5], "more_body": True},
        {"type": "http.request", "body": body[5:], "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", str(len(body)).encode())]
    app = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "app": app}
    asyncio.run(Routing(server)(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
    parts = [message["body"] for message in sent[1:]]
    found = {name.lower(): value for name, value in sent[0]["headers"]}
    if b"content-length" in found:
        assert int(found[b"content-length"]) == len(b"".join(parts))
    return sent[0]["status"], found, parts


def request(**fields: Any) -> bytes:
    return json.dumps({"model": "mix", "prompt": [5, 6, 7], "routing": True} | fields).encode()


def answer(**choice: Any) -> bytes:
    return json.dumps({"id": "x", "choices": [{"index": 0, "text": "ab"} | choice]}).encode()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_whole_answer(path: str):
    whole = answer(token_ids=[8, 9], prompt_token_ids=[5, 6, 7], finish_reason="length")
    server, engine = Server([whole[:10], whole[10:]]), Engine()
    _, _, parts = ask(server, engine, request(vllm_xargs={"own": 1}), path)
    asked = json.loads(server.asked)
    assert asked["vllm_xargs"] == {"own": 1, "dylora_routing": engine.taken[0]}
    assert asked["return_token_ids"] is True
    assert "routing" not in asked
    (choice,) = json.loads(b"".join(parts))["choices"]
    assert choice == {
        "index": 0,
        "text": "ab",
        "finish_reason": "length",
        "routing": [
            {"token": "<8>", "token_id": 8, "expert": "green", "weights": {"red": 0.25, "green": 0.75}},
            {"token": "<9>", "token_id": 9, "expert": "red", "weights": {"red": 1}},
        ],
    }


def test_token_ids_stay_where_they_were_asked_for():
    server = Server([answer(token_ids=[8], prompt_token_ids=[5, 6, 7], finish_reason="stop")])
    _, _, parts = ask(server, Engine(), request(return_token_ids=True))
    (choice,) = json.loads(b"".join(parts))["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"], len(choice["routing"])) == ([8], [5, 6, 7], 1)


def test_two_requests_have_two_keys():
    engine = Engine()
    for _ in range(2):
        ask(Server([answer(token_ids=[8], finish_reason="stop")]), engine, request())
    assert len(set(engine.taken)) == 2


def test_streamed():
    chunks = [answer(token_ids=[8]), answer(token_ids=[9, 10], finish_reason=None)]
    chunks += [answer(token_ids=[], finish_reason="stop"), b'{"choices": [], "usage": {"completion_tokens": 3}}']
    text = b"".join(b"data: " + chunk + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    parts_of = [text[:7], text[7:100], text[100:101], text[101:-1], text[-1:]]
    engine = Engine()
    _, headers, parts = ask(Server(parts_of, "text/event-stream; charset=utf-8"), engine, request(stream=True))
    assert b"content-length" not in headers
    *events, last = b"".join(parts).removesuffix(b"\n\n").split(b"\n\n")
    assert last == b"data: [DONE]"
    found = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert [["routing" in choice for choice in each["choices"]] for each in found] == [[False], [False], [True], []]
    assert [one["token_id"] for one in found[2]["choices"][0]["routing"]] == [8, 9, 10]
    assert not any("token_ids" in choice for each in found for choice in each["choices"])
    assert len(engine.taken) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"prompt": "routing"}'),
        ("/v1/completions", b'{"prompt": "x", "routing": false}'),
        ("/v1/completions", b'{"prompt": "x", "metadata": {"routing": true}}'),
        ("/v1/completions", b'{"routing": tru'),
        ("/v1/completions", b'["routing"]'),
        ("/v1/completions", b'{"routing": ' + b"[" * 100_000),
        ("/v1/embeddings", b'{"routing": true}'),
    ],
)
def test_others_pass_untouched(path: str, body: bytes):
    server, engine = Server([answer(token_ids=[8], finish_reason="stop")]), Engine("auto")
    _, _, parts = ask(server, engine, body, path)
    assert server.asked == body
    assert parts == server.bodies
    assert not engine.taken


def test_no_more_is_kept_than_is_looked_into(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(middleware, "MOST", 4)
    server, engine = Server([answer(token_ids=[8], finish_reason="stop")]), Engine()
    assert ask(server, engine, request())[2] == server.bodies
    assert server.asked == request()
    assert not engine.taken


def test_errors_pass_untouched():
    server, engine = Server([b'{"error": 1}'], status=404), Engine()
    assert ask(server, engine, request())[::2] == (404, [b'{"error": 1}'])
    assert not engine.taken


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routing": "yes"}, 'routing="yes": expected true'),
        ({"n": 2}, "routing with n=2: expected 1"),
        ({"echo": True}, "routing with echo=true: expected false"),
        ({"use_beam_search": True}, "use_beam_search=true"),
        ({"include_reasoning": False}, "include_reasoning=false: expected true"),
        ({"prompt": ["a", "b"]}, "several prompts"),
        ({"prompt": [[1], [2]]}, "several prompts"),
        ({"vllm_xargs": 3}, "vllm_xargs: expected an object"),
    ],
)
def test_refused(fields: dict[str, Any], message: str):
    server = Server([])
    status, _, parts = ask(server, Engine(), request(**fields))
    assert status == 400
    assert message in json.loads(b"".join(parts))["error"]["message"]
    assert server.asked is None


@pytest.mark.parametrize("fields", [{"n": 1}, {"n": None}, {"prompt": ["a"]}, {"prompt": [[1, 2]]}, {"prompt": "a"}])
def test_not_refused(fields: dict[str, Any]):
    assert ask(Server([answer(token_ids=[8], finish_reason="stop")]), Engine(), request(**fields))[0] == 200


def test_a_server_that_records_nothing_says_so():
    status, _, parts = ask(Server([]), Engine("auto"), request())
    assert status == 400
    assert f"start it with --worker-cls {RECORDER}" in json.loads(b"".join(parts))["error"]["message"]


def test_a_record_with_gaps_is_an_error():
    with pytest.raises(RuntimeError, match="5 tokens were written, and 4 are on record"):
        ask(Server([answer(token_ids=[8] * 5, finish_reason="stop")]), Engine(), request())
