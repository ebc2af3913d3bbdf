"""What the engine calls the experts, and what is said where it does not tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from dylora_moe.gateway.engine import Engine, EngineError
from gateway.fake import BASE, Fake, fake_app
from serving.live import listening


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, Fake]]:
    fake = Fake()
    with listening(fake_app(fake)) as url:
        yield url, fake


def models(*names: str, parent: str | None = None) -> list[dict[str, Any]]:
    return [{"id": name, "object": "model", **({"parent": parent} if parent else {})} for name in names]


def names(running: tuple[str, Fake], listed: list[dict[str, Any]], **options: Any) -> dict[str, str]:
    url, fake = running
    fake.models = listed
    engine = Engine(url, ["sql", "law"], "runs/mine", **options)
    engine.read_names()
    engine.check_complete()
    return engine.names


def test_the_base_is_the_one_without_a_parent(running: tuple[str, Fake]):
    found = names(running, [*models("b"), *models("sql", "law", "half", parent="b")])
    assert found == {"base": "b", "sql": "sql", "law": "law"}
    assert names(running, models("sql", "law", "b")) == found  # an engine that tells of no parents
    several = [*models("b", "alias"), *models("sql", "law", parent="b")]
    assert names(running, several, base="alias")["base"] == "alias"


@pytest.mark.parametrize(
    ("listed", "options", "message"),
    [
        (models("b", "c", "sql", "law"), {}, r"which of its models is the base \(b, c could be\).*--engine-base"),
        (models("sql", "law"), {}, r"none of its models could be.*it has sql, law"),
        (models("b", "sql", "law"), {"base": "c"}, r"no model 'c' \(--engine-base\); it has b, sql, law"),
        (models("b", "sql"), {}, r"no adapter for law; it has b, sql\. `dylora-moe export runs/mine OUT --to vllm-l"),
        (models("b"), {}, r"no adapter for sql, law; it has b\."),
        ([{"name": "b"}], {}, "as no OpenAI-compatible engine does"),
    ],
)
def test_what_is_missing_is_named(running: tuple[str, Fake], listed: Any, options: dict[str, Any], message: str):
    with pytest.raises(EngineError, match=message):
        names(running, listed, **options)


def test_one_that_wants_a_key(running: tuple[str, Fake]):
    url, fake = running
    fake.models, fake.adapters, fake.key = None, ["sql"], "k"
    try:
        with pytest.raises(EngineError, match=r"answered GET /v1/models with 401.*--engine-api-key"):
            Engine(url, ["sql"], "runs/mine").read_names()
        engine = Engine(url, ["sql"], "runs/mine", key="k")
        engine.read_names()
        assert engine.names == {"base": BASE, "sql": "sql"}
    finally:
        fake.key = None


def test_what_is_no_engine():
    app = FastAPI()
    app.get("/v1/models")(lambda: PlainTextResponse("hello"))
    app.get("/odd/v1/models")(lambda: PlainTextResponse("hello", headers={"content-encoding": "gzip"}))
    with listening(app) as url:
        with pytest.raises(EngineError, match=r"as no OpenAI-compatible engine does: 'hello'; say with --engine"):
            Engine(url, ["sql"], "runs/mine").read_names()
        with pytest.raises(EngineError, match=r"answered GET /v1/models with 404"):
            Engine(f"{url}/deeper", ["sql"], "runs/mine").read_names()
        with pytest.raises(EngineError, match=r"does not answer \(DecodingError"):
            Engine(f"{url}/odd", ["sql"], "runs/mine").read_names()
    with pytest.raises(EngineError, match=rf"the engine at {url} does not answer \(ConnectError.*start it") as down:
        Engine(url, ["sql"], "runs/mine").read_names()
    assert down.value.status == 503


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:port", "http://a?b", "http://a b\n"])
def test_an_address_is_needed(url: str):
    with pytest.raises(ValueError, match=r"--engine .* an address such as http://127\.0\.0\.1:8000 is needed"):
        Engine(url, [], "")
    with pytest.raises(ValueError, match="--engine-api-key takes a key"):
        Engine("http://me:secret@a", [], "")
    assert Engine("https://a:1/v1/", [], "").url == Engine("https://a:1", [], "").url == "https://a:1"
    assert Engine("http://v1", [], "").url == "http://v1"
