"""`dylora-moe gateway`."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from typer.testing import CliRunner

from dylora_moe.cli import app
from gateway.fake import Fake, fake_app
from serving.live import NAME, listening, tiny_checkpoint
from tinybase import tiny_tokenizer
from topics import NAMES

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("commanded"), taught=True)


def test_it_serves_what_it_is_told_to(folder: Path, monkeypatch: pytest.MonkeyPatch):
    fake, seen = Fake(NAMES), []
    fake.goes_on.set()

    def run(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        with listening(self.config.app) as url:  # pyright: ignore[reportArgumentType]
            body = {"model": "mine", "messages": [{"role": "user", "content": "aabaab"}]}
            for headers in ({}, {"authorization": "Bearer k"}):
                seen.append(httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers))

    monkeypatch.setattr(uvicorn.Server, "run", run)
    with listening(fake_app(fake)) as url:
        words = [str(folder), "--engine", f"{url}/v1", "--served-model-name", "mine", "--api-key", "k", "--port", "0"]
        done = runner.invoke(app, ["gateway", *words])
    assert done.exit_code == 0, done.output
    assert "Serving mine at http://127.0.0.1:" in done.output
    assert f"answered by the engine at {url}." in " ".join(done.output.split())
    assert [answer.status_code for answer in seen] == [401, 200]
    assert seen[1].headers["x-dylora-expert"] == fake.last["model"] == "sql"
    assert fake.asked[-1][2]["authorization"] == "Bearer k"


def test_a_checkpoint_on_the_hub_has_its_own_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def load(place: Path, _: str) -> Any:
        seen.append(place)
        return tiny_tokenizer()

    seen = []
    monkeypatch.setattr("dylora_moe.checkpoint.files.snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr("dylora_moe.base.loading.load_tokenizer", load)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    with listening(fake_app(Fake(NAMES))) as url:
        done = runner.invoke(app, ["gateway", "me/skills", "--engine", url, "--port", "0"])
    assert done.exit_code == 0, done.output
    assert seen == [folder]


def test_what_cannot_be_served(folder: Path, tmp_path: Path):
    def message(*words: Any) -> str:
        result = runner.invoke(app, ["gateway", *map(str, words), "--port", "0"])
        assert result.exit_code
        return str(result.exception)

    assert "--engine 'here'" in message(folder, "--engine", "here")
    with listening(fake_app(Fake(NAMES[:3]))) as url:
        assert "no adapter for chat, code" in message(folder, "--engine", url)
        assert f"`dylora-moe export {folder} OUT --to vllm-lora`" in message(folder, "--engine", url)
        assert "--engine-base" in message(folder, "--engine", url, "--engine-base", "other")
        assert "--dtype nothing" in message(folder, "--engine", url, "--dtype", "nothing")
        assert str(tmp_path / "gone") in message(tmp_path / "gone", "--engine", url)
        assert "--engine-api-key" in message(folder, "--engine", url, "--engine-api-key", "é")
    assert "does not answer" in message(folder, "--engine", url)  # before the base is loaded
    with listening(fake_app(Fake(NAMES))) as url:
        assert "--device nothing" in message(folder, "--engine", url, "--device", "nothing")
    assert json.loads((folder / "moe_config.json").read_text())["chat"] is False
    assert folder.name == NAME
