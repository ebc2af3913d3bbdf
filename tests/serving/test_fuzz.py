"""Whatever is sent, the server answers, says what was wrong, and keeps nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from dylora_moe.serving.guard import Limits
from dylora_moe.serving.schemas import ChatAsked, CompletionAsked, ExpertAsked, NoveltyAsked
from serving.live import KEY, NAME, Live, live_server, tiny_checkpoint

MODELS = (NAME, f"{NAME}:sql", f"{NAME}:base", f"{NAME}:", ":sql", "gpt-4", "", NAME * 100)
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
CONCURRENT = 16
FIELDS = {*ChatAsked.model_fields, *CompletionAsked.model_fields, *NoveltyAsked.model_fields, *ExpertAsked.model_fields}
FIELDS = sorted({*FIELDS, "to", "n", "echo", "suffix", "tools", "response_format", "logit_bias"})
NUMBERS = (0, 1, -1, 2**31, 2**63, 2**70, -(2**70), 0.5, 1e308, -1e-300, float("nan"), float("inf"), None, True, False)
TEXTS = ("", " ", "a", "\x00", "\ud800", "\u202e", "é" * 50, "x" * 500, "true", "1", "\U0001f600", "{{7*7}}", "../..")
LISTS = ([], [[]], [None], ["a"], [1, 2], [-1], [10**9], ["a", 1], [["a"]], {}, {"a": 1}, {"type": "text"}, [{}] * 30)
MESSAGES = ([{"role": "user", "content": "x"}], [{"role": "x", "content": "x"}], [{"role": "user"}])
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "\ud800"}]}]
NASTY = (*NUMBERS, *TEXTS, *LISTS, *MESSAGES, PARTS)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("fuzzed"), taught=True)
    limits = Limits(KEY, body=20_000, queue=2 * CONCURRENT)
    with live_server(folder, limits, changes=True, slots=8, slot_length=40) as served:
        yield served


def test_the_interface_as_it_describes_itself(live: Live):
    """Schemathesis makes requests of the server's own OpenAPI, right and wrong ones."""
    interface = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    operations = [found.ok() for found in interface.get_all_operations()]
    assert len(operations) >= 12
    for operation in operations:
        if operation.label == "POST /v1/learn":  # it would begin to train
            continue

        @given(case=operation.as_strategy())
        @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def each(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = MODELS[len(str(case.body)) % len(MODELS)]
            if case.method.upper() == "DELETE":
                case.path_parameters["name"] = f"no-{case.path_parameters['name']}"
            answer = case.call(headers=HEADERS)
            assert answer.status_code < 500 or answer.status_code == 503, (case.body, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]

        each()
    still_well(live)


def body_of(drawn: random.Random) -> bytes:
    """A body: often nearly right, sometimes no JSON at all."""
    if drawn.random() < 0.1:
        whole = json.dumps({"model": NAME, "prompt": "abc"}).encode()
        return drawn.choice(
            [b"", b"nul", b"[1]", b"\xff\xfe", whole[: drawn.randrange(len(whole))], b"[" * 5000, whole * 2]
        )
    body: dict[str, Any] = {"model": drawn.choice(MODELS[:3]), "max_tokens": drawn.randint(1, 6), "temperature": 0}
    body |= {"prompt": "abc", "messages": [{"role": "user", "content": "abc"}], "stream": drawn.random() < 0.3}
    for _ in range(drawn.randint(0, 3)):
        body[drawn.choice(FIELDS)] = drawn.choice(NASTY)
    return json.dumps(body).encode()


async def fuzz(live: Live, count: int) -> Counter[int]:
    """Send so many bodies, some of whose senders do not wait for the answer; the statuses that came."""
    statuses: Counter[int] = Counter()
    numbers = iter(range(count))
    paths = ("/chat/completions", "/completions", "/novelty", "/experts", "/experts/nothing/rename")

    async def send(client: httpx.AsyncClient) -> None:
        for number in numbers:
            drawn = random.Random(number)
            content, path = body_of(drawn), drawn.choice(paths)
            timeout = 0.002 if drawn.random() < 0.05 else 60
            try:
                answer = await client.post(f"{live.url}/v1{path}", content=content, headers=HEADERS, timeout=timeout)
            except httpx.TimeoutException:
                continue
            statuses[answer.status_code] += 1
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], (number, path)
            assert answer.status_code < 500 or answer.status_code == 503, (number, path, content, answer.text)

    async with httpx.AsyncClient() as client:
        await asyncio.gather(*(send(client) for _ in range(CONCURRENT)))
    return statuses


def still_well(live: Live) -> None:
    """Nothing is left of what was asked, and the next request is answered."""
    asked = {"model": NAME, "prompt": "abc", "max_tokens": 2}
    assert httpx.post(f"{live.url}/v1/completions", json=asked, headers=HEADERS).status_code == 200
    worker = live.service.worker
    assert (worker.engine.live, worker.engine.waiting, worker.open_answers) == (0, 0, 0)


def test_bodies_of_all_kinds(live: Live):
    statuses = asyncio.run(fuzz(live, 400))
    assert statuses[200] > 20
    assert statuses[400] > 100
    still_well(live)


@pytest.mark.slow
def test_ten_thousand_bodies_and_no_growth(live: Live):
    asyncio.run(fuzz(live, 2000))
    gc.collect()
    before = psutil.Process().memory_info().rss
    statuses = asyncio.run(fuzz(live, 10_000))
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    still_well(live)
    assert grown < 64 << 20, statuses


def test_a_wrong_key_gets_nowhere(live: Live):
    drawn, client = random.Random(0), httpx.Client()
    for path in ("/chat/completions", "/completions", "/novelty", "/experts", "/learn", "/models", "/nothing"):
        for key in ("", "Bearer", "Bearer ", "bearer the-key", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"):
            headers = {"content-type": "application/json", **({"authorization": key.strip()} if key.strip() else {})}
            for method in ("GET", "POST", "DELETE", "PUT"):
                answer = client.request(method, f"{live.url}/v1{path}", content=body_of(drawn), headers=headers)
                assert answer.status_code == 401
