"""Experts that come, go and get other names while requests are answered."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from safetensors.torch import load_file, save_file

from dylora_moe import DyLoraMoE
from dylora_moe.serving.changes import Changes
from dylora_moe.serving.guard import Limits
from dylora_moe.serving.service import Service
from dylora_moe.training.run.lock import FolderLock
from serving.live import KEY, NAME, Live, live_server, tiny_checkpoint
from topics import NAMES, texts

HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and adapters."""
    place = tmp_path_factory.mktemp("made")
    mixture = DyLoraMoE.from_pretrained(str(tiny_checkpoint(place, taught=True)))
    mixture.export_expert("sql", place / "adapters" / "spider")
    (place / "adapters" / "broken").mkdir()
    shutil.copytree(place / "adapters" / "spider", place / "adapters" / "half")
    weights = place / "adapters" / "half" / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors[next(iter(tensors))]
    save_file(tensors, weights)
    return place


@contextmanager
def serving(made: Path, place: Path) -> Iterator[Live]:
    shutil.copytree(made / NAME, place / NAME)
    with live_server(place / NAME, changes=True, adapters=made / "adapters") as served:
        yield served


@pytest.fixture
def live(made: Path, tmp_path: Path) -> Iterator[Live]:
    with serving(made, tmp_path) as served:
        yield served


@pytest.fixture(scope="module")
def unchanged(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One for tests that change nothing."""
    with serving(made, tmp_path_factory.mktemp("unchanged")) as served:
        yield served


def call(live: Live, method: str, path: str, body: Any = None) -> httpx.Response:
    return httpx.request(method, f"{live.url}/v1{path}", json=body, headers=HEADERS, timeout=120)


def ask(live: Live, model: str = NAME, **settings: Any) -> httpx.Response:
    asked = {"model": model, "prompt": "abcdef", "max_tokens": 6, "temperature": 0, **settings}
    return call(live, "POST", "/completions", asked)


def rows(topic: int, count: int) -> list[dict[str, str]]:
    return [row if isinstance(row, dict) else {"prompt": "", "completion": row} for row in texts(topic, count, seed=3)]


def names(live: Live) -> list[str]:
    return [each["name"] for each in json.loads((live.folder / "moe_config.json").read_text())["experts"]]


def test_add_rename_remove(live: Live):
    answer = ask(live, f"{NAME}:sql").json()["choices"][0]["text"]
    added = call(live, "POST", "/experts", {"name": "spider", "adapter": "spider"})
    assert added.status_code == 200, added.text
    assert [each["id"] for each in added.json()["data"]] == [*NAMES, "spider", "base"]
    assert added.json()["data"][-2]["state"] == "new"
    assert ask(live, f"{NAME}:spider").json()["choices"][0]["text"] == answer
    assert "spider" in DyLoraMoE.from_pretrained(str(live.folder)).expert_names
    assert call(live, "POST", "/experts/spider/rename", {"to": "tables"}).status_code == 200
    assert ask(live, f"{NAME}:spider").status_code == 404
    assert ask(live, f"{NAME}:tables").json()["choices"][0]["text"] == answer
    assert call(live, "DELETE", "/experts/tables").status_code == 200
    assert ask(live, f"{NAME}:tables").status_code == 404
    assert DyLoraMoE.from_pretrained(str(live.folder)).expert_names == list(NAMES)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/experts", {"name": "sql", "adapter": "spider"}, 400, "exists already"),
        ("POST", "/experts", {"name": "a b", "adapter": "spider"}, 400, "expert name"),
        ("POST", "/experts", {"name": "router", "adapter": "spider"}, 400, "reserved"),
        ("POST", "/experts", {"name": "x", "adapter": "../tiny"}, 400, "spider"),
        ("POST", "/experts", {"name": "x", "adapter": "/etc"}, 400, "spider"),
        ("POST", "/experts", {"name": "x", "adapter": "broken"}, 400, "adapter_config.json"),
        ("POST", "/experts", {"name": "x" * 101, "adapter": "spider"}, 400, "100 at most"),
        ("POST", "/experts", {"name": "x", "adapter": "half"}, 400, "tensors missing"),
        ("DELETE", "/experts/nothing", None, 404, "there are"),
        ("POST", "/experts/sql/rename", {"to": "law"}, 400, "exists already"),
        ("POST", "/learn", {"name": "sql", "rows": [{"prompt": "a"}]}, 400, "exists already"),
        ("GET", "/learn/nothing", None, 404, "no job"),
    ],
)
def test_what_cannot_be(unchanged: Live, method: str, path: str, body: Any, status: int, message: str):
    live = unchanged
    answer = call(live, method, path, body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert str(live.folder.parent) not in answer.text
    assert live.service.model.expert_names == list(NAMES)
    assert ask(live).status_code == 200


def test_a_key_is_needed(unchanged: Live):
    live = unchanged
    assert httpx.delete(f"{live.url}/v1/experts/sql").status_code == 401
    with pytest.raises(ValueError, match="API key"), live_server(live.folder, Limits(), changes=True):
        pass


def test_removal_waits_for_those_forced_to_it(live: Live):
    engine, answers = live.service.engine, []
    engine.eos = frozenset()
    asking = threading.Thread(target=lambda: answers.append(ask(live, f"{NAME}:sql", max_tokens=150)))
    asking.start()
    while not engine.live:
        time.sleep(0.001)
    removed = []
    removing = threading.Thread(target=lambda: removed.append(call(live, "DELETE", "/experts/sql")))
    removing.start()
    while not engine.leaving:
        time.sleep(0.001)
    assert ask(live, f"{NAME}:sql").status_code == 404  # while it still answers
    with pytest.raises(ValueError, match="another process"):
        FolderLock(live.folder).hold().__enter__()
    removing.join()
    asking.join()
    assert removed[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 150
    assert ask(live, f"{NAME}:sql").status_code == 404
    assert names(live) == [name for name in NAMES if name != "sql"]


def test_a_checkpoint_that_others_changed(live: Live):
    mixture = DyLoraMoE.from_pretrained(str(live.folder))
    mixture.rename_expert("law", "contracts")
    mixture.save_pretrained(live.folder)
    answer = call(live, "DELETE", "/experts/sql")
    assert answer.status_code == 409
    assert "restart" in answer.json()["error"]["message"]
    assert names(live) == mixture.expert_names


def test_a_checkpoint_that_others_change_while_a_removal_waits(live: Live):
    engine = live.service.engine
    engine.eos = frozenset()
    mixture = DyLoraMoE.from_pretrained(str(live.folder))
    mixture.rename_expert("law", "contracts")
    asking = threading.Thread(target=ask, args=(live, f"{NAME}:sql"), kwargs={"max_tokens": 190})
    with ThreadPoolExecutor(1) as pool:
        asking.start()
        while not engine.live:
            time.sleep(0.001)
        with live.service.model.holder.lock.turn():  # the engine stands still
            removing = pool.submit(call, live, "DELETE", "/experts/sql")
            while not engine.leaving:
                time.sleep(0.001)
            mixture.save_pretrained(live.folder)
        assert removing.result().status_code == 409
    asking.join()
    assert live.service.model.expert_names == list(NAMES)
    assert names(live) == mixture.expert_names


def test_a_checkpoint_that_another_process_holds(live: Live):
    with FolderLock(live.folder).hold():
        answer = call(live, "DELETE", "/experts/sql")
    assert answer.status_code == 409
    assert live.service.model.expert_names == list(NAMES)
    assert call(live, "DELETE", "/experts/sql").status_code == 200


def test_a_folder_that_cannot_be_written(unchanged: Live, tmp_path: Path):
    service = Service.__new__(Service)
    with pytest.raises(ValueError, match="cannot be written"):
        Changes(service, tmp_path / "nothing")
    with pytest.raises(ValueError, match="no such folder"):
        Changes(service, unchanged.folder, tmp_path / "nothing")


@pytest.mark.slow
def test_learning_and_composing(live: Live):
    """Each in a process of its own, while requests are answered."""
    added = call(live, "POST", "/experts", {"name": "spider", "adapter": "spider", "rows": rows(0, 6)})
    assert added.status_code == 200, added.text
    assert added.json()["data"][5]["state"] == "routed"
    asked = {"name": "extra", "rows": rows(2, 20), "everything": True, "steps": 2}
    begun = call(live, "POST", "/learn", asked)
    assert begun.status_code == 202
    assert call(live, "DELETE", "/experts/sql").status_code == 409
    served = 0
    while (job := call(live, "GET", f"/learn/{begun.json()['id']}").json())["status"] == "running":
        assert ask(live).status_code == 200
        served += 1
    assert job["status"] == "done", job["message"]
    assert served > 3
    assert str(live.folder.parent) not in job["message"]
    saved = DyLoraMoE.from_pretrained(str(live.folder))
    model = live.service.model
    assert model.expert_names == saved.expert_names == [*NAMES, "spider", "extra"]
    for key, tensor in model.router.state_dict().items():
        assert tensor.equal(saved.router.state_dict()[key])
    for name in model.expert_names:
        for mine, other in zip(model.expert_tensors(name), saved.expert_tensors(name), strict=True):
            assert mine.tensor.equal(other.tensor)
    assert model.skills.tensors().keys() == saved.skills.tensors().keys()
    twice = call(live, "POST", "/learn", {"name": "again", "rows": rows(2, 4)})
    while (job := call(live, "GET", f"/learn/{twice.json()['id']}").json())["status"] == "running":
        time.sleep(0.2)
    assert job["status"] == "nothing new"
