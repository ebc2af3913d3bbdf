"""`dylora-moe serve` as a process of its own."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from dylora_moe.cli import app
from serving.live import tiny_checkpoint

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("commanded"), taught=True)


def started(folder: Path, *words: str) -> tuple[subprocess.Popen, str]:
    """A server on a free port, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dylora_moe", "serve", str(folder), "--port", "0", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return process, found[0]
    raise AssertionError(f"it ended with {process.wait()}")


def test_it_serves_and_lets_running_answers_end(folder: Path):
    process, url = started(folder, "--served-model-name", "mine", "--slot-length", "200", "--api-key", "k")
    try:
        assert httpx.get(f"{url}/ready").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"authorization": "Bearer k"}
        asked = {"model": "mine:sql", "prompt": "abc", "max_tokens": 150, "temperature": 0, "stream": True, "seed": 1}
        lines = []
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, headers=headers, timeout=60) as answer:
            for line in answer.iter_lines():
                if line:
                    lines.append(line.removeprefix("data: "))
                if len(lines) == 3:
                    process.send_signal(signal.SIGTERM)
        assert lines[-1] == "[DONE]"
        assert json.loads(lines[-2])["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait(20) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/ready")
    finally:
        process.kill()
        process.communicate()


def test_it_says_when_it_lets_nobody_end(folder: Path):
    process, url = started(folder, "--drain", "0", "--slots", "1")

    def ask(stream: bool) -> httpx.Response:
        asked = {"model": "tiny:sql", "prompt": ["abc"] * 60, "max_tokens": 240, "temperature": 1, "stream": stream}
        return httpx.post(f"{url}/v1/completions", json=asked, timeout=60)

    try:
        with ThreadPoolExecutor(2) as pool:
            whole, streamed = pool.submit(ask, False), pool.submit(ask, True)
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
        assert whole.result().status_code == 503
        assert "shutting down" in whole.result().json()["error"]["message"]
        lines = [line.removeprefix("data: ") for line in streamed.result().text.splitlines() if line]
        assert "shutting down" in json.loads(lines[-2])["error"]["message"]
        assert lines[-1] == "[DONE]"
        assert "Traceback" not in process.communicate(timeout=20)[0]
    finally:
        process.kill()
        process.communicate()


def test_what_cannot_be_served(folder: Path, tmp_path: Path):
    def message(*words: str) -> str:
        result = runner.invoke(app, ["serve", *words])
        assert result.exit_code
        return str(result.exception)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in message(str(folder), "--port", port)
    assert "API key" in message(str(folder), "--port", "0", "--allow-changes")
    assert "--allow-changes only" in message(str(folder), "--adapters", str(tmp_path))
    assert "--dtype nothing" in message(str(folder), "--port", "0", "--dtype", "nothing")
    assert "--device nothing" in message(str(folder), "--port", "0", "--device", "nothing")
    assert "printable" in message(str(folder), "--api-key", "é")
    assert "positions" in message(str(folder), "--port", "0", "--slot-length", "100000")
    assert str(tmp_path / "nothing") in message(str(tmp_path / "nothing"), "--port", "0")
    assert threading.active_count() < 20  # nothing was left running
